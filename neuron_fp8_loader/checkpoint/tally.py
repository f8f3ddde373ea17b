"""What FP8 weights hold, counted a piece at a time while they are read, and what waits for a decision."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

from ..codes.kernel import Counts, translate
from ..host.memory import as_bytes
from ..host.parallel import run
from .pieces import Decision, Segment, WeightJob

_NOTHING = Counts()


class Tally:
    """Counts of weights, for several threads at once.

    Attributes:
        counts: what each weight held on disk, of the pieces so far.
    """

    def __init__(self, weights: Mapping[str, WeightJob]) -> None:
        self.counts = dict.fromkeys(weights, _NOTHING)
        self._weights, self._lock = weights, threading.Lock()

    def add(self, segment: Segment, seen: Counts, waits_for: Decision | None = None) -> None:
        """Count a piece that is where it belongs; one that is not translated yet waits for its decision."""
        with self._lock:
            before = self.counts[segment.name]
            self.counts[segment.name] = seen if before is _NOTHING else before + seen
            if waits_for is not None:
                waits_for.put_off(segment)

    def settle(self, segment: Segment, source: torch.Tensor, out: torch.Tensor) -> None:
        """Count a piece of a weight and bring it to its place, translated if its decision is settled by now.

        Args:
            segment: which piece.
            source: its bytes as on disk, uint8 [n].
            out: its place, uint8 [n]; may be ``source`` itself.
        """
        job = self._weights[segment.name]
        convert = job.decision is not None and job.decision.convert
        seen = translate(source, out if convert else None, job.table)
        if not convert and job.decision is not None and seen.above:
            job.decision.convert = convert = True
            translate(source, out, job.table)
        elif not convert and out is not source:
            out.copy_(source)
        self.add(segment, seen, None if convert else job.decision)

    def finish(self, tensors: Mapping[str, torch.Tensor], threads: int) -> None:
        """Translate what was put off, where its scale turned out to be doubled."""
        decisions = {id(job.decision): job.decision for job in self._weights.values() if job.decision is not None}
        late = [part for decision in decisions.values() if decision.convert for part in decision.deferred or ()]

        def work(part: Segment) -> None:
            piece = as_bytes(tensors[part.name])[part.start : part.end]
            translate(piece, piece, self._weights[part.name].table)

        run(late, work, threads)
