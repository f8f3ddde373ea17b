"""Source: the one seam through which the bytes of a checkpoint come, whatever its files are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ..codes.formats import Table
from ..codes.kernel import Counts, translate
from ..host.memory import allocate, as_bytes, shaped
from ..host.parallel import pieces, run
from . import reader
from .bin import load_bin
from .info import TensorInfo
from .ranges import Range, read_ranges
from .reader import WeightJob

See = Callable[[str, torch.Tensor], None]


class Source(Protocol):
    """Gives the bytes of tensors whose headers are known. All methods raise CheckpointError for broken files."""

    def read(
        self,
        infos: Sequence[TensorInfo],
        weights: Mapping[str, WeightJob],
        threads: int,
        show_progress: bool | None = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Counts]]:
        """The tensors, in the order of ``infos``, FP8 weights translated as their jobs say; and what these held."""

    def visit(self, infos: Sequence[TensorInfo], see: See, threads: int, show_progress: bool | None = False) -> None:
        """Call ``see(name, piece)`` with every piece of every tensor, uint8, valid until ``see`` returns."""

    def read_ranges(self, ranges: Iterable[Range], threads: int, show_progress: bool | None = False) -> None:
        """Read parts of tensors, each to where it says; ``Range`` has what else there is to know."""

    def find_overflow(self, infos: Iterable[TensorInfo], table: Table) -> bool:
        """Does any of these weights hold a code that does not fit? Reads no further than the first one."""

    def mapped(self) -> dict[str, Any] | None:
        """The whole state dict where the files are mapped into memory as they are; None where they must be read."""


class SafetensorsSource:
    """Files of which each tensor's place is known."""

    def read(
        self,
        infos: Sequence[TensorInfo],
        weights: Mapping[str, WeightJob],
        threads: int,
        show_progress: bool | None = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Counts]]:
        return reader.read(infos, weights, threads, show_progress)

    def visit(self, infos: Sequence[TensorInfo], see: See, threads: int, show_progress: bool | None = False) -> None:
        reader.visit(infos, see, threads, show_progress)

    def read_ranges(self, ranges: Iterable[Range], threads: int, show_progress: bool | None = False) -> None:
        read_ranges(ranges, threads, show_progress)

    def find_overflow(self, infos: Iterable[TensorInfo], table: Table) -> bool:
        return reader.find_overflow(infos, table)

    def mapped(self) -> dict[str, Any] | None:
        return None


class BinSource:
    """``.bin`` files, which torch maps: only what changes takes memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def mapped(self) -> dict[str, Any]:
        return {name: value for file in self._files for name, value in load_bin(file).items()}

    def read(
        self,
        infos: Sequence[TensorInfo],
        weights: Mapping[str, WeightJob],
        threads: int,
        show_progress: bool | None = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Counts]]:
        loaded = self.mapped()
        tensors = {info.name: loaded[info.name].detach() for info in infos}
        counts: dict[str, Counts] = {}
        for name, job in weights.items():
            source = tensors[name].contiguous()
            counts[name] = _translate(source, None, job.table, threads)
            if job.decision is None or not (job.decision.convert or counts[name].above):
                continue
            job.decision.convert = True
            tensors[name] = shaped(allocate(source.numel()), source.dtype, tuple(source.shape))
            _translate(source, tensors[name], job.table, threads)
        return tensors, counts

    def visit(self, infos: Sequence[TensorInfo], see: See, threads: int, show_progress: bool | None = False) -> None:
        loaded = self.mapped()
        flat = {info.name: as_bytes(loaded[info.name].contiguous()) for info in infos}
        jobs = [(name, *part) for name, data in flat.items() for part in pieces(data.numel())]
        run(jobs, lambda job: see(job[0], flat[job[0]][job[1] : job[2]]), threads)

    def read_ranges(self, ranges: Iterable[Range], threads: int, show_progress: bool | None = False) -> None:
        wanted = list(ranges)
        loaded = self.mapped()
        flat = {name: as_bytes(loaded[name].contiguous()) for name in {r.info.name for r in wanted}}

        def work(r: Range) -> None:
            part = flat[r.info.name][r.start : r.end]
            part = part.clone() if r.into is None else r.into.copy_(part)
            if r.see is not None:
                r.see(part)

        run([r for r in wanted if r.nbytes], work, threads)

    def find_overflow(self, infos: Iterable[TensorInfo], table: Table) -> bool:
        loaded = self.mapped()
        return any(_translate(loaded[info.name].contiguous(), None, table, 1).above for info in infos)


def _translate(source: torch.Tensor, target: torch.Tensor | None, table: Table, threads: int) -> Counts:
    src, dst = as_bytes(source), None if target is None else as_bytes(target)
    seen: list[Counts] = []

    def work(part: tuple[int, int]) -> None:
        start, end = part
        seen.append(translate(src[start:end], None if dst is None else dst[start:end], table))

    run(list(pieces(src.numel())), work, threads)
    return sum(seen, Counts())
