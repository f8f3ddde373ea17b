"""What is known of a checkpoint's tensors from its headers: pairs of weight and scale, and all else that is FP8."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from ..checkpoint import TensorInfo
from ..checkpoint.declared import Declared
from ..codes.formats import OTHER_FORMATS
from ..codes.granularity import Granularity
from ..conventions.qkv import Interleaved
from ..errors import printable
from ..host.units import size


class Pair(NamedTuple):
    """One FP8 weight and the scale that makes up for its rescaling.

    Attributes:
        weight, scale: names of the two tensors.
        convention: the name of the rule that says that they belong together.
        granularity: which part of the weight each scale value covers.
        module: the name of the module that the weight belongs to.
        transposed: if the weight stacks experts, it lies as [experts, in, out].
    """

    weight: str
    scale: str
    convention: str
    granularity: Granularity
    module: str = ""
    transposed: bool = False


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
        other_formats: weights of another FP8 dtype (``codes.formats.OTHER_FORMATS``), which have a table of their own
            and need no change of scale.
        other_scales: the scales of those, which stay as they are.
        activation_scales: what ``activation_scales="rescale"`` would multiply.
        untouched_fp8: FP8 tensors that are no weights: scales of NVFP4 weights, markers.
        unquantized: modules whose weight is bf16, fp16 or fp32 and at least two-dimensional.
        declared: what the config files say.
        warnings: where config and tensors disagree.
        interleaved: weights in which queries, keys and values lie interleaved, and how; all that there are, or none.
    """

    source: str
    tensors: Mapping[str, TensorInfo]
    pairs: tuple[Pair, ...] = ()
    unscaled: tuple[str, ...] = ()
    other_formats: tuple[str, ...] = ()
    other_scales: tuple[str, ...] = ()
    activation_scales: tuple[ActivationScale, ...] = ()
    untouched_fp8: tuple[str, ...] = ()
    unquantized: tuple[str, ...] = ()
    declared: Declared = field(default_factory=Declared)
    warnings: tuple[str, ...] = ()
    interleaved: Mapping[str, Interleaved] = field(default_factory=dict)

    @cached_property
    def groups(self) -> tuple[tuple[Pair, ...], ...]:
        """Pairs that must be decided together because they share a scale; mostly groups of one."""
        return tuple(self.by_scale.values())

    @cached_property
    def by_scale(self) -> dict[str, tuple[Pair, ...]]:
        """Scale -> the pairs that it makes up for."""
        found: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            found.setdefault(pair.scale, []).append(pair)
        return {scale: tuple(pairs) for scale, pairs in found.items()}

    @cached_property
    def fp8_weights(self) -> frozenset[str]:
        """Every tensor that is an FP8 weight, with a scale or without."""
        return frozenset((*(pair.weight for pair in self.pairs), *self.unscaled, *self.other_formats))

    @cached_property
    def scale_of(self) -> dict[str, str]:
        return {pair.weight: pair.scale for pair in self.pairs}

    def work_out(self) -> None:
        """Find what follows from the plan now, for all copies that ``called`` makes."""
        self.by_scale  # noqa: B018

    def called(self, source: str) -> Plan:
        """The same plan under another name, for messages."""
        renamed = copy(self)  # with what it has worked out so far
        object.__setattr__(renamed, "source", source)
        return renamed

    def where(self, name: str) -> str:
        """``file: tensor`` for messages, which end up on terminals: ``printable``."""
        info = self.tensors.get(name)
        return printable(f"{info.file if info and info.file else self.source}: {name}")

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
            (self.other_formats, f"weights of {' and '.join(OTHER_FORMATS)}"),
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
            "fnuz": list(self.other_formats),
            "activation_scales": [a.name for a in self.activation_scales],
            "untouched_fp8": list(self.untouched_fp8),
            "unquantized": list(self.unquantized),
            "warnings": list(self.warnings),
        }
