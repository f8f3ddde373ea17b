"""Long runs of a file, each read and translated by one call of native code, while Python does other things."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from ..codes.formats import Table
from ..codes.kernel import SEGMENT, Counts, How, read_segments
from ..errors import OptionError
from .pieces import Decision, Piece, Segment, WeightJob
from .regular import failed

MOST_SEGMENTS = 4096  # of a run
_LONGEST = 16  # pieces; what Python does for a run is then some microseconds a MiB
_RUNS = 4  # a thread, at least: the last ones are waited for


DIRECT_ENV = "NEURON_FP8_LOADER_DIRECT"
"""1: what is not in the page cache is read past it (O_DIRECT), and is not in it afterwards."""


def direct_wanted() -> bool:
    """Raises OptionError if ``NEURON_FP8_LOADER_DIRECT`` is neither 0 nor 1."""
    given = os.environ.get(DIRECT_ENV, "") or "0"
    if given not in ("0", "1"):
        raise OptionError(f"{DIRECT_ENV}={given}: expected 1 (read files that are not cached past the cache) or 0")
    return given == "1"


def run_length(nbytes: int, threads: int, piece: int) -> int:
    """How many bytes to read by one call, of so many in all."""
    return max(1, min(_LONGEST, nbytes // (_RUNS * threads * piece))) * piece


class NativeRuns:
    """Reads runs into tensors; several threads at once.

    Args:
        handles: descriptor by file.
        tensors: fresh ones, contiguous.
        weights: the FP8 ones among them; their tables are symmetric.
        piece: bytes that are translated together: a part of a core's own cache.
        advance: told of bytes that are done.
    """

    def __init__(
        self,
        handles: Mapping[Path, int],
        tensors: Mapping[str, torch.Tensor],
        weights: Mapping[str, WeightJob],
        piece: int,
        advance: Callable[[int], None],
    ) -> None:
        self._handles, self._tensors, self._piece, self._advance = handles, tensors, piece, advance
        self._tables: list[Table] = list(dict.fromkeys(job.table for job in weights.values()))
        self._direct = direct_wanted()
        self._cells = [Decision()]  # of the native code's own
        self._jobs: dict[str, tuple[int, int, int]] = {}
        cells: dict[int, int] = {}
        for name, job in weights.items():
            cell = 0
            if job.decision is not None:
                cell = cells.setdefault(id(job.decision), len(self._cells))
                if cell == len(self._cells):
                    self._cells.append(job.decision)
            how = How.COUNT if job.decision is None else How.DECIDE
            self._jobs[name] = how, self._tables.index(job.table), cell
        self._made = torch.tensor([decision.convert for decision in self._cells], dtype=torch.uint8, device="cpu")

    def read(self, run: Piece) -> Iterator[tuple[Segment, Counts, int]]:
        """Read a run. Gives of each part of a weight what its bytes held, and how many of them wait for the decision.

        Raises:
            CheckpointError: the file cannot be read, or ends early.
        """
        words = array("Q")
        for name, start, end in run.segments:
            tensor = self._tensors[name]
            first = tensor.data_ptr()
            job = self._jobs.get(name, _KEEP)
            words.extend((first + start, end - start, first, first + tensor.nbytes, *job, 0, 0, 0, 0, 0))
        handle, done = self._handles[run.file], 0
        while done < run.nbytes:
            now, error = read_segments(
                handle, run.offset, done, self._piece, words, self._tables, self._made, self._direct
            )
            if error:
                raise failed(run.file, run.offset + now, error, (s.name for s in run.segments))
            self._advance(now - done)
            done = now
        seen = words.tolist()
        for segment, at in zip(run.segments, range(0, len(seen), SEGMENT), strict=True):
            if segment.name in self._jobs:
                yield segment, Counts(*seen[at + 7 : at + 11]), seen[at + 11]

    def settle(self) -> None:
        """Tell the decisions how they came out."""
        for decision, made in zip(self._cells[1:], self._made[1:].tolist(), strict=True):
            decision.convert = bool(made)


_KEEP = (How.KEEP, 0, 0)
