"""Headers in, plan out: which weight goes with which scale, decided before a byte of weight data is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TypeVar

from .. import conventions
from ..checkpoint import Checkpoint, TensorInfo, open_checkpoint
from ..checkpoint.declared import Declared, read_declared
from ..codes.formats import OTHER_FORMATS
from ..codes.granularity import Granularity, granularity
from ..conventions.qkv import Interleaved
from ..errors import PlanError, Shown, printable
from ..host.cache import cached
from ..options import Options, What
from .experts import as_they_lie
from .plan import ActivationScale, Pair, Plan
from .qkv import disagreement, interleaved, with_chunks
from .recipe import Recipe, make_recipe

FP8 = "float8_e4m3fn"
E8M0 = "float8_e8m0fnu"
SCALE_DTYPES = ("float32", "bfloat16", "float16", "float64", E8M0, "uint8")
"""dtypes that a scale may have; uint8 beside an e4m3fn weight is e8m0 (MXFP8)."""

_FLOATS = ("bfloat16", "float16", "float32", "float64")


def plan_checkpoint(path: str | os.PathLike[str], *, download: bool = False, headers_only: bool = False) -> Plan:
    """Plan a checkpoint from its headers and index alone.

    Args:
        path: a directory, a ``.safetensors`` or ``.bin`` file, or an index file; also in a store, or of the Hub.
        download: fetch a repository of the Hub that is not in its cache; headers_only: or else read its headers alone,
            from the Hub itself.

    Raises:
        CheckpointError: files missing, left over, broken or contradictory.
        PlanError: ambiguous or impossible pairs, all of them at once.
        OptionError: ``path`` is no path.
    """
    return plan_for(open_checkpoint(path, download=download, headers_only=headers_only))


def plan_for(checkpoint: Checkpoint) -> Plan:
    """Plan an opened checkpoint. Raises PlanError as ``plan_checkpoint`` does."""
    declared, source = read_declared(checkpoint.directory, checkpoint.metadata), Shown(checkpoint.path)
    return _kept(checkpoint, ("plan", declared), lambda: make_plan(checkpoint.tensors, source, declared))


def recipe_for(checkpoint: Checkpoint, what: What) -> Recipe:
    """The recipe for the whole of an opened checkpoint.

    Raises:
        PlanError: as ``plan_checkpoint`` and ``make_recipe`` do.
    """
    what = what.what if isinstance(what, Options) else what
    plan = plan_for(checkpoint)
    return _kept(checkpoint, ("recipe", plan.declared, what), lambda: make_recipe(plan, what))


Named = TypeVar("Named", Plan, Recipe)


def _kept(checkpoint: Checkpoint, what: object, make: Callable[[], Named]) -> Named:
    """What shards that are loaded one by one have in common: they are planned as a whole each time."""
    if len(checkpoint.files) == 1:
        return make()

    def whole() -> Named:
        made = make()
        made.work_out()  # once, not in every copy under another name
        return made

    key = (what, checkpoint.fingerprint, conventions.conventions())
    return cached(key, whole, _BYTES_A_TENSOR * len(checkpoint.tensors)).called(Shown(checkpoint.path))


_BYTES_A_TENSOR = 600  # of a plan or a recipe, about


def make_plan(tensors: Mapping[str, TensorInfo], source: str, declared: Declared | None = None) -> Plan:
    """Plan any set of tensors, on disk or in memory. Raises PlanError as ``plan_checkpoint`` does."""
    declared = declared or Declared()
    candidates = conventions.Candidates(tensors.keys())
    problems: list[str] = []
    pairs: list[Pair] = []
    unscaled: list[str] = []
    other_formats: list[str] = []
    other_scales: dict[str, None] = {}
    untouched: list[str] = []
    for name, info in tensors.items():
        if info.dtype != FP8 and info.dtype not in OTHER_FORMATS:
            continue
        if conventions.is_marker(name, info.shape) or _is_packed_scale(name, tensors):
            untouched.append(name)
        elif info.dtype in OTHER_FORMATS:
            other_formats.append(name)
            other_scales |= {scale: None for _, scale in candidates.of(name)}
        else:
            found = candidates.of(name)
            if not found:
                unscaled.append(name)
            elif len(found) > 1:
                names = " and ".join(f"{scale} ({rule.name})" for rule, scale in found)
                problems.append(
                    f"{name}: has {len(found)} candidates for its scale, {names}; remove the one that is not its "
                    "scale, or register a convention that beats the other"
                )
            else:
                rule, scale = found[0]
                dtype = tensors[scale].dtype
                if dtype not in SCALE_DTYPES:
                    problems.append(f"{name}: its scale {scale} is {dtype}; expected one of {', '.join(SCALE_DTYPES)}")
                elif info.numel and not tensors[scale].numel:
                    problems.append(f"{name}: its scale {scale} is empty, {list(tensors[scale].shape)}; save it whole")
                covers = _granularity(info, tensors[scale], rule, declared)
                module = rule.module_of(name) or name
                pairs.append(Pair(name, scale, rule.name, covers, module, rule.transposed))
    if problems:
        raise PlanError(source, problems)
    pairs = as_they_lie(pairs, tensors)
    lies: dict[str, Interleaved] = {}
    disagreements: list[str] = []
    try:
        lies = interleaved(tensors, pairs, declared.block, dict(declared.settings))
        pairs = with_chunks(pairs, lies, declared.block)
    except ValueError as error:
        disagreements = disagreement(declared, error)
    weights = {pair.weight for pair in pairs} | set(other_formats) | set(unscaled)
    scales = {pair.scale for pair in pairs}
    return Plan(
        source=source,
        tensors=tensors,
        pairs=tuple(pairs),
        unscaled=tuple(unscaled),
        other_formats=tuple(other_formats),
        other_scales=tuple(s for s in other_scales if s not in scales and tensors[s].dtype in (*_FLOATS, E8M0)),
        activation_scales=tuple(_activation_scales(tensors, pairs)),
        untouched_fp8=tuple(untouched),
        unquantized=tuple(_unquantized(tensors)),
        declared=declared,
        warnings=tuple(map(printable, (*declared.remarks, *_disagreements(declared, bool(weights)), *disagreements))),
        interleaved=lies,
    )


def _granularity(
    weight: TensorInfo, scale: TensorInfo, rule: conventions.Convention, declared: Declared
) -> Granularity:
    return granularity(
        weight.shape,
        scale.shape,
        declared.block,
        e8m0=scale.dtype in (E8M0, "uint8"),
        fused_qkv="qkv" in weight.name,
        maybe_transposed=rule.scale_transposed,
    )


def _is_packed_scale(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Is this e4m3fn tensor the scale of a packed (uint8, int8, int32) weight, as in NVFP4?"""
    return any(
        owner in tensors and tensors[owner].dtype in conventions.PACKED_DTYPES
        for owner in conventions.packed_owners(name)
    )


def _activation_scales(tensors: Mapping[str, TensorInfo], pairs: list[Pair]) -> list[ActivationScale]:
    if not pairs:
        return []
    weights, scales = {p.weight for p in pairs}, {p.scale for p in pairs}
    found = []
    for name, info in tensors.items():
        if name in scales or info.dtype not in _FLOATS:
            continue
        match = conventions.activation_rule(name)
        if match is None:
            continue
        rule, module = match
        if module is not None and not _is_fp8_module(module, tensors, weights):
            continue
        if name.endswith("_proj.output_scale") and f"{name.removesuffix('.output_scale')}.weight._data" in tensors:
            continue  # optimum-quanto: the linear's own output, always present, not the KV cache
        partner = conventions.partner_of(rule, name) if info.numel > 1 else None
        if partner is None or partner in tensors:
            found.append(ActivationScale(name, rule.kind, rule.reciprocal))
    return found


def _is_fp8_module(module: str, tensors: Mapping[str, TensorInfo], weights: set[str]) -> bool:
    """Is the module's weight FP8? A module without a weight of its own (stacked experts) counts as one that is."""
    there = [name for ending in conventions.weight_endings() if (name := module + ending) in tensors]
    return not there or any(name in weights for name in there)


def _unquantized(tensors: Mapping[str, TensorInfo]) -> list[str]:
    return [
        name.removesuffix(".weight")
        for name, info in tensors.items()
        if name.endswith(".weight") and info.dtype in _FLOATS and len(info.shape) >= 2
    ]


def _disagreements(declared: Declared, has_fp8: bool) -> list[str]:
    if declared.fp8 and not has_fp8:
        return [f"{declared.source} declares FP8 ({declared.method}), but no tensor is float8_e4m3fn"]
    if declared.fp8 is False and has_fp8:
        what = f"declares {declared.method}, not FP8" if declared.method else "declares no quantization"
        return [f"{declared.source} {what}, but there are float8_e4m3fn weights; their dtype counts"]
    return []
