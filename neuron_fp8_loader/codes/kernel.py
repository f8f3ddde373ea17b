"""Translating FP8 codes: one pass gives the new bytes and the counts that the report needs.

The path is the fastest that runs here, or the one named by ``NEURON_FP8_LOADER_KERNEL``: ``avx2``, ``neon``,
``portable`` (C), or ``torch`` where the native extension was not built. All give the same bytes.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch

from ..errors import OptionError
from ..host.grain import GRAIN
from .formats import Table

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


def check_path() -> None:
    """Raise OptionError if ``NEURON_FP8_LOADER_KERNEL`` names a path that does not run here."""
    if active not in _RUN_HERE:
        raise OptionError(f"{ENV}={active}: no such path here; there are {', '.join(_RUN_HERE)}")


def translate(src: torch.Tensor, dst: torch.Tensor | None, table: Table) -> Counts:
    """Translate ``src`` into ``dst`` by ``table``, and count what ``src`` holds.

    Args:
        src: uint8, contiguous, on the CPU.
        dst: the same, as long as ``src``; may be ``src`` itself, may not overlap it otherwise. None: only count.
        table: which translation (``formats.HALF``, ``RATIO``, ``FNUZ``).

    Raises:
        OptionError: as ``check_path``.
    """
    check_path()
    n = src.numel() if isinstance(src, torch.Tensor) else 0
    for t in (src,) if dst is None or dst is src else (src, dst):  # spelt out: a checkpoint may have 50,000 of 1 kB
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"translate takes contiguous uint8 CPU tensors of one length, not {t!r}")
        if t.dtype != torch.uint8 or not t.is_contiguous() or t.device.type != "cpu" or t.numel() != n:
            raise ValueError(f"translate takes contiguous uint8 CPU tensors of one length, not {t.dtype} {t.shape}")
    if n == 0:
        return Counts()
    if active == "torch" or not table.symmetric:
        return _translate_torch(src, dst, table)
    at = src.data_ptr()
    target = 0 if dst is None else at if dst is src else dst.data_ptr()
    return Counts(*_kernel.translate(active, at, n, target, n if target else 0, table.symmetric))


def histogram(src: torch.Tensor) -> torch.Tensor:
    """How often each byte occurs: int64 [256].

    Args:
        src: uint8, contiguous, on the CPU.
    """
    if src.dtype != torch.uint8 or not src.is_contiguous() or src.device.type != "cpu":
        raise ValueError(f"histogram takes a contiguous uint8 CPU tensor, not {src.dtype} {src.shape}")
    if active == "torch" or _kernel is None:
        parts = (torch.bincount(part, minlength=256) for part in src.view(-1).split(GRAIN))
        return sum(parts, torch.zeros(256, dtype=torch.int64, device="cpu"))
    # in C not for speed alone: bincount starts torch's own threads from each of ours
    counts = _kernel.histogram(*_span(src))
    return torch.frombuffer(bytearray(counts), dtype=torch.int64)


def best_mantissas(scales: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """As ``codes.requantize.best_mantissas``, which says what it takes. Native paths only.

    Args:
        scales: float64 [block rows, block columns], from 0 up, contiguous, on the CPU.
        errors: float32 [4096], likewise: what is expected of ratios from 1 up to 2.
    """
    _expect("scales", scales, torch.float64, 2)
    _expect("errors", errors, torch.float32, 1)
    rows, columns = scales.shape
    mantissas = torch.empty(rows, dtype=torch.float64, device="cpu")
    _kernel.best_mantissas(*_span(scales), rows, columns, *_span(errors), *_span(mantissas))
    return mantissas


def requantize(
    src: torch.Tensor,
    dst: torch.Tensor,
    scales: torch.Tensor,
    errors: torch.Tensor,
    row_scales: torch.Tensor,
    block: tuple[int, int],
) -> tuple[float, float]:
    """Choose a scale for each row and write the codes under it, as ``codes.requantize`` says. Native paths only.

    Args:
        src, dst: uint8 [rows, columns], contiguous, on the CPU; ``dst`` may be ``src``.
        scales: float64 [ceil(rows / block[0]), ceil(columns / block[1])], from 0 up and less than 2^126.
        errors: as ``best_mantissas`` takes them.
        row_scales: float32 [rows], written.
        block: (rows, columns) of a block, from 1 up.

    Returns:
        The sums of the squares of the values before and of their changes.
    """
    for name, tensor, dtype, dims in (
        ("src", src, torch.uint8, 2),
        ("dst", dst, torch.uint8, 2),
        ("scales", scales, torch.float64, 2),
        ("errors", errors, torch.float32, 1),
        ("row_scales", row_scales, torch.float32, 1),
    ):
        _expect(name, tensor, dtype, dims)
    spans = (*_span(scales), *_span(errors), *_span(row_scales))
    return _kernel.requantize(active, *_span(src), *_span(dst), *_grid(src, block), *spans)


def _grid(src: torch.Tensor, block: tuple[int, int]) -> tuple[int, int, int, int]:
    rows, columns = src.shape
    return rows, columns, _clamped(block[0], rows), _clamped(block[1], columns)


def dequantize(
    src: torch.Tensor, dst: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], offset: tuple[int, int]
) -> bool:
    """Write ``src x scale`` into ``dst``, each exact product rounded once. Native paths only.

    Returns whether a code was NaN.

    Args:
        src: uint8 [rows, columns] on the CPU, the codes of a row side by side.
        dst: bfloat16 [rows, columns], likewise.
        scales: float32 [ceil((offset[0] + rows) / block[0]), ceil((offset[1] + columns) / block[1])], contiguous.
        block: (rows, columns) of a block, from 1 up.
        offset: where in its first block ``src`` begins; less than ``block``.
    """
    _expect("scales", scales, torch.float32, 2)
    rows, columns = src.shape
    for name, t, dtype in (("src", src, torch.uint8), ("dst", dst, torch.bfloat16)):
        if (
            t.dtype != dtype
            or t.shape != (rows, columns)
            or (columns > 1 and t.stride(1) != 1)
            or t.device.type != "cpu"
        ):
            raise ValueError(
                f"{name}: expected {dtype} {[rows, columns]} on the CPU with contiguous rows, not {t.dtype} "
                f"{list(t.shape)} with strides {t.stride()} on {t.device}"
            )
    top, left = offset
    size = _clamped(block[0], top + max(rows, 1)), _clamped(block[1], left + max(columns, 1))
    return _kernel.dequantize(active, *_rest(src), *_rest(dst), rows, columns, *size, top, left, *_span(scales))


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
        at, size, _ = _rest(dst)
        _kernel.place(active, *_span(src), rows, columns, at, size, stride)


class How(IntEnum):
    """What becomes of bytes that ``read_segments`` reads, as ``_native/read.h`` numbers it."""

    KEEP = 0
    COUNT = 1
    DECIDE = 2


SEGMENT = 12
"""Words that ``read_segments`` takes of a segment: address and bytes; first address and end of its tensor's memory;
``How``; which table; which cell; then, added to by it, the four of ``Counts`` and the bytes that were put off."""

_SLICE = 50_000_000  # ns: a signal waits no longer than this, and a piece


def reads_natively() -> bool:
    """Can ``read_segments`` be called?"""
    return _kernel is not None and active != "torch"


def read_segments(
    handle: int,
    offset: int,
    done: int,
    piece: int,
    segments: array[int],
    tables: Sequence[Table],
    cells: torch.Tensor,
    direct: bool = False,
) -> tuple[int, int]:
    """Read a run of a file into many places, and translate what is FP8 while it is in cache. Without the GIL.

    Args:
        handle: the file's descriptor.
        offset: where in it the first segment begins.
        done: how many bytes of the segments were read by calls before.
        piece: how many bytes are read before they are translated.
        segments: words, ``SEGMENT`` each. The memory must be there, and be written to by nobody else.
        tables: the tables that segments name; symmetric ones.
        cells: uint8; the first is for this function and begins as 0, the others say of each decision whether it is
            made. Threads that read at the same time share them.
        direct: read what is not cached past the page cache, where the file system has that.

    Returns:
        (how many bytes are done now, 0), when all are or after some milliseconds: call again, Python having seen to
        signals in between. (where it ended, errno) for errors, errno -1 if the file ended.
    """
    check_path()
    table_bytes = array("B", b"".join(table.symmetric for table in tables))
    words, count = segments.buffer_info()
    return _kernel.read(
        active, handle, offset, done, piece, _SLICE, direct,
        words, count * segments.itemsize, *table_bytes.buffer_info(), *_span(cells),
    )  # fmt: skip


def _rest(matrix: torch.Tensor) -> tuple[int, int, int]:
    """Where a matrix begins, how many bytes of its memory follow, and how many elements its rows are apart."""
    size = matrix.element_size()
    there = matrix.untyped_storage().nbytes() - int(matrix.storage_offset()) * size
    return matrix.data_ptr(), there if matrix.numel() else 0, int(matrix.stride(0))


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a contiguous tensor's bytes lie, and how many they are."""
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def _clamped(block: int, length: int) -> int:
    """A block larger than what it covers is as large as that: numbers from a file may not fit a machine word."""
    return min(block, max(length, 1))


def _expect(name: str, tensor: torch.Tensor, dtype: torch.dtype, dims: int) -> None:
    if tensor.dtype != dtype or tensor.dim() != dims or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"{name}: expected contiguous {dtype} of {dims} dimensions on the CPU, not {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device}"
        )


_CHUNK = GRAIN  # bytes; torch goes through them without threads of its own


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

    def of(flags: bytes) -> int:
        return sum(n for n, yes in zip(seen, flags, strict=True) if yes)

    return Counts(
        max=max((byte & 0x7F for byte in range(256) if seen[byte]), default=0),
        above=of(table.above),
        lossy=of(table.lossy),
        nan=of(table.nan),
    )
