"""The source of bytes that lie in a store, translated as they arrive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..codes.formats import Table
from ..codes.kernel import Counts, translate
from ..host.memory import allocate, populate, shaped
from ..host.parallel import pieces, progress
from .ahead import Ahead
from .fetch import REQUEST, Piece, Take, cut, pump, requests_at_once, view
from .info import TensorInfo
from .pieces import Segment, WeightJob
from .ranges import Range
from .regular import Stamp
from .remote import Entry, RemotePath
from .tally import Tally


class RemoteSource:
    """Files in a store of which each tensor's place is known. ``stamps``: what they were when their headers were read;
    an object that has another ETag by now is a CheckpointError."""

    def __init__(self, stamps: Mapping[Path, Stamp]) -> None:
        self._known = {f: Entry(f.name, s.size, s.tag, s.mtime_ns) for f, s in stamps.items()}

    def _get(self, file: RemotePath, start: int, end: int) -> Any:
        return file.get(self._known[file], start, end)

    def _fetch(self, wanted: Iterable[tuple[TensorInfo, int, int, Take]], threads: int, show: bool | None) -> None:
        """Call ``take(offset, part)`` of (info, start, end, take) with runs of its bytes, uint8, which must not be
        written to; ``offset`` counts from ``start``."""
        jobs = cut(wanted)
        working = threading.Semaphore(threads)
        total = sum(end - start for piece in jobs for start, end, _ in piece.parts)
        with progress("reading", total, show) as advance:

            def take(piece: Piece, got: Any) -> None:
                with working, view(got) as data:
                    for start, end, use in piece.parts:
                        use(data[start - piece.start : end - piece.start])
                        advance(end - start)

            pump(jobs, lambda piece: self._get(piece.file, piece.start, piece.end), take)

    def read(
        self,
        infos: Sequence[TensorInfo],
        weights: Mapping[str, WeightJob],
        threads: int,
        show_progress: bool | None = False,
    ) -> tuple[dict[str, torch.Tensor], dict[str, Counts]]:
        raw = {info.name: allocate(info.nbytes) for info in infos}
        tensors = {info.name: shaped(raw[info.name], info.torch_dtype, info.shape) for info in infos}
        tally = Tally(weights)

        def settle(name: str, source: torch.Tensor, at: int) -> None:
            end = at + source.numel()
            out = raw[name][at:end]
            populate(out, 0, out.numel())
            if name in weights:
                tally.settle(Segment(name, at, end), source, out)
            else:
                out.copy_(source)

        def use(name: str) -> Take:
            def take(offset: int, part: torch.Tensor) -> None:
                for start, end in pieces(part.numel()):  # in cache for as long as it takes
                    settle(name, part[start:end], offset + start)

            return take

        self._fetch(((info, 0, info.nbytes, use(info.name)) for info in infos), threads, show_progress)
        tally.finish(tensors, threads)
        return tensors, tally.counts

    def visit(
        self,
        infos: Sequence[TensorInfo],
        see: Callable[[str, torch.Tensor], None],
        threads: int,
        show_progress: bool | None = False,
    ) -> None:
        def use(name: str) -> Take:
            def take(offset: int, part: torch.Tensor) -> None:
                for start, end in pieces(part.numel()):
                    see(name, part[start:end])

            return take

        self._fetch(((info, 0, info.nbytes, use(info.name)) for info in infos), threads, show_progress)

    def read_ranges(self, ranges: Iterable[Range], threads: int, show_progress: bool | None = False) -> None:
        own = threading.local()
        split: dict[int, torch.Tensor] = {}
        missing: dict[int, int] = {}
        lock = threading.Lock()

        def use(r: Range) -> Take:
            def take(offset: int, part: torch.Tensor) -> None:
                out, whole = r.into, part.numel() == r.nbytes
                if out is None and whole:
                    if part.numel() > getattr(own, "size", 0):
                        own.scratch, own.size = allocate(part.numel()), part.numel()
                    out = own.scratch[: part.numel()]
                elif out is None:  # a range that lies in two requests waits for both
                    with lock:
                        if id(r) not in split:
                            split[id(r)] = allocate(r.nbytes)
                        out = split[id(r)]
                out[offset : offset + part.numel()].copy_(part)
                if not whole:
                    with lock:
                        missing[id(r)] = missing.get(id(r), r.nbytes) - part.numel()
                        if missing[id(r)]:
                            return
                        split.pop(id(r), None)
                if r.see is not None:
                    r.see(out)

            return take

        wanted = list(ranges)  # and so each has an id of its own
        self._fetch(((r.info, r.start, r.end, use(r)) for r in wanted if r.nbytes), threads, show_progress)

    def find_overflow(self, infos: Iterable[TensorInfo], table: Table) -> bool:
        """A request first, then two, four and so on at once: mostly the first one tells."""
        found = threading.Event()

        def use(offset: int, part: torch.Tensor) -> None:
            if translate(part, None, table).above:
                found.set()

        runs = [(i, a, min(a + REQUEST, i.nbytes), use) for i in infos for a in range(0, i.nbytes, REQUEST)]
        at, count = 0, 1
        while at < len(runs) and not found.is_set():
            self._fetch(runs[at : at + count], 4, False)
            at, count = at + count, min(2 * count, requests_at_once())
        return found.is_set()

    @contextmanager
    def opened(self, infos: Iterable[TensorInfo]) -> Iterator[Callable[[TensorInfo, int, torch.Tensor], None]]:
        with Ahead(self._get, list(infos)) as ahead:
            yield ahead.fill

    def mapped(self) -> dict[str, Any] | None:
        return None
