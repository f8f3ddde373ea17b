"""Fresh CPU memory for tensors."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import HostMemoryError, WeightError
from .units import size


def allocate(nbytes: int) -> torch.Tensor:
    """Uninitialized uint8 [nbytes] on the CPU, whatever the default device is (a loader may run inside
    ``torch.device("meta")``).

    Raises:
        WeightError: as ``check_mode``.
        RuntimeError: torch's, if there is not enough; ``needing`` makes an error of ours of it.
    """
    fresh = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    if type(fresh) is not torch.Tensor:
        check_mode()
    return fresh


def check_mode() -> None:
    """Raise WeightError inside a mode in which torch makes no real tensors (``FakeTensorMode``)."""
    made = torch.empty(0, dtype=torch.uint8, device="cpu")
    if type(made) is not torch.Tensor:
        raise WeightError(
            f"a torch mode is on that makes a {type(made).__name__} where a tensor is asked for; load and rescale "
            "weights outside of it"
        )


# torch raises plain RuntimeErrors: "DefaultCPUAllocator: can't allocate memory", "... not enough memory"
_OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "not enough memory")


@contextmanager
def needing(nbytes: int, source: str) -> Iterator[None]:
    """Raise HostMemoryError, saying how much was needed, where memory ends within the block.

    Args:
        nbytes: about how much the block takes.
        source: what for.
    """
    try:
        yield
    except HostMemoryError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in _OUT_OF_MEMORY):
            raise
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        known = "" if limit == resource.RLIM_INFINITY else f"; this process may have {size(limit)} (ulimit -v)"
        raise HostMemoryError(
            f"{source}: not enough memory: {size(nbytes)} needed for its tensors, which the system did not "
            f"give{known}. Free memory, raise the limit, or load one shard at a time"
        ) from error


def populate(raw: torch.Tensor, start: int, end: int) -> None:
    """Have the system back bytes of fresh memory at once, which is cheaper than a fault every 4 KiB as they are
    written. Advice only: where it is not taken (before Linux 5.14) the faults come as ever."""
    first = -(-(raw.data_ptr() + start) // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (raw.data_ptr() + end) // mmap.PAGESIZE * mmap.PAGESIZE
    if _madvise is not None and last - first >= _WORTH_A_CALL:
        _madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_POPULATE_WRITE)


_MADV_POPULATE_WRITE = 23  # Linux, <asm-generic/mman-common.h>
_WORTH_A_CALL = 16 * mmap.PAGESIZE


def give_back() -> None:
    """Have the C library return to the system what was freed in between what is not: glibc keeps it otherwise."""
    if _malloc_trim is not None:
        _malloc_trim(ctypes.c_size_t(0))


def _find(function: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), function) if os.uname().sysname == "Linux" else None
    except (AttributeError, OSError):
        return None


_madvise, _malloc_trim = _find("madvise"), _find("malloc_trim")


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
