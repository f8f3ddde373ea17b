"""Ranges: runs of bytes of single tensors, for those who need a part of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError, Shown
from ..host.memory import allocate, buffer, populate
from ..host.parallel import PIECE, progress, run
from .info import TensorInfo
from .regular import Opened, Stamp, fill

_MAX_BUFFERS = 512  # of one preadv; Linux takes 1024


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes ``start`` to ``end`` of a tensor's data, and what becomes of them.

    Attributes:
        info: the tensor.
        start, end: from the beginning of its data.
        into: uint8 [end - start], contiguous, where the bytes are wanted; None: anywhere.
        see: called with the bytes: ``into``, or memory that may be written to and is used again afterwards. Several
            threads call at once, in no order. None: nothing is left to do.
    """

    info: TensorInfo
    start: int
    end: int
    into: torch.Tensor | None = None
    see: Callable[[torch.Tensor], None] | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_ranges(
    ranges: Iterable[Range], stamps: Mapping[Path, Stamp], threads: int, show_progress: bool | None = False
) -> None:
    """Read ranges of tensors of safetensors files; those that lie end to end are read together.

    Raises:
        CheckpointError: a file cannot be read, ends early, or is not what it was when its header was read.
    """
    wanted = sorted(ranges, key=lambda r: (str(r.info.file), r.info.offset + r.start))
    own = threading.local()
    files = dict.fromkeys(r.info.file for r in wanted if r.info.file)
    total = sum(r.nbytes for r in wanted)
    with Opened(files, stamps) as handles, progress("reading", total, show_progress) as advance:

        def work(together: list[Range]) -> None:
            needed = sum(r.nbytes for r in together if r.into is None)
            if needed > getattr(own, "size", 0):
                own.scratch, own.size = allocate(needed), needed
            parts, used = [], 0
            for r in together:
                if r.into is None:
                    parts.append(own.scratch[used : used + r.nbytes])
                    used += r.nbytes
                else:
                    populate(r.into, 0, r.nbytes)
                    parts.append(r.into)
            first = together[0]
            assert first.info.file is not None
            file, offset = first.info.file, first.info.offset + first.start
            got = fill(file, handles[file], [buffer(part) for part in parts], offset)
            if got < sum(r.nbytes for r in together):
                raise CheckpointError(
                    f"{file}: ends at byte {offset + got}, in the data of {Shown(first.info.name)}; was it truncated?"
                )
            for r, part in zip(together, parts, strict=True):
                if r.see is not None:
                    r.see(part)
            advance(sum(part.numel() for part in parts))

        run(list(_neighbours(wanted)), work, threads)


def _neighbours(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """Ranges that lie end to end in a file, up to a piece together."""
    batch: list[Range] = []
    nbytes, end = 0, None
    for r in ranges:
        if not r.nbytes:
            continue
        begin = (r.info.file, r.info.offset + r.start)
        if batch and (begin != end or nbytes + r.nbytes > PIECE or len(batch) >= _MAX_BUFFERS):
            yield batch
            batch, nbytes = [], 0
        batch.append(r)
        nbytes += r.nbytes
        end = (r.info.file, r.info.offset + r.end)
    if batch:
        yield batch
