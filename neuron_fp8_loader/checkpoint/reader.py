"""Files in, tensors out: every byte is read straight into its tensor and translated while still in cache."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch

from ..codes.formats import Table
from ..codes.kernel import Counts, translate
from ..errors import CheckpointError
from ..host.memory import allocate, buffer, populate, shaped
from ..host.parallel import PIECE, pieces, progress, run
from .info import TensorInfo

_MAX_BUFFERS = 512  # of one preadv; Linux takes 1024


@dataclass
class Decision:
    """Whether the weights that share a scale are converted: settled by the first code that does not fit.

    Pieces read before that are put off, and translated at the end if it came.
    """

    convert: bool = False
    deferred: list[tuple[str, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class WeightJob:
    """What to do with the bytes of one FP8 weight: translate them by ``table`` if ``decision`` says so, or only
    count them (no decision)."""

    table: Table
    decision: Decision | None = None


@dataclass(slots=True)  # a load of 700 GB cuts 700 000 of them
class _Segment:
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
    weights: Mapping[str, WeightJob],
    threads: int,
    show_progress: bool | None = False,
) -> tuple[dict[str, torch.Tensor], dict[str, Counts]]:
    """Read tensors from safetensors files.

    Args:
        infos: which tensors; the result has their order.
        weights: the FP8 weights among them, by name.
        threads: how many read at once.
        show_progress: as ``parallel.progress`` takes it.

    Returns:
        the tensors, and of each FP8 weight what its bytes held before they were translated.

    Raises:
        CheckpointError: a file cannot be read, or ends early.
    """
    raw = {info.name: allocate(info.nbytes) for info in infos}
    memory = {name: buffer(t) for name, t in raw.items()}
    counts = dict.fromkeys(weights, Counts())
    lock = threading.Lock()

    def count(name: str, seen: Counts) -> None:
        with lock:
            counts[name] = counts[name] + seen

    def settle(name: str, start: int, end: int) -> None:
        job, part = weights[name], raw[name][start:end]
        if job.decision is None or not job.decision.convert:
            seen = translate(part, None, job.table)
            count(name, seen)
            if job.decision is None:
                return
            if not seen.above:
                job.decision.deferred.append((name, start, end))
                return
            job.decision.convert = True
            translate(part, part, job.table)
        else:
            count(name, translate(part, part, job.table))

    with ExitStack() as stack:
        handles = {file: _open(file, stack) for file in {info.file for info in infos if info.file}}
        total = sum(info.nbytes for info in infos)
        advance = stack.enter_context(progress("reading", total, show_progress))

        def work(piece: _Piece) -> None:
            for segment in piece.segments:
                populate(raw[segment.name], segment.start, segment.end)
            _fill(handles[piece.file], piece, [memory[s.name][s.start : s.end] for s in piece.segments])
            for segment in piece.segments:
                if segment.name in weights:
                    settle(segment.name, segment.start, segment.end)
            advance(piece.nbytes)

        run(_cut(infos), work, threads)
    _finish_deferred(weights, raw, threads)
    return {i.name: shaped(raw[i.name], i.torch_dtype, i.shape) for i in infos}, counts


def find_overflow(infos: Iterable[TensorInfo], table: Table) -> bool:
    """Does any of these weights hold a code that does not fit? Reads no further than the first one."""
    scratch = allocate(PIECE)
    memory = buffer(scratch)
    for info in infos:
        assert info.file is not None
        with ExitStack() as stack:
            handle = _open(info.file, stack)
            for start, end in pieces(info.nbytes):
                part = _Piece(info.file, info.offset + start, [_Segment(info.name, start, end)], end - start)
                _fill(handle, part, [memory[: end - start]])
                if translate(scratch[: end - start], None, table).above:
                    return True
    return False


def visit(
    infos: Sequence[TensorInfo],
    see: Callable[[str, torch.Tensor], None],
    threads: int,
    show_progress: bool | None = False,
) -> None:
    """Read tensors of safetensors files a piece at a time, and keep none of them.

    Args:
        infos: which tensors.
        see: called as ``see(name, piece)``, by several threads at once and in no order, with every piece of every
            tensor: uint8 [at most PIECE], good during the call only.
        threads, show_progress: as ``read``.

    Raises:
        CheckpointError: as ``read``.
    """
    own = threading.local()
    with ExitStack() as stack:
        handles = {file: _open(file, stack) for file in {info.file for info in infos if info.file}}
        advance = stack.enter_context(progress("reading", sum(info.nbytes for info in infos), show_progress))

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


def _finish_deferred(weights: Mapping[str, WeightJob], raw: Mapping[str, torch.Tensor], threads: int) -> None:
    decisions = {id(job.decision): job.decision for job in weights.values() if job.decision is not None}
    late = [part for decision in decisions.values() if decision.convert for part in decision.deferred]

    def work(part: tuple[str, int, int]) -> None:
        name, start, end = part
        piece = raw[name][start:end]
        translate(piece, piece, weights[name].table)

    run(late, work, threads)


def _cut(infos: Iterable[TensorInfo]) -> list[_Piece]:
    """Cut the files into pieces: large tensors in several, small neighbours together in one."""
    done: list[_Piece] = []
    current: _Piece | None = None
    for info in sorted(infos, key=lambda i: (str(i.file), i.offset)):
        assert info.file is not None
        position = 0
        while position < info.nbytes:
            offset = info.offset + position
            if (
                current is None
                or current.file != info.file
                or current.offset + current.nbytes != offset
                or current.nbytes >= PIECE
                or len(current.segments) >= _MAX_BUFFERS
            ):
                current = _Piece(info.file, offset)
                done.append(current)
            take = min(info.nbytes - position, PIECE - current.nbytes)
            current.segments.append(_Segment(info.name, position, position + take))
            current.nbytes += take
            position += take
    return done


def _open(file: Path, stack: ExitStack) -> int:
    try:
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened: {error.strerror}") from error
    stack.callback(os.close, handle)
    return handle


def _fill(handle: int, piece: _Piece, buffers: list[memoryview]) -> None:
    offset = piece.offset
    while buffers:
        try:
            got = os.preadv(handle, buffers, offset)
        except OSError as error:
            raise CheckpointError(f"{piece.file}: reading at byte {offset} failed: {error.strerror}") from error
        if got == 0:
            names = ", ".join(s.name for s in piece.segments[:3])
            raise CheckpointError(f"{piece.file}: ends at byte {offset}, in the data of {names}; was it truncated?")
        offset += got
        while buffers and got >= len(buffers[0]):
            got -= len(buffers[0])
            buffers = buffers[1:]
        if got:
            buffers = [buffers[0][got:], *buffers[1:]]
