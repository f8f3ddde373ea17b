"""Is it still the same model, and will the device read it? Checked with arithmetic that the loader does not use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..checkpoint import TensorInfo, open_checkpoint
from ..codes.granularity import TENSOR, granularity
from ..load.parts import Parts, batches
from ..options import Options
from ..plan import Pair, Step
from .arithmetic import Bytes, as_bytes, expected, scale_values
from .compare import Side, compare
from .scan import Scan, scan
from .stacks import aim_for
from .verification import Original, Verification, check_identical, overflows, progress_of


def verify_checkpoint(
    path: str | os.PathLike[str], *, stack: str | None = None, experts_as: str | None = None, **options: Any
) -> Verification:
    """Load a checkpoint into memory, a few tensors at a time, and check every value.

    Checked for each weight: no code above 0x77, finite as ml_dtypes reads IEEE e4m3, the codes those that ml_dtypes
    rounds to, the value in float64 what it was but for those codes; a weight that fits untouched; its scale exactly
    the factor larger; all other tensors byte for byte.

    Args:
        path: a directory, a ``.safetensors`` or ``.bin`` file, or an index file.
        stack: ``"nxd"`` or ``"vllm-neuron"``, for the load that ``neuron-fp8 config`` tells people to use there; None
            for a load with the options alone.
        experts_as: for ``"nxd"``, as ``experts`` of ``settings_for``.
        **options: see ``Options``.

    Raises:
        Fp8LoaderError: the checkpoint cannot be read or planned. What a load would refuse is a problem, not an error.
    """
    begin = time.perf_counter()
    checkpoint = open_checkpoint(path, download=options.get("download", False))
    aim = aim_for(checkpoint, stack, options, experts_as)
    chosen = aim.options
    result = Verification(str(path), stack=aim.stack)
    found = scan(checkpoint, aim.recipe, chosen, aim.refusals)
    result.problems += found.refusals
    if not found.refusals:
        with Original(checkpoint) as original, progress_of(checkpoint, chosen) as advance:
            parts = Parts(checkpoint, aim.recipe, found.verdict, chosen)
            _Check(result, found, original, parts, chosen, advance).run()
    result.seconds = time.perf_counter() - begin
    return result


class _Check:
    """Goes by the recipe for what a tensor is and which scale is whose; the arithmetic is its own."""

    def __init__(
        self,
        result: Verification,
        found: Scan,
        original: Original,
        parts: Parts,
        options: Options,
        advance: Callable[[int], None],
    ) -> None:
        self.result, self.recipe, self.plan = result, found.recipe, found.plan
        self.original, self.parts, self.advance = original, parts, advance
        self.always, self.method, self.threads = options.always, options.method, options.thread_count()
        self.nan_is_fine, self.factor = options.nan == "keep", options.table.scale_factor
        self.rescale_activations = options.activation_scales == "rescale"
        self.verdict_any = found.verdict.any

    def run(self) -> None:
        steps = self.recipe.steps
        scales = dict.fromkeys(pair.scale for pair in self.plan.pairs if pair.weight in steps or pair.scale in steps)
        overflow = self.verdict_any and len(steps) < len(self.plan.tensors)  # of one shard: others may decide
        for scale in scales:
            overflow |= self._group(scale)
        for step in self.recipe.weights:
            if step.pair is None:
                old = self.original.get(step.name)
                self._compare(step.name, Side(old), Side(self._load([step.name])[step.name]))
        for step in steps.values():
            if step.activation is not None:
                factor = 1.0
                if overflow and self.rescale_activations:
                    factor = 1 / self.factor if step.reciprocal else self.factor
                new = self._load([step.name])[step.name]
                _check_scale(self.result, step.name, self.original.get(step.name), new, factor)
        others = [self.plan.tensors[step.name] for step in steps.values() if _is_left_alone(step)]
        for batch in batches(others):
            for name, tensor in self._load([info.name for info in batch]).items():
                check_identical(self.result, name, self.original.get(name), tensor)

    def _load(self, names: list[str]) -> dict[str, torch.Tensor]:
        infos = [self.plan.tensors[name] for name in names]
        self.advance(sum(info.nbytes for info in infos))
        return self.parts.load(infos)

    def _compare(self, name: str, old: Side, new: Side, codes: Bytes | None = None) -> None:
        check = compare(name, old, new, self.threads, nan_is_fine=self.nan_is_fine, codes=codes)
        self.result.weights.append(check)

    def _group(self, scale_name: str) -> bool:
        """Check the weights that share a scale, and the scale. Gives whether one of them did not fit."""
        pairs = self.plan.by_scale[scale_name]
        scale = self.original.get(scale_name)
        old = {pair.weight: self.original.get(pair.weight) for pair in pairs}
        needed = self.always or any(overflows(as_bytes(weight)) for weight in old.values())
        new_scale = self._load([scale_name]).get(scale_name)
        header = self.plan.tensors[scale_name]
        if new_scale is not None and _unchanged(self.parts.step(scale_name), header):
            _check_scale(self.result, scale_name, scale, new_scale, self.factor if needed else 1.0)
        for pair in pairs:
            if pair.weight in self.recipe.steps:
                new = self._load([pair.weight])[pair.weight]
                self._pair(pair, Side(old[pair.weight], scale, pair.granularity), new, new_scale, needed)
        return needed

    def _pair(self, pair: Pair, old: Side, weight: torch.Tensor, scale: torch.Tensor | None, needed: bool) -> None:
        covers = TENSOR
        if scale is not None:
            same = scale.shape == self.plan.tensors[pair.scale].shape
            covers = pair.granularity if same else granularity(tuple(weight.shape), tuple(scale.shape))
        codes = None
        if self.parts.step(pair.weight).action == "translate":
            codes = expected(self.method) if needed else np.arange(256, dtype=np.uint8)
        self._compare(pair.weight, old, Side(weight, scale, covers), codes)


def _is_left_alone(step: Step) -> bool:
    return step.role == "other" or (step.role == "scale" and step.pair is None)


def _unchanged(step: Step, header: TensorInfo) -> bool:
    return step.action == "scale" and (step.shape, step.dtype) == (header.shape, header.dtype)


def _check_scale(result: Verification, name: str, old: torch.Tensor, new: torch.Tensor, factor: float) -> None:
    if old.dtype != new.dtype or old.shape != new.shape:
        result.problems.append(f"{name}: is {new.dtype} {list(new.shape)}, was {old.dtype} {list(old.shape)}")
        return
    was, now = scale_values(old), scale_values(new)
    precision = torch.finfo(old.dtype).eps if old.dtype.is_floating_point and factor != 2 and factor != 1 else 0.0
    wrong = int(np.count_nonzero(np.abs(now - was * factor) > np.abs(was * factor) * precision))
    if wrong:
        result.problems.append(f"{name}: {wrong} of {was.size} values are not {factor:g} times what they were")
