"""A converted copy against its original, tensor by tensor, with arithmetic that the loader does not use."""

from __future__ import annotations

import os
import time
from typing import Any

from ..checkpoint import TensorInfo, open_checkpoint
from ..codes.granularity import TENSOR, Granularity
from ..errors import ScaleError, WeightError
from ..options import Options
from ..plan import Plan, plan_for
from .arithmetic import as_bytes, scale_values
from .compare import Side, WeightCheck, compare
from .verification import Original, Verification, check_identical, overflows, progress_of, tidy


def compare_checkpoints(
    path: str | os.PathLike[str], original: str | os.PathLike[str], **options: Any
) -> Verification:
    """Compare a converted copy with its original, tensor by tensor.

    The copy may be converted by any factor or to scales of another layout (``X.scale`` for ``X.weight_scale``, rows
    for blocks): every value must be within one rounding of the original, and no code above 0x77.

    Args:
        path: the copy.
        original: what it was made from.
        **options: ``threads`` and ``progress`` of ``Options``.

    Raises:
        Fp8LoaderError: one of them cannot be read or planned.
    """
    begin = time.perf_counter()
    chosen = Options.of(options)
    copies, originals = open_checkpoint(path), open_checkpoint(original)
    result = Verification(str(path), str(original))
    with Original(copies) as new, Original(originals) as old, progress_of(originals, chosen) as advance:
        _Comparison(result, old, new, plan_for(originals), plan_for(copies), chosen).run(advance)
    result.seconds = time.perf_counter() - begin
    return result


class _Comparison:
    def __init__(
        self, result: Verification, old: Original, new: Original, old_plan: Plan, new_plan: Plan, options: Options
    ) -> None:
        self.result, self.old, self.new = result, old, new
        self.old_plan, self.new_plan, self.threads = old_plan, new_plan, options.thread_count()
        self.old_covers = {pair.weight: pair.granularity for pair in old_plan.pairs}
        self.new_covers = {pair.weight: pair.granularity for pair in new_plan.pairs}
        self.unused = 0

        self.modules = {pair.weight: pair.module for pair in old_plan.pairs}
        self.by_module = {pair.module: pair.weight for pair in new_plan.pairs}

    def _renamed(self, name: str) -> str:
        """The copy's name of a weight: that of the original, or what its module has there."""
        tensors = self.new_plan.tensors
        module = self.modules.get(name, "")
        found = self.by_module.get(module) or f"{module}.weight"
        return name if name in tensors or found not in tensors else found

    def run(self, advance: Any) -> None:
        old, new = self.old_plan.tensors, self.new_plan.tensors
        weights = {p.weight: p.scale for p in self.old_plan.pairs}
        weights |= dict.fromkeys((*self.old_plan.unscaled, *self.old_plan.other_formats), "")
        activations = {a.name for a in self.old_plan.activation_scales}
        names = {name: self._renamed(name) for name in weights}
        accounted = {*weights.values(), *names.values()}
        accounted |= {self.new_plan.scale_of.get(name, "") for name in names.values()}
        plain = not self.new_plan.fp8_weights
        factors: list[float] = []
        missing = []
        for name, info in old.items():
            if name in weights:
                missing += [] if names[name] in new else [name]
                if names[name] in new:
                    self._weight(name, names[name], info)
            elif name in accounted:
                pass  # compared with its weight
            elif name not in new and name in activations and plain:
                self.unused += 1
            elif name not in new:
                missing.append(name)
            elif name in activations and old[name].shape == new[name].shape:
                factors += self._factors(name)
            else:
                check_identical(self.result, name, self.old.get(name), self.new.get(name))
            advance(info.nbytes)
        self._summarize(missing, [n for n in new if n not in old and n not in accounted], factors)

    def _weight(self, name: str, new_name: str, info: TensorInfo) -> None:
        scale, new_scale = self.old_plan.scale_of.get(name), self.new_plan.scale_of.get(new_name)
        covers = self._covers(name, new_name, new_scale)
        new = Side(self.new.get(new_name), self.new.get(new_scale) if new_scale else None, covers)
        old = Side(self.old.get(name), self.old.get(scale) if scale else None, self.old_covers.get(name, TENSOR))
        check = WeightCheck(name, info.numel)
        try:
            if new.is_fp8 and scale and not new_scale:
                raise WeightError(f"{name}: has lost its scale {scale}")
            if not new.is_fp8 and not new.weight.dtype.is_floating_point:
                raise WeightError(f"{name}: is {new.weight.dtype}, was {info.dtype}")
            check = compare(name, old, new, self.threads)
        except (WeightError, ScaleError) as error:
            check.problem = str(error).removeprefix(f"{name}: ")
        self.result.weights.append(check)

    def _covers(self, name: str, new_name: str, scale: str | None) -> Granularity:
        """What the copy's scale covers: where its shape is the original's, the same, whatever its name suggests."""
        before = self.old_plan.scale_of.get(name)
        if scale and before and self.new_plan.tensors[scale].shape == self.old_plan.tensors[before].shape:
            return self.old_covers[name]
        return self.new_covers.get(new_name, TENSOR)

    def _factors(self, name: str) -> list[float]:
        was, now = scale_values(self.old.get(name)), scale_values(self.new.get(name))
        usable = was != 0
        return [float(f) for f in (now[usable] / was[usable]).reshape(-1)]

    def _summarize(self, missing: list[str], extra: list[str], factors: list[float]) -> None:
        result = self.result
        result.problems += [f"{name}: is missing from {result.source}" for name in missing]
        result.notes += [f"{name}: is not in the original" for name in extra]
        if self.unused:
            result.notes.append(f"{self.unused} activation and KV scales are left out of a copy that is not quantized")
        if factors:
            result.activation_factors = (tidy(min(factors)), tidy(max(factors)))
            rescaled = any(weight.factor not in (None, 1.0) for weight in result.weights)
            if rescaled and max(factors) == 1 == min(factors):
                result.notes.append(
                    "static activation and KV scales are as they were, calibrated for +-448: what is quantized with "
                    "them on the device saturates at 240"
                )
        if any(weight.above for weight in result.weights) and not any(
            overflows(as_bytes(self.old.get(weight.name))) for weight in result.weights[:50]
        ):
            result.notes.append(f"{result.against} fits and {result.source} does not: are they the wrong way round?")
