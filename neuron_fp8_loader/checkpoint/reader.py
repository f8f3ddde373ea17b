"""Files in, tensors out: every byte is read straight into its tensor and translated while still in cache."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch

from ..codes.formats import Table
from ..codes.kernel import Counts, reads_natively, translate
from ..host.collector import uncollected, uncollected_if_short
from ..host.memory import allocate, as_bytes, buffer, populate, shaped
from ..host.parallel import PIECE, pieces, progress, run
from .info import TensorInfo
from .pieces import Piece, Segment, WeightJob, cut
from .regular import ENDED, Opened, Stamp, failed, fill
from .runs import MOST_SEGMENTS, NativeRuns, run_length
from .tally import Tally

Stamps = Mapping[Path, Stamp]

_MAX_BUFFERS = 512  # of one preadv; Linux takes 1024
_WORTH_POPULATING = 1 << 16  # bytes


def read(
    infos: Sequence[TensorInfo],
    stamps: Stamps,
    weights: Mapping[str, WeightJob],
    threads: int,
    show_progress: bool | None = False,
) -> tuple[dict[str, torch.Tensor], dict[str, Counts]]:
    """Read tensors from safetensors files.

    Args:
        infos: which tensors; the result has their order.
        stamps: what their files were when these headers were read.
        weights: the FP8 weights among them, by name.
        threads: how many read at once.
        show_progress: as ``parallel.progress`` takes it.

    Returns:
        the tensors, and of each FP8 weight what its bytes held before they were translated.

    Raises:
        CheckpointError: a file cannot be read, ends early, or was replaced or written to since its header was read.
    """
    with uncollected():
        dtypes = {info.dtype: info.torch_dtype for info in infos}
        tensors = {info.name: _fresh(info, dtypes[info.dtype]) for info in infos}
    tally = Tally(weights)
    total = sum(info.nbytes for info in infos)
    with Opened(_files(infos), stamps) as handles, progress("reading", total, show_progress) as advance:

        def work(piece: Piece) -> None:
            for segment in piece.segments:
                if segment.end - segment.start >= _WORTH_POPULATING:
                    populate(as_bytes(tensors[segment.name]), segment.start, segment.end)
            _fill(handles[piece.file], piece, [_memory(tensors[s.name], s.start, s.end) for s in piece.segments])
            for segment in piece.segments:
                if segment.name in weights:
                    part = as_bytes(tensors[segment.name])[segment.start : segment.end]
                    tally.settle(segment, part, part)
            advance(piece.nbytes)

        if reads_natively() and all(job.table.symmetric for job in weights.values()):
            native = NativeRuns(handles, tensors, weights, PIECE // 4, advance)

            def work_natively(piece: Piece) -> None:
                for segment, seen, put_off in native.read(piece):
                    if put_off:
                        late = segment._replace(end=segment.start + put_off)
                        tally.add(late, seen, weights[segment.name].decision)
                    else:
                        tally.add(segment, seen)

            with uncollected():
                runs = cut(infos, run_length(total, threads, PIECE), MOST_SEGMENTS)
            with uncollected_if_short(total):
                run(runs, work_natively, threads)
            native.settle()
        else:
            with uncollected():
                runs = cut(infos, PIECE, _MAX_BUFFERS)
            with uncollected_if_short(total):
                run(runs, work, threads)
    tally.finish(tensors, threads)
    return tensors, tally.counts


def find_overflow(infos: Iterable[TensorInfo], stamps: Stamps, table: Table) -> bool:
    """Does any of these weights hold a code that does not fit? Reads no further than the first one. Raises as
    ``read``."""
    scratch = allocate(PIECE)
    memory = buffer(scratch)
    for info in infos:
        with Opened(_files([info]), stamps) as handles:
            for start, end in pieces(info.nbytes):
                assert info.file is not None
                part = Piece(info.file, info.offset + start, [Segment(info.name, start, end)], end - start)
                _fill(handles[info.file], part, [memory[: end - start]])
                if translate(scratch[: end - start], None, table).above:
                    return True
    return False


def visit(
    infos: Sequence[TensorInfo],
    stamps: Stamps,
    see: Callable[[str, torch.Tensor], None],
    threads: int,
    show_progress: bool | None = False,
) -> None:
    """Read tensors of safetensors files a piece at a time, and keep none of them.

    Args:
        infos, stamps: which tensors, and what their files were.
        see: called as ``see(name, piece)``, by several threads at once and in no order, with every piece of every
            tensor: uint8 [at most PIECE]; it is overwritten when the call returns.
        threads, show_progress: as ``read``.

    Raises:
        CheckpointError: as ``read``.
    """
    own = threading.local()
    total = sum(info.nbytes for info in infos)
    with Opened(_files(infos), stamps) as handles, progress("reading", total, show_progress) as advance:

        def work(piece: Piece) -> None:
            if not hasattr(own, "scratch"):
                own.scratch = allocate(PIECE)
            ends = list(accumulate(s.end - s.start for s in piece.segments))
            parts = [own.scratch[end - (s.end - s.start) : end] for s, end in zip(piece.segments, ends, strict=True)]
            _fill(handles[piece.file], piece, [buffer(own.scratch)[: piece.nbytes]])
            for segment, part in zip(piece.segments, parts, strict=True):
                see(segment.name, part)
            advance(piece.nbytes)

        run(cut(infos, PIECE, _MAX_BUFFERS), work, threads)


def _fresh(info: TensorInfo, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a tensor, on the CPU whatever the default device is: a loader may run inside
    ``torch.device("meta")``."""
    try:
        return torch.empty(info.shape, dtype=dtype, device="cpu")
    except NotImplementedError:  # torch fills fresh memory in its deterministic mode, but not of every dtype
        return shaped(allocate(info.nbytes), dtype, info.shape)


def _memory(tensor: torch.Tensor, start: int, end: int) -> memoryview:
    """Bytes of a contiguous tensor as a writable buffer. The caller keeps the tensor alive."""
    return memoryview((ctypes.c_ubyte * (end - start)).from_address(tensor.data_ptr() + start))


def _files(infos: Iterable[TensorInfo]) -> dict[Path, None]:
    return {info.file: None for info in infos if info.file is not None}


def _fill(handle: int, piece: Piece, buffers: list[memoryview]) -> None:
    got = fill(piece.file, handle, buffers, piece.offset)
    if got < piece.nbytes:
        raise failed(piece.file, piece.offset + got, ENDED, (s.name for s in piece.segments))
