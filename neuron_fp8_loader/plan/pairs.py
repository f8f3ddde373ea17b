"""Headers in, plan out: which weight goes with which scale, decided before a byte of weight data is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from .. import conventions
from ..checkpoint.declared import Declared, read_declared
from ..checkpoint.files import Checkpoint, TensorInfo, open_checkpoint
from ..codes.granularity import Granularity, granularity
from ..errors import PlanError

FP8 = "float8_e4m3fn"
FNUZ = "float8_e4m3fnuz"
E8M0 = "float8_e8m0fnu"
SCALE_DTYPES = ("float32", "bfloat16", "float16", "float64", E8M0, "uint8")
"""dtypes that a scale may have; uint8 beside an e4m3fn weight is e8m0 (MXFP8)."""

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_WEIGHT_ENDINGS = (
    ".weight", "", "_weight", "._weight_qdata", ".weight._data",
    ".weight_packed", "_packed", "_blocks", ".qweight", "_qweight",
)  # fmt: skip
"""What a module's weight may be called: FP8 ones, and those of the formats that are left alone."""


@dataclass(frozen=True)
class Pair:
    """One FP8 weight and the scale that makes up for its rescaling."""

    weight: str
    scale: str
    convention: str
    granularity: Granularity


@dataclass(frozen=True)
class ActivationScale:
    """A static activation or KV cache scale, calibrated for +-448."""

    name: str
    kind: str
    reciprocal: bool = False


@dataclass(frozen=True)
class Plan:
    """What will be done with each tensor.

    Attributes:
        source: the checkpoint, for messages.
        tensors: every tensor's header, in the checkpoint's order.
        pairs: the e4m3fn weights with their scales.
        unscaled: e4m3fn weights without a scale.
        fnuz: float8_e4m3fnuz weights, which have a table of their own and need no change of scale.
        activation_scales: what ``activation_scales="rescale"`` would multiply.
        untouched_fp8: FP8 tensors that are no weights: scales of NVFP4 weights, markers.
        unquantized: modules whose weight is bf16, fp16 or fp32 and at least two-dimensional.
        declared: what the config files say.
        warnings: where config and tensors disagree.
    """

    source: str
    tensors: Mapping[str, TensorInfo]
    pairs: tuple[Pair, ...] = ()
    unscaled: tuple[str, ...] = ()
    fnuz: tuple[str, ...] = ()
    activation_scales: tuple[ActivationScale, ...] = ()
    untouched_fp8: tuple[str, ...] = ()
    unquantized: tuple[str, ...] = ()
    declared: Declared = field(default_factory=Declared)
    warnings: tuple[str, ...] = ()

    @cached_property
    def groups(self) -> tuple[tuple[Pair, ...], ...]:
        """Pairs that must be decided together because they share a scale; mostly groups of one."""
        by_scale: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            by_scale.setdefault(pair.scale, []).append(pair)
        return tuple(tuple(group) for group in by_scale.values())

    @cached_property
    def scale_of(self) -> dict[str, str]:
        return {pair.weight: pair.scale for pair in self.pairs}

    def where(self, name: str) -> str:
        """``file: tensor`` for messages."""
        info = self.tensors.get(name)
        return f"{info.file if info and info.file else self.source}: {name}"

    def summary(self) -> str:
        """The plan in a few lines."""
        kinds: dict[str, int] = {}
        for pair in self.pairs:
            key = f"{pair.convention}, scale {self.tensors[pair.scale].dtype} per {pair.granularity}"
            kinds[key] = kinds.get(key, 0) + 1
        files = {info.file for info in self.tensors.values()}
        total = sum(info.nbytes for info in self.tensors.values())
        lines = [f"{len(self.tensors)} tensors, {size(total)}, {len(files)} file{'s' if len(files) != 1 else ''}"]
        if self.declared.method:
            block = self.declared.block
            blocks = f", blocks of {block[0]}x{block[1]}" if block else ""
            lines.append(f"declared: {self.declared.method}{blocks} ({self.declared.source})")
        lines += [f"{count} FP8 weights: {kind}" for kind, count in sorted(kinds.items(), key=lambda k: -k[1])]
        for names, what in (
            (self.unscaled, "FP8 weights without a scale"),
            (self.fnuz, "float8_e4m3fnuz weights"),
            (self.activation_scales, "static activation and KV scales"),
            (self.untouched_fp8, "FP8 tensors that are no weights, left alone"),
            (self.unquantized, "modules left unquantized"),
        ):
            if names:
                lines.append(f"{len(names)} {what}")
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        return {
            "source": self.source,
            "tensors": len(self.tensors),
            "bytes": sum(info.nbytes for info in self.tensors.values()),
            "declared": self.declared.method,
            "pairs": [
                {
                    "weight": p.weight,
                    "scale": p.scale,
                    "convention": p.convention,
                    "granularity": str(p.granularity),
                    "weight_shape": list(self.tensors[p.weight].shape),
                    "scale_dtype": self.tensors[p.scale].dtype,
                    "scale_shape": list(self.tensors[p.scale].shape),
                }
                for p in self.pairs
            ],
            "unscaled": list(self.unscaled),
            "fnuz": list(self.fnuz),
            "activation_scales": [a.name for a in self.activation_scales],
            "untouched_fp8": list(self.untouched_fp8),
            "unquantized": list(self.unquantized),
            "warnings": list(self.warnings),
        }


def size(nbytes: float) -> str:
    """``'1.6 MB'``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def plan_checkpoint(path: str | os.PathLike[str]) -> Plan:
    """Plan a checkpoint from its headers and index alone.

    Args:
        path: a directory, a ``.safetensors`` or ``.bin`` file, or an index file.

    Raises:
        CheckpointError: files missing, left over, broken or contradictory.
        PlanError: ambiguous or impossible pairs, all of them at once.
    """
    return plan_for(open_checkpoint(path))


def plan_for(checkpoint: Checkpoint) -> Plan:
    """Plan an opened checkpoint. Raises PlanError as ``plan_checkpoint`` does."""
    declared = read_declared(checkpoint.directory, checkpoint.metadata)
    source = str(checkpoint.path)
    if len(checkpoint.files) == 1 or checkpoint.is_bin:
        return make_plan(checkpoint.tensors, source, declared)
    # shards loaded one by one are planned as a whole each time: keep the plan while nothing changes
    key = (checkpoint.files, checkpoint.digests, declared, conventions.conventions())
    global _last
    last_key, plan = _last
    if plan is None or last_key != key:
        plan = make_plan(checkpoint.tensors, source, declared)
        _last = key, plan
    return replace(plan, source=source)


_last: tuple[object, Plan | None] = None, None


def make_plan(tensors: Mapping[str, TensorInfo], source: str, declared: Declared | None = None) -> Plan:
    """Plan any set of tensors, on disk or in memory. Raises PlanError as ``plan_checkpoint`` does."""
    declared = declared or Declared()
    problems: list[str] = []
    pairs: list[Pair] = []
    unscaled: list[str] = []
    fnuz: list[str] = []
    untouched: list[str] = []
    for name, info in tensors.items():
        if info.dtype not in (FP8, FNUZ):
            continue
        if conventions.is_marker(name, info.shape) or _is_packed_scale(name, tensors):
            untouched.append(name)
        elif info.dtype == FNUZ:
            fnuz.append(name)
        else:
            found = conventions.candidates(name, tensors)
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
                pairs.append(Pair(name, scale, rule.name, _granularity(info, tensors[scale], rule.name, declared)))
    if problems:
        raise PlanError(source, problems)
    weights = {pair.weight for pair in pairs} | set(fnuz) | set(unscaled)
    return Plan(
        source=source,
        tensors=tensors,
        pairs=tuple(pairs),
        unscaled=tuple(unscaled),
        fnuz=tuple(fnuz),
        activation_scales=tuple(_activation_scales(tensors, pairs)),
        untouched_fp8=tuple(untouched),
        unquantized=tuple(_unquantized(tensors)),
        declared=declared,
        warnings=(*declared.remarks, *_disagreements(declared, bool(weights))),
    )


def _granularity(weight: TensorInfo, scale: TensorInfo, convention: str, declared: Declared) -> Granularity:
    return granularity(
        weight.shape,
        scale.shape,
        declared.block,
        e8m0=scale.dtype in (E8M0, "uint8"),
        fused_qkv="qkv" in weight.name,
        maybe_transposed=convention == "fused_scale",
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
    """Is the module's weight FP8? A module without a weight of its own (stacked experts) gets the benefit."""
    there = [name for ending in _WEIGHT_ENDINGS if (name := module + ending) in tensors]
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
