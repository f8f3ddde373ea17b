"""What the FP8 codes of a checkpoint are: counted where they lie, nothing loaded, nothing changed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ..checkpoint import Checkpoint, open_checkpoint
from ..codes.formats import E4M3FN, LARGEST_FIT, Table
from ..codes.kernel import Counts, histogram, summarize
from ..errors import ScaleError, WeightError
from ..load.checks import check_weights, laid_out_overflow, new_scales
from ..load.layout import check_layout
from ..options import Options
from ..plan import Plan, Recipe, Verdict, converted
from .predict import Prediction, predict
from .stacks import aim_for

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..options import OptionKeywords

_INF_CODE = LARGEST_FIT + 1  # 256 to a GPU


@dataclass(frozen=True)
class WeightCodes:
    """How often each byte occurs in one FP8 weight.

    Attributes:
        name: the tensor's.
        histogram: int64 [256], on the CPU.
        table: how a load translates it, which says what its codes mean.
    """

    name: str
    histogram: torch.Tensor
    table: Table

    @property
    def is_e4m3fn(self) -> bool:
        """Are its codes those of e4m3fn? In other FP8 formats they end at 240 as they do on Neuron."""
        return self.table.source == E4M3FN

    @cached_property
    def magnitudes(self) -> list[int]:
        """How often each of the 128 magnitude codes occurs, whatever the sign."""
        return (self.histogram[:128] + self.histogram[128:]).tolist()

    @property
    def numel(self) -> int:
        return int(self.histogram.sum())

    @cached_property
    def counts(self) -> Counts:
        """The same as a load counts it."""
        return summarize(self.histogram, self.table)

    @property
    def above(self) -> int:
        """Codes above 240: ``as_inf`` and ``as_nan``."""
        return self.counts.above

    @property
    def as_inf(self) -> int:
        """Codes that Neuron reads as inf (256 to a GPU)."""
        return self.magnitudes[_INF_CODE] if self.is_e4m3fn else 0

    @property
    def as_nan(self) -> int:
        """Codes that Neuron reads as nan and a GPU as 288..448."""
        return self.above - self.as_inf

    @property
    def nan(self) -> int:
        """Codes that are NaN to a GPU too."""
        return self.counts.nan

    @property
    def share_above(self) -> float:
        """``above`` as a share of all its codes, 0..1."""
        return self.above / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class Scan:
    """The codes of the FP8 weights of a checkpoint, or of one shard, and what follows for loading it.

    Attributes:
        recipe: what a load would do with each tensor looked at.
        weights: by name, in the checkpoint's order.
        verdict: which weights a load would rescale.
        refusals: why a load would stop, one text a reason; empty if it would not.
        predicted: what the load will make of each weight, as ``predict`` tells; of weights whose scale was read.
        nbytes: how much was read.
        seconds: how long that took.
    """

    recipe: Recipe
    weights: Mapping[str, WeightCodes]
    verdict: Verdict
    refusals: tuple[str, ...] = ()
    predicted: Mapping[str, Prediction] = field(default_factory=dict)
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def plan(self) -> Plan:
        """Which weight goes with which scale."""
        return self.recipe.plan

    @cached_property
    def rescaled(self) -> list[str]:
        """The weights that a load would rescale."""
        return converted(self.recipe, self.verdict)

    @cached_property
    def requantized(self) -> list[str]:
        """The weights that a load would move from block scales to row scales."""
        return [step.name for step in self.recipe.doing("requantize", role="weight")]

    @cached_property
    def dequantized(self) -> list[str]:
        """The weights that a load would return as bfloat16."""
        return [step.name for step in self.recipe.doing("dequantize", role="weight")]

    @property
    def numel(self) -> int:
        return sum(w.numel for w in self.weights.values())

    @property
    def as_inf(self) -> int:
        return sum(w.as_inf for w in self.weights.values())

    @property
    def as_nan(self) -> int:
        return sum(w.as_nan for w in self.weights.values())

    @property
    def nan(self) -> int:
        return sum(w.nan for w in self.weights.values())

    @property
    def rounded(self) -> int:
        """Codes of the rescaled weights to which the method gives another value, and all codes of weights whose
        requantizing is predicted to cost anything: an upper bound, for some are rounded to the value they have."""
        counts = (self.weights[name].counts.lossy for name in self.rescaled)
        return sum(counts) + sum(self.weights[name].numel for name in self.requantized if self._costs(name))

    def _costs(self, name: str) -> bool:
        return name in self.predicted and self.predicted[name].noise > 0

    @property
    def sqnr_db(self) -> float:
        """Predicted, over all FP8 weights together; inf where nothing is lost."""
        signal = sum(cost.signal for cost in self.predicted.values())
        return Prediction(signal, sum(cost.noise for cost in self.predicted.values())).sqnr

    @property
    def least(self) -> tuple[str, float] | None:
        """The weight with the least predicted SQNR, and that in dB."""
        found = ((name, cost.sqnr) for name, cost in self.predicted.items() if cost.signal)
        return min(found, key=lambda item: item[1], default=None)

    def worst(self, count: int | None = None) -> list[WeightCodes]:
        """Weights with codes above 240, the largest share first."""
        found = [w for w in self.weights.values() if w.above]
        return sorted(found, key=lambda w: (-w.share_above, w.name))[:count]

    def histograms(self) -> tuple[list[int], list[int]]:
        """How often each magnitude code occurs over all e4m3fn weights: on disk, and after the load (128 each).

        The second is exact where codes are translated, predicted for weights that are requantized, and without those
        that become bfloat16.
        """
        before, after = [0] * 128, [0] * 128
        rescaled, others = set(self.rescaled), {*self.requantized, *self.dequantized}
        for weight in self.weights.values():
            if not weight.is_e4m3fn:
                continue
            for code, n in enumerate(weight.magnitudes):
                before[code] += n
                if weight.name not in others:
                    after[weight.table.out[code] if weight.name in rescaled else code] += n
            if weight.name in others and weight.name in self.predicted:
                for code, n in enumerate(self.predicted[weight.name].codes):
                    after[code] += n
        return before, after


def scan_checkpoint(
    path: str | os.PathLike[str],
    *,
    stack: str | None = None,
    experts_as: str | None = None,
    **options: Unpack[OptionKeywords],
) -> Scan:
    """Count the codes of every FP8 weight, in bounded memory.

    Args:
        path: a directory, a ``.safetensors`` or ``.bin`` file, or an index file. Of one shard of several only the
            weights in it are looked at, as far as they alone decide what becomes of them.
        stack: ``"nxd"`` or ``"vllm-neuron"``, for the load that ``neuron-fp8 config`` tells people to use there; None
            for a load with the options alone.
        experts_as: for ``"nxd"``, as ``experts`` of ``settings_for``.
        **options: see ``Options``; they decide what a load would convert and refuse.

    Raises:
        CheckpointError, PlanError: as ``plan_checkpoint``, or a file cannot be read; PlanError also where the options
            ask for what cannot be done.
        What a load would refuse for its values, or the stack's layout, is in ``Scan.refusals``, not raised.
    """
    checkpoint = open_checkpoint(path)
    aim = aim_for(checkpoint, stack, options, experts_as)
    return scan(checkpoint, aim.recipe, aim.options, aim.refusals)


def scan(checkpoint: Checkpoint, recipe: Recipe, options: Options, refusals: tuple[str, ...] = ()) -> Scan:
    """``scan_checkpoint`` for a checkpoint already opened, and the recipe for the whole of it.

    Args:
        refusals: what is known already; put first.
    """
    begin = time.perf_counter()
    recipe, whole = recipe.within(info.name for info in checkpoint.selected_tensors()), recipe
    weights = _weights(checkpoint, recipe, options)
    verdict = _verdict(checkpoint, recipe, weights)
    scales = read_scales(checkpoint, recipe, options)
    found = (
        *refusals,
        *_weight_refusals(recipe, weights),
        *scale_refusals(recipe, scales, verdict, whole.torn(recipe.steps)),
    )
    return Scan(
        recipe=recipe,
        weights=weights,
        verdict=verdict,
        refusals=found,
        predicted=predict(recipe, {name: codes.histogram for name, codes in weights.items()}, scales, verdict),
        nbytes=sum(recipe.plan.tensors[name].nbytes for name in weights),
        seconds=time.perf_counter() - begin,
    )


def _weights(checkpoint: Checkpoint, recipe: Recipe, options: Options) -> dict[str, WeightCodes]:
    counts = {step.name: torch.zeros(256, dtype=torch.int64, device="cpu") for step in recipe.weights}
    lock = threading.Lock()

    def see(name: str, piece: torch.Tensor) -> None:
        seen = histogram(piece)
        with lock:
            counts[name] += seen

    infos = [recipe.plan.tensors[name] for name in counts]
    checkpoint.source.visit(infos, see, options.thread_count(), options.progress)
    tables = {step.name: step.table for step in recipe.weights if step.table is not None}
    return {name: WeightCodes(name, seen, tables[name]) for name, seen in counts.items()}


def _verdict(checkpoint: Checkpoint, recipe: Recipe, weights: Mapping[str, WeightCodes]) -> Verdict:
    plan, table, always = recipe.plan, recipe.table, recipe.what.always
    touched = dict.fromkeys(step.group for step in recipe.steps.values() if step.group)
    groups = set()
    for scale in touched:
        names = [pair.weight for pair in plan.by_scale[scale]]
        apart = [plan.tensors[name] for name in names if name not in weights]
        here = always or any(weights[name].above for name in names if name in weights)
        if here or (apart and checkpoint.source.find_overflow(apart, table)):
            groups.add(scale)
    overflow = bool(groups) or laid_out_overflow(recipe, {name: codes.counts for name, codes in weights.items()})
    return Verdict(frozenset(groups), overflow)


def _weight_refusals(recipe: Recipe, weights: Mapping[str, WeightCodes]) -> list[str]:
    """Run the checks of a load on what was counted, each by itself so that none hides another."""
    found = []
    counts = {name: codes.counts for name, codes in weights.items()}
    for what in (replace(recipe.what, unscaled="keep"), replace(recipe.what, nan="keep")):
        try:
            check_weights(replace(recipe, what=what), counts)
        except WeightError as error:
            found.append(str(error))
    return found


def read_scales(checkpoint: Checkpoint, recipe: Recipe, options: Options) -> dict[str, torch.Tensor]:
    """All scales of a recipe, as they are on disk."""
    infos = [recipe.plan.tensors[s.name] for s in recipe.steps.values() if s.role in ("scale", "activation scale")]
    scales, _ = checkpoint.source.read(infos, {}, options.thread_count(), options.progress)
    return scales


def scale_refusals(
    recipe: Recipe, scales: Mapping[str, torch.Tensor], verdict: Verdict, torn: Sequence[str] = ()
) -> list[str]:
    """What a load would refuse for the values of scales."""
    try:
        new_scales(recipe, scales, verdict)
        if not torn:
            check_layout(recipe, scales)
    except ScaleError as error:
        return [str(error)]
    return []
