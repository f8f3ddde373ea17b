"""Is it still the same model, and will the device read it? Checked with arithmetic that the loader does not use."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors
import torch

from ..checkpoint import Checkpoint, TensorInfo, open_checkpoint
from ..codes.granularity import TENSOR, Granularity, granularity
from ..errors import Fp8LoaderError, ScaleError, WeightError
from ..host.parallel import progress
from ..load.parts import Parts, batches
from ..options import Options
from ..plan import Pair, Plan, Step, plan_for
from .arithmetic import Bytes, as_bytes, expected, scale_values
from .compare import Side, WeightCheck, compare, sqnr_db
from .scan import Scan, scan
from .stacks import aim_for

_CHUNK = 1 << 20


@dataclass
class Verification:
    """What a verification found.

    Attributes:
        source: the checkpoint; ``against``: the original it was compared with, "" if it was rescaled in memory.
        weights: one check an FP8 weight.
        identical: how many other tensors came through byte for byte.
        problems: what is wrong, one text each; empty: all is well.
        notes: what is worth knowing and not wrong.
        activation_factors: new / old of static activation and KV scales: (least, largest), None without any.
        seconds: how long it took.
        stack: which one the load was for, "" for none.
    """

    source: str
    against: str = ""
    weights: list[WeightCheck] = field(default_factory=list)
    identical: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    activation_factors: tuple[float, float] | None = None
    seconds: float = 0.0
    stack: str = ""

    @property
    def ok(self) -> bool:
        """Nothing is wrong. Look at ``weights`` too: of a checkpoint without FP8 weights that says little."""
        return not self.problems and not any(weight.problem for weight in self.weights)

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @property
    def changed(self) -> int:
        """Values that differ at all."""
        return sum(weight.changed for weight in self.weights)

    @property
    def sqnr_db(self) -> float:
        """Over all FP8 weights together."""
        return sqnr_db(sum(w.signal for w in self.weights), sum(w.noise for w in self.weights))

    @property
    def worst(self) -> WeightCheck | None:
        """The weight with the least SQNR."""
        return min(self.weights, key=lambda weight: weight.sqnr_db, default=None)

    @property
    def factors(self) -> dict[float | None, int]:
        """Scale factor -> how many weights have it. None: the scales' layout changed."""
        found: dict[float | None, int] = {}
        for weight in self.weights:
            factor = None if weight.factor is None else _tidy(weight.factor)
            found[factor] = found.get(factor, 0) + 1
        return found


def verify_checkpoint(path: str | os.PathLike[str], *, stack: str | None = None, **options: Any) -> Verification:
    """Load a checkpoint into memory, a few tensors at a time, and check every value.

    Checked for each weight: no code above 0x77, finite as ml_dtypes reads IEEE e4m3, the codes those that ml_dtypes
    rounds to, the value in float64 what it was but for those codes; a weight that fits untouched; its scale exactly
    the factor larger; all other tensors byte for byte.

    Args:
        path: a directory, a ``.safetensors`` or ``.bin`` file, or an index file.
        stack: ``"nxd"`` or ``"vllm-neuron"``, for the load that ``neuron-fp8 config`` tells people to use there; None
            for a load with the options alone.
        **options: see ``Options``.

    Raises:
        Fp8LoaderError: the checkpoint cannot be read or planned. What a load would refuse is a problem, not an error.
    """
    begin = time.perf_counter()
    checkpoint = open_checkpoint(path, download=bool(options.get("download")))
    aim = aim_for(checkpoint, stack, options)
    chosen = aim.options
    result = Verification(str(path), stack=aim.stack)
    found = scan(checkpoint, aim.recipe, chosen, aim.refusals)
    result.problems += found.refusals
    if not found.refusals:
        with _Original(checkpoint) as original, _progress(checkpoint, chosen) as advance:
            parts = Parts(checkpoint, aim.recipe, found.verdict, chosen)
            _Check(result, found, original, parts, chosen, advance).run()
    result.seconds = time.perf_counter() - begin
    return result


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
    with _Original(copies) as new, _Original(originals) as old, _progress(originals, chosen) as advance:
        _Comparison(result, old, new, plan_for(originals), plan_for(copies), chosen).run(advance)
    result.seconds = time.perf_counter() - begin
    return result


class _Original:
    """Tensors as they are on disk, read by safetensors or torch themselves; from a store by our own source."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._stack = checkpoint, ExitStack()
        self._mapped = checkpoint.source.mapped()
        self._open: dict[Any, Any] = {}

    def __enter__(self) -> _Original:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, name: str) -> torch.Tensor:
        mapped = self._mapped
        if mapped is not None:
            found: torch.Tensor = mapped[name].detach()
            return found
        info = self._checkpoint.tensors[name]
        file = info.file
        if self._checkpoint.is_remote:
            return self._checkpoint.source.read([info], {}, 1)[0][name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safetensors.safe_open(str(file), "pt", "cpu"))
        found = self._open[file].get_tensor(name)
        return found


def _progress(checkpoint: Checkpoint, options: Options) -> Any:
    return progress("verifying", sum(info.nbytes for info in checkpoint.tensors.values()), options.progress)


# -- rescaled in memory ------------------------------------------------------------------------------------------


class _Check:
    """Goes by the recipe for what a tensor is and which scale is whose; the arithmetic is its own."""

    def __init__(
        self,
        result: Verification,
        found: Scan,
        original: _Original,
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
                _check_identical(self.result, name, self.original.get(name), tensor)

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
        needed = self.always or any(_overflows(as_bytes(weight)) for weight in old.values())
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


def _overflows(codes: Bytes) -> bool:
    """Is any code 256..448?"""
    for at in range(0, codes.size, _CHUNK):
        magnitudes = codes[at : at + _CHUNK] & 0x7F
        if bool(((magnitudes > 0x77) & (magnitudes < 0x7F)).any()):
            return True
    return False


def _check_scale(result: Verification, name: str, old: torch.Tensor, new: torch.Tensor, factor: float) -> None:
    if old.dtype != new.dtype or old.shape != new.shape:
        result.problems.append(f"{name}: is {new.dtype} {list(new.shape)}, was {old.dtype} {list(old.shape)}")
        return
    was, now = scale_values(old), scale_values(new)
    precision = torch.finfo(old.dtype).eps if old.dtype.is_floating_point and factor != 2 and factor != 1 else 0.0
    wrong = int(np.count_nonzero(np.abs(now - was * factor) > np.abs(was * factor) * precision))
    if wrong:
        result.problems.append(f"{name}: {wrong} of {was.size} values are not {factor:g} times what they were")


def _check_identical(result: Verification, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
    if old.dtype == new.dtype and old.shape == new.shape and np.array_equal(as_bytes(old), as_bytes(new)):
        result.identical += 1
    else:
        result.problems.append(f"{name}: {new.dtype} {list(new.shape)} differs from the original's {old.dtype}")


# -- a copy against its original ---------------------------------------------------------------------------------


class _Comparison:
    def __init__(
        self, result: Verification, old: _Original, new: _Original, old_plan: Plan, new_plan: Plan, options: Options
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
                _check_identical(self.result, name, self.old.get(name), self.new.get(name))
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
            result.activation_factors = (_tidy(min(factors)), _tidy(max(factors)))
            rescaled = any(weight.factor not in (None, 1.0) for weight in result.weights)
            if rescaled and max(factors) == 1 == min(factors):
                result.notes.append(
                    "static activation and KV scales are as they were, calibrated for +-448: what is quantized with "
                    "them on the device saturates at 240"
                )
        if any(weight.above for weight in result.weights) and not any(
            _overflows(as_bytes(self.old.get(weight.name))) for weight in result.weights[:50]
        ):
            result.notes.append(f"{result.against} fits and {result.source} does not: are they the wrong way round?")


def _tidy(factor: float) -> float:
    """A factor found, freed of the rounding of its scale: 448/240 as bf16 or fp32 has it is 448/240."""
    for known in (1.0, 2.0, 0.5, 448 / 240, 240 / 448):
        if abs(factor / known - 1) <= 2.0**-8:
            return known
    return factor


__all__ = ["Fp8LoaderError", "Verification", "compare_checkpoints", "verify_checkpoint"]
