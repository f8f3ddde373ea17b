"""Source: the one seam through which the bytes of a checkpoint come, whatever its files are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from ..codes.formats import Table
from ..codes.kernel import Counts, translate
from ..errors import CheckpointError, Shown
from ..host.memory import allocate, as_bytes, buffer, shaped
from ..host.parallel import pieces, run
from . import reader
from .bin import load_bin
from .info import TensorInfo
from .pieces import WeightJob
from .ranges import Range, read_ranges
from .regular import Opened, Stamp, fill

See = Callable[[str, torch.Tensor], None]
Fill = Callable[[TensorInfo, int, torch.Tensor], None]
"""``fill(info, start, out)`` fills uint8 [n] with a tensor's bytes from ``start`` on. Threads may share it."""


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

    def opened(self, infos: Iterable[TensorInfo]) -> AbstractContextManager[Fill]:
        """For those who read some bytes of these tensors at a time."""

    def mapped(self) -> dict[str, Any] | None:
        """The whole state dict where the files are mapped into memory as they are; None where they must be read."""


class SafetensorsSource:
    """Files of which each tensor's place is known. ``stamps``: what they were when their headers were read."""

    def __init__(self, stamps: Mapping[Path, Stamp]) -> None:
        self._stamps = stamps

    def read(
        self,
        infos: Sequence[TensorInfo],
        weights: Mapping[str, WeightJob],
        threads: int,
        show_progress: bool | None = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Counts]]:
        return reader.read(infos, self._stamps, weights, threads, show_progress)

    def visit(self, infos: Sequence[TensorInfo], see: See, threads: int, show_progress: bool | None = False) -> None:
        reader.visit(infos, self._stamps, see, threads, show_progress)

    def read_ranges(self, ranges: Iterable[Range], threads: int, show_progress: bool | None = False) -> None:
        read_ranges(ranges, self._stamps, threads, show_progress)

    def find_overflow(self, infos: Iterable[TensorInfo], table: Table) -> bool:
        return reader.find_overflow(infos, self._stamps, table)

    @contextmanager
    def opened(self, infos: Iterable[TensorInfo]) -> Iterator[Fill]:
        with Opened(dict.fromkeys(info.file for info in infos if info.file is not None), self._stamps) as handles:

            def fill_from(info: TensorInfo, start: int, out: torch.Tensor) -> None:
                assert info.file is not None
                got = fill(info.file, handles[info.file], [buffer(out)], info.offset + start)
                if got < out.numel():
                    end = info.offset + start + got
                    raise CheckpointError(
                        f"{info.file}: ends at byte {end}, in the data of {Shown(info.name)}; was it truncated?"
                    )

            yield fill_from

    def mapped(self) -> dict[str, Any] | None:
        return None


class BinSource:
    """``.bin`` files, which torch maps: only what changes takes memory."""

    def __init__(self, files: Sequence[Path], stamps: Mapping[Path, Stamp]) -> None:
        self._files, self._stamps = files, stamps

    def mapped(self) -> dict[str, Any]:
        return self._mapped(self._files)

    def _mapped(self, files: Iterable[Path]) -> dict[str, Any]:
        return {name: value for file in files for name, value in load_bin(file, self._stamps[file]).items()}

    def _tensors(self, infos: Iterable[TensorInfo]) -> dict[str, torch.Tensor]:
        """These tensors, from their own files alone."""
        infos = list(infos)
        mapped = self._mapped({info.file: None for info in infos if info.file is not None})
        return {info.name: mapped[info.name].detach() for info in infos}

    def read(
        self,
        infos: Sequence[TensorInfo],
        weights: Mapping[str, WeightJob],
        threads: int,
        show_progress: bool | None = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Counts]]:
        tensors = self._tensors(infos)
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
        flat = {name: as_bytes(tensor.contiguous()) for name, tensor in self._tensors(infos).items()}
        jobs = [(name, *part) for name, data in flat.items() for part in pieces(data.numel())]
        run(jobs, lambda job: see(job[0], flat[job[0]][job[1] : job[2]]), threads)

    @contextmanager
    def opened(self, infos: Iterable[TensorInfo]) -> Iterator[Fill]:
        flat = {name: as_bytes(tensor.contiguous()) for name, tensor in self._tensors(infos).items()}

        def fill_from(info: TensorInfo, start: int, out: torch.Tensor) -> None:
            out.copy_(flat[info.name][start : start + out.numel()])

        yield fill_from

    def read_ranges(self, ranges: Iterable[Range], threads: int, show_progress: bool | None = False) -> None:
        wanted = list(ranges)
        loaded = self._tensors({r.info.name: r.info for r in wanted}.values())
        flat = {name: as_bytes(tensor.contiguous()) for name, tensor in loaded.items()}

        def work(r: Range) -> None:
            part = flat[r.info.name][r.start : r.end]
            part = part.clone() if r.into is None else r.into.copy_(part)
            if r.see is not None:
                r.see(part)

        run([r for r in wanted if r.nbytes], work, threads)

    def find_overflow(self, infos: Iterable[TensorInfo], table: Table) -> bool:
        found = self._tensors(infos).values()
        return any(_translate(tensor.contiguous(), None, table, 1).above for tensor in found)


def _translate(source: torch.Tensor, target: torch.Tensor | None, table: Table, threads: int) -> Counts:
    src, dst = as_bytes(source), None if target is None else as_bytes(target)
    seen: list[Counts] = []

    def work(part: tuple[int, int]) -> None:
        start, end = part
        seen.append(translate(src[start:end], None if dst is None else dst[start:end], table))

    run(list(pieces(src.numel())), work, threads)
    return sum(seen, Counts())
