"""Translating FP8 codes: one pass gives the new bytes and the counts that the report needs.

The path is the fastest that runs here, or the one named by ``NEURON_FP8_LOADER_KERNEL``: ``avx2``, ``neon``,
``portable`` (C), or ``torch`` where the native extension was not built. All give the same bytes.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from ..errors import OptionError
from .formats import E4M3FN, LARGEST_FIT, NAN_CODE, Table

try:
    from . import _kernel
except ImportError:  # installed without a compiler
    _kernel = None  # type: ignore[assignment]

ENV = "NEURON_FP8_LOADER_KERNEL"


class Counts(NamedTuple):
    """What a pass over FP8 bytes has seen. Counts of two pieces add up with ``+``."""

    max: int = 0
    """Largest magnitude code (0x7f where there is a NaN)."""
    above: int = 0
    """Codes 0x78..0x7e: 256..448, inf or nan to Neuron."""
    lossy: int = 0
    """Codes that the table rounds."""
    nan: int = 0
    """Codes that are NaN."""

    def __add__(self, other: object) -> Counts:
        assert isinstance(other, Counts)
        return Counts(
            max(self.max, other.max), self.above + other.above, self.lossy + other.lossy, self.nan + other.nan
        )


def paths() -> list[str]:
    """The paths that run on this machine, fastest first."""
    return [*(_kernel.paths() if _kernel else ()), "torch"]


_RUN_HERE = tuple(paths())

active: str = os.environ.get(ENV, "") or paths()[0]
"""The path in use. A name that is none is refused by ``translate``, not by the import: ``doctor`` must still run."""


def translate(src: torch.Tensor, dst: torch.Tensor | None, table: Table) -> Counts:
    """Translate ``src`` into ``dst`` by ``table``, and count what ``src`` holds.

    Args:
        src: uint8, contiguous, on the CPU.
        dst: the same, as long as ``src``; may be ``src`` itself, may not overlap it otherwise. None: only count.
        table: which translation (``formats.HALF``, ``RATIO``, ``FNUZ``).

    Raises:
        OptionError: ``NEURON_FP8_LOADER_KERNEL`` names a path that does not run here.
    """
    if active not in _RUN_HERE:
        raise OptionError(f"{ENV}={active}: no such path here; there are {', '.join(_RUN_HERE)}")
    n = src.numel()
    for t in (src,) if dst is None else (src, dst):
        if t.dtype != torch.uint8 or not t.is_contiguous() or t.device.type != "cpu" or t.numel() != n:
            raise ValueError(f"translate takes contiguous uint8 CPU tensors of one length, not {t.dtype} {t.shape}")
    if n == 0:
        return Counts()
    if active == "torch" or not table.symmetric:
        return _translate_torch(src, dst, table)
    return Counts(*_kernel.translate(active, src.data_ptr(), 0 if dst is None else dst.data_ptr(), n, table.symmetric))


def histogram(src: torch.Tensor) -> torch.Tensor:
    """How often each byte occurs: int64 [256].

    Args:
        src: uint8, contiguous, on the CPU.
    """
    if src.dtype != torch.uint8 or not src.is_contiguous() or src.device.type != "cpu":
        raise ValueError(f"histogram takes a contiguous uint8 CPU tensor, not {src.dtype} {src.shape}")
    if active == "torch" or _kernel is None:
        return torch.bincount(src.view(-1), minlength=256)
    # in C not for speed alone: bincount starts torch's own threads from each of ours
    counts = _kernel.histogram(src.data_ptr(), src.numel())
    return torch.frombuffer(bytearray(counts), dtype=torch.int64)


def place(src: torch.Tensor, dst: torch.Tensor) -> None:
    """Write a matrix transposed: ``dst[c, r] = src[r, c]``.

    Args:
        src: [rows, columns] of any dtype, contiguous, on the CPU.
        dst: [columns, rows] of the same dtype, mostly a part of a larger tensor: the last dimension has stride 1. May
            not overlap ``src``.
    """
    rows, columns = src.shape
    fits = (
        src.dtype == dst.dtype and tuple(dst.shape) == (columns, rows) and src.device.type == dst.device.type == "cpu"
    )
    if not fits or not src.is_contiguous() or (src.numel() and rows > 1 and dst.stride(1) != 1):
        raise ValueError(f"place takes {src.dtype} {[columns, rows]} on the CPU for {[rows, columns]}, not "
                         f"{dst.dtype} {list(dst.shape)}")  # fmt: skip
    if active == "torch" or _kernel is None or src.element_size() != 1:
        dst.copy_(src.t())
    elif src.numel():
        stride = dst.stride(0) if columns > 1 else rows
        _kernel.place(active, src.data_ptr(), rows, columns, dst.data_ptr(), stride)


_CHUNK = 1 << 18  # bytes; the int32 index made of it (1 MiB) stays in cache


def _translate_torch(src: torch.Tensor, dst: torch.Tensor | None, table: Table) -> Counts:
    out = torch.frombuffer(bytearray(table.out), dtype=torch.uint8)
    histogram = torch.zeros(256, dtype=torch.int64, device="cpu")
    src, dst = src.view(-1), None if dst is None else dst.view(-1)
    for start in range(0, src.numel(), _CHUNK):
        index = src[start : start + _CHUNK].int()
        histogram += torch.bincount(index, minlength=256)
        if dst is not None:
            torch.index_select(out, 0, index, out=dst[start : start + _CHUNK])
    return summarize(histogram, table)


def summarize(histogram: torch.Tensor, table: Table) -> Counts:
    """The counts that ``translate`` gives; ``histogram``, int64 [256], says how often each byte occurs."""
    seen = histogram.tolist()
    if table.source == E4M3FN:
        is_nan = [byte & 0x7F == NAN_CODE for byte in range(256)]
        is_above = [LARGEST_FIT < byte & 0x7F < NAN_CODE for byte in range(256)]
    else:  # fnuz: its nan is 0x80, its largest value 240
        is_nan = [byte == 0x80 for byte in range(256)]
        is_above = [False] * 256
    return Counts(
        max=max((byte & 0x7F for byte in range(256) if seen[byte]), default=0),
        above=sum(n for n, yes in zip(seen, is_above, strict=True) if yes),
        lossy=sum(n for n, yes in zip(seen, table.lossy, strict=True) if yes),
        nan=sum(n for n, yes in zip(seen, is_nan, strict=True) if yes),
    )
