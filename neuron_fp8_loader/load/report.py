"""What a load did: counts a weight at a time, and the one line that says it all."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..codes import kernel
from ..codes.kernel import Counts
from ..codes.requantize import Fidelity
from ..host.units import size
from ..options import Options
from ..plan import Recipe, Verdict


class WeightReport(NamedTuple):
    """One FP8 weight: its counts before the rescale, and whether it was rescaled."""

    name: str
    numel: int
    counts: Counts
    rescaled: bool


@dataclass
class Report:
    """What a load did.

    Attributes:
        source: the checkpoint.
        method: ``"half"`` or ``"ratio"``.
        tensors, nbytes: all that was read, or looked at in memory.
        weights: one entry an FP8 weight.
        activation_scales: how many static activation and KV scales were rescaled.
        dequantized: weights returned as bfloat16.
        requantized: weights moved from block to row scales, with their SQNR against the checkpoint in dB.
        seconds: wall clock time, planning included.
        kernel, threads: what did it.
    """

    source: str
    method: str
    tensors: int = 0
    nbytes: int = 0
    weights: list[WeightReport] = field(default_factory=list)
    activation_scales: int = 0
    dequantized: list[str] = field(default_factory=list)
    requantized: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    kernel: str = ""
    threads: int = 1

    @property
    def rescaled(self) -> list[WeightReport]:
        return [w for w in self.weights if w.rescaled]

    @property
    def counts(self) -> Counts:
        """Over all FP8 weights, as they were before."""
        total = Counts()
        for weight in self.weights:
            total = total + weight.counts
        return total

    @property
    def rounded(self) -> int:
        """Codes that lost a bit, and all codes of weights whose requantizing cost anything. Each of those was rounded
        once more, a few to the value that it had: with such weights the number is an upper bound."""
        again = self._rounded_again
        lossy = sum(w.counts.lossy for w in self.rescaled)
        return lossy + sum(w.numel for w in self.weights if w.name in again)

    @property
    def _rounded_again(self) -> set[str]:
        return {name for name, sqnr in self.requantized.items() if math.isfinite(sqnr)}

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0

    def summary(self) -> str:
        """One line."""
        counts, codes = self.counts, sum(w.numel for w in self.weights)
        parts = [f"{self.tensors} tensors", *self._done(), f"{counts.above} of {codes} codes were above 240"]
        parts += [f"{'at most ' if self._rounded_again else ''}{self.rounded} rounded", f"{counts.nan} NaN"]
        if self.activation_scales:
            parts.append(f"{self.activation_scales} activation scales rescaled")
        speed = f"{size(self.nbytes)} in {self.seconds:.2f} s, {self.gb_per_s:.2f} GB/s"
        return f"{', '.join(parts)}; {speed} ({self.kernel}, {self.threads} threads)"

    def _done(self) -> list[str]:
        """What became of the FP8 weights."""
        if not self.requantized:
            done = [f"{len(self.rescaled)} of {len(self.weights)} FP8 weights rescaled ({self.method})"]
        else:
            done = [f"{len(self.requantized)} of {len(self.weights)} FP8 weights block -> row, {self._sqnr()}"]
            if self.rescaled:
                done.append(f"{len(self.rescaled)} rescaled ({self.method})")
        if self.dequantized:
            done.append(f"{len(self.dequantized)} weights dequantized")
        return done

    def _sqnr(self) -> str:
        worst = min(self.requantized.values())
        finite = [value for value in self.requantized.values() if math.isfinite(value)]
        if not finite:
            return "exact"
        return f"SQNR worst {worst:.1f} dB, mean {sum(finite) / len(finite):.1f} dB"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        data = asdict(self)
        data["weights"] = [
            {"name": w.name, "numel": w.numel, "rescaled": w.rescaled, **w.counts._asdict()} for w in self.weights
        ]
        # JSON has no infinity: null is "exact"
        data["requantized"] = {n: v if math.isfinite(v) else None for n, v in self.requantized.items()}
        return {**data, "gb_per_s": self.gb_per_s}


def make_report(
    recipe: Recipe,
    options: Options,
    names: Collection[str],
    counts: Mapping[str, Counts],
    verdict: Verdict,
    scales: Collection[str],
    fidelity: Mapping[str, Fidelity],
) -> Report:
    """A report without its seconds.

    Args:
        recipe, options, verdict: what was done.
        names: the tensors it was done with.
        counts: what the FP8 weights among them held.
        scales: names of the scales that changed.
        fidelity: what requantizing cost.
    """
    steps, headers = recipe.steps, recipe.plan.tensors
    return Report(
        source=recipe.plan.source,
        method=recipe.what.method,
        tensors=len(names),
        nbytes=sum(headers[name].nbytes for name in names),
        weights=[
            WeightReport(
                name,
                headers[name].numel,
                seen,
                steps[name].action == "translate" and verdict.applies(steps[name]),
            )
            for name, seen in counts.items()
        ],
        activation_scales=sum(step.activation is not None and step.name in scales for step in steps.values()),
        dequantized=[step.name for step in recipe.weights if step.action == "dequantize" and step.name in names],
        requantized={name: cost.sqnr for name, cost in fidelity.items()},
        kernel=kernel.active,
        threads=options.thread_count(),
    )
