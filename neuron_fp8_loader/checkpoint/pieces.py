"""Pieces of files: what is read at once, which tensors it fills, and what becomes of the FP8 weights among them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from ..codes.formats import Table
from .info import TensorInfo


@dataclass(slots=True)
class Decision:
    """Whether the weights that share a scale are converted: settled by the first code that does not fit.

    Pieces read before that are put off, and translated at the end if it came.
    """

    convert: bool = False
    deferred: list[Segment] | None = None

    def put_off(self, segment: Segment) -> None:
        """To be called by one thread at a time."""
        self.deferred = self.deferred or []
        self.deferred.append(segment)


class WeightJob(NamedTuple):
    """What to do with the bytes of one FP8 weight: translate them by ``table`` if ``decision`` says so, or only
    count them (no decision)."""

    table: Table
    decision: Decision | None = None


class Segment(NamedTuple):  # a load of 700 GB cuts 700 000 of them
    """Bytes ``start`` to ``end`` of a tensor."""

    name: str
    start: int
    end: int


@dataclass(slots=True)
class Piece:
    """A run of bytes of one file, and the parts of tensors that it fills."""

    file: Path
    offset: int
    segments: list[Segment] = field(default_factory=list)
    nbytes: int = 0


def cut(infos: Iterable[TensorInfo], limit: int, segments: int) -> list[Piece]:
    """Cut the files into pieces: large tensors in several, small neighbours together in one.

    Args:
        infos: what is to be read.
        limit: bytes of a piece.
        segments: how many tensors a piece may fill.
    """
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in infos:
        assert info.file is not None
        by_file.setdefault(info.file, []).append(info)
    done: list[Piece] = []
    for file in sorted(by_file):
        current = Piece(file, -1)
        end = -1  # of the current piece, in the file
        for info in sorted(by_file[file], key=attrgetter("offset")):
            position, offset, left = 0, info.offset, info.nbytes
            while left:
                if end != offset or current.nbytes >= limit or len(current.segments) >= segments:
                    current = Piece(file, offset)
                    done.append(current)
                take = min(left, limit - current.nbytes)
                current.segments.append(Segment(info.name, position, position + take))
                current.nbytes += take
                position, offset, left = position + take, offset + take, left - take
                end = offset
    return done
