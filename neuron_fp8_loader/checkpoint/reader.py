"""Files in, tensors out: every byte is read straight into its tensor and translated while still in cache."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch

from ..codes.formats import Table
from ..codes.kernel import Counts, translate
from ..errors import CheckpointError, printable
from ..host.collector import uncollected
from ..host.memory import allocate, as_bytes, buffer, populate, shaped
from ..host.parallel import PIECE, pieces, progress, run
from .info import TensorInfo
from .regular import Opened, Stamp, fill

Stamps = Mapping[Path, Stamp]

_MAX_BUFFERS = 512  # of one preadv; Linux takes 1024
_SECONDS_OF_READING = 1 << 28  # bytes, at most; below, what the collector finds to do is most of the work
_WORTH_POPULATING = 1 << 16  # bytes


@dataclass(slots=True)
class Decision:
    """Whether the weights that share a scale are converted: settled by the first code that does not fit.

    Pieces read before that are put off, and translated at the end if it came.
    """

    convert: bool = False
    deferred: list[_Segment] | None = None


class WeightJob(NamedTuple):
    """What to do with the bytes of one FP8 weight: translate them by ``table`` if ``decision`` says so, or only
    count them (no decision)."""

    table: Table
    decision: Decision | None = None


class _Segment(NamedTuple):  # a load of 700 GB cuts 700 000 of them
    name: str
    start: int
    end: int


@dataclass(slots=True)
class _Piece:
    """A run of bytes of one file, and the parts of tensors that it fills."""

    file: Path
    offset: int
    segments: list[_Segment] = field(default_factory=list)
    nbytes: int = 0


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
        cut = _cut(infos)
    counts = dict.fromkeys(weights, Counts())
    lock = threading.Lock()

    def settle(segment: _Segment) -> None:
        name, start, end = segment
        job, part = weights[name], as_bytes(tensors[name])
        if end - start < part.numel():
            part = part[start:end]
        decision = job.decision
        if decision is not None and decision.convert:
            seen = translate(part, part, job.table)
        else:
            seen = translate(part, None, job.table)
            if decision is not None and seen.above:
                decision.convert = True
                translate(part, part, job.table)
            elif decision is not None:
                with lock:
                    decision.deferred = decision.deferred or []
                    decision.deferred.append(segment)
        with lock:
            counts[name] = counts[name] + seen

    total = sum(info.nbytes for info in infos)
    with Opened(_files(infos), stamps) as handles, progress("reading", total, show_progress) as advance:

        def work(piece: _Piece) -> None:
            for segment in piece.segments:
                if segment.end - segment.start >= _WORTH_POPULATING:
                    populate(as_bytes(tensors[segment.name]), segment.start, segment.end)
            _fill(handles[piece.file], piece, [_memory(tensors[s.name], s.start, s.end) for s in piece.segments])
            for segment in piece.segments:
                if segment.name in weights:
                    settle(segment)
            advance(piece.nbytes)

        with uncollected() if total <= _SECONDS_OF_READING else nullcontext():
            run(cut, work, threads)
    _finish_deferred(weights, tensors, threads)
    return tensors, counts


def find_overflow(infos: Iterable[TensorInfo], stamps: Stamps, table: Table) -> bool:
    """Does any of these weights hold a code that does not fit? Reads no further than the first one. Raises as
    ``read``."""
    scratch = allocate(PIECE)
    memory = buffer(scratch)
    for info in infos:
        with Opened(_files([info]), stamps) as handles:
            for start, end in pieces(info.nbytes):
                assert info.file is not None
                part = _Piece(info.file, info.offset + start, [_Segment(info.name, start, end)], end - start)
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

        def work(piece: _Piece) -> None:
            if not hasattr(own, "scratch"):
                own.scratch = allocate(PIECE)
            ends = list(accumulate(s.end - s.start for s in piece.segments))
            parts = [own.scratch[end - (s.end - s.start) : end] for s, end in zip(piece.segments, ends, strict=True)]
            _fill(handles[piece.file], piece, [buffer(own.scratch)[: piece.nbytes]])
            for segment, part in zip(piece.segments, parts, strict=True):
                see(segment.name, part)
            advance(piece.nbytes)

        run(_cut(infos), work, threads)


def _finish_deferred(weights: Mapping[str, WeightJob], tensors: Mapping[str, torch.Tensor], threads: int) -> None:
    decisions = {id(job.decision): job.decision for job in weights.values() if job.decision is not None}
    late = [part for decision in decisions.values() if decision.convert for part in decision.deferred or ()]

    def work(part: _Segment) -> None:
        name, start, end = part
        piece = as_bytes(tensors[name])[start:end]
        translate(piece, piece, weights[name].table)

    run(late, work, threads)


def _cut(infos: Iterable[TensorInfo]) -> list[_Piece]:
    """Cut the files into pieces: large tensors in several, small neighbours together in one."""
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in infos:
        assert info.file is not None
        by_file.setdefault(info.file, []).append(info)
    done: list[_Piece] = []
    for file in sorted(by_file):
        current = _Piece(file, -1)
        for info in sorted(by_file[file], key=attrgetter("offset")):
            position, offset, nbytes = 0, info.offset, info.nbytes
            while position < nbytes:
                if (
                    current.offset + current.nbytes != offset
                    or current.nbytes >= PIECE
                    or len(current.segments) >= _MAX_BUFFERS
                ):
                    current = _Piece(file, offset)
                    done.append(current)
                take = min(nbytes - position, PIECE - current.nbytes)
                current.segments.append(_Segment(info.name, position, position + take))
                current.nbytes += take
                position += take
                offset += take
    return done


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


def _fill(handle: int, piece: _Piece, buffers: list[memoryview]) -> None:
    got = fill(piece.file, handle, buffers, piece.offset)
    if got < piece.nbytes:
        names = ", ".join(printable(s.name) for s in piece.segments[:3])
        raise CheckpointError(
            f"{piece.file}: ends at byte {piece.offset + got}, in the data of {names}; was it truncated?"
        )
