"""Fresh CPU memory for tensors, in huge pages where the system has them."""

from __future__ import annotations

import ctypes
import os

import torch

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # Linux, <asm-generic/mman-common.h>


def allocate(nbytes: int) -> torch.Tensor:
    """Uninitialised uint8 [nbytes] on the CPU, whatever the default device is (a loader may run inside
    ``torch.device("meta")``)."""
    raw = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    if nbytes >= 2 * _HUGE_PAGE:
        _use_huge_pages(raw.data_ptr(), nbytes)
    return raw


def shaped(raw: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The bytes as a contiguous tensor of its own (not a view), so that nothing else hangs on to it."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    tensor = torch.empty(0, dtype=dtype, device="cpu")
    return tensor.set_(raw.untyped_storage(), 0, shape, tuple(reversed(strides)))


def buffer(raw: torch.Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor as a writable buffer. The caller keeps the tensor alive."""
    array = ctypes.c_char * raw.numel()
    return memoryview(array.from_address(raw.data_ptr()) if raw.numel() else array()).cast("B")


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's bytes, uint8 [nbytes], sharing its memory."""
    return tensor.detach().view(-1).view(torch.uint8) if tensor.numel() else allocate(0)


def _use_huge_pages(address: int, nbytes: int) -> None:
    # the first touch of 4 KiB pages costs more than reading into them; advice only, so failure does not matter
    begin = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    end = (address + nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if _madvise is not None and end > begin:
        _madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)


try:
    _madvise = ctypes.CDLL(None).madvise if os.uname().sysname == "Linux" else None
except (AttributeError, OSError):
    _madvise = None
