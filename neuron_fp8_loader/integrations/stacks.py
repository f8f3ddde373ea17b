"""Experts lie on disk one by one or stacked, and a model's conversion takes one of the two: given what it takes.

Only weights are brought into the other form here. Scales follow them after the conversion (``experts``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from ..codes.formats import E4M3FN
from ..errors import OptionError
from ..plan import Pair
from .names import short_name


@dataclass(frozen=True)
class Takes:
    """What the conversion of a family of models takes.

    Attributes:
        stacked: ``experts.gate_up_proj`` [experts, in, out] and ``experts.down_proj``, or each expert by itself,
            ``experts.N.gate_proj.weight`` [out, in] and so on?
        gate, up, down: what each expert's projections are called.
        block: the path of NxD's MoE module in a layer where it is not ``mlp``, for models that would make scales of
            experts by themselves. A conversion that takes stacks would quantize or transpose them, and does not miss
            those that it does not see: they are put into that module's names around it.
        flat: does the model have the experts of a layer in three matrices ``experts.mlp.{gate, up, down}``, one expert
            below another, each [out, in] but for ``down``, which is [in, out]?
        count: for such, where the model's configuration says how many experts there are.
        shared: the path of shared experts in a layer, of a model whose conversion makes bfloat16 of all MLPs but the
            experts, so that a list must name them.
        reads: does the application's ``get_state_dict`` read safetensors past NxD Inference's functions, and is it
            otherwise as NxD Inference's own, which is then called instead?
    """

    stacked: bool
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    block: str = ""
    flat: bool = False
    count: str = ""
    shared: str = ""
    reads: bool = False

    def experts(self, config: Any) -> int:
        """How many experts are in a flat matrix; 0 where they are not flat."""
        return int(reduce(getattr, self.count.split("."), config)) if self.flat else 0


FAMILIES = {
    "qwen3_moe": Takes(stacked=False),
    "mixtral": Takes(stacked=False, gate="w1", up="w3", down="w2"),
    "llama4": Takes(stacked=True),
    "dbrx": Takes(stacked=True, gate="w1", up="v1", down="w2", flat=True, count="ffn_config.moe_num_experts"),
    "deepseek": Takes(stacked=False),
    "glm5": Takes(stacked=True, block="feed_forward.moe", shared="shared_expert"),
    "qwen35": Takes(stacked=True, block="mlp.moe"),
    "minimax_m2": Takes(stacked=False, gate="w1", up="w3", down="w2", block="block_sparse_moe", reads=True),
}
"""By a part of the path of the Python module that holds the model. A family that is not here gets its experts as they
lie on disk; to have it served with both forms, add a line."""

_STACK = re.compile(r"^(?P<head>.*\.experts)\.(?P<proj>gate_up_proj|down_proj)(\.weight)?$")
_SINGLE = re.compile(r"^(?P<head>.*\.experts)\.(?P<number>\d+)\.(?P<proj>\w+)\.weight$")
_FLAT = re.compile(r"^(?P<name>.*\.experts\.mlp\.\w+?)(_|\.)weight$")
_BOTH = "Name both gate_up_proj and down_proj of its experts in modules_to_not_convert, or neither. Or else: "
_LAYER = re.compile(r"^(?P<layer>(layers|blocks|h)\.\d+\.)")


def takes(cls: type) -> Takes | None:
    """What the conversion of a model class takes; None where that is not known."""
    for base in cls.__mro__:
        for family, form in FAMILIES.items():
            if family in base.__module__.split(".") or base.__module__.endswith(f"modeling_{family}"):
                return form
    return None


def as_taken(
    state_dict: MutableMapping[str, Any], form: Takes | None, pairs: Mapping[str, Pair]
) -> dict[str, torch.Tensor]:
    """Bring the experts' weights of a state dict into the form that a conversion takes, in place.

    Args:
        state_dict: name -> tensor, of any dtype; split tensors are views.
        form: what is taken; None leaves all as it is.
        pairs: of the checkpoint, by ``short_name`` of the module: they tell how a stack lies. Stacks that were not
            FP8 on disk are left alone.

    Returns:
        what the conversion must not see, under the names of NxD's MoE module: to be added to what it returns.
    """
    if form is None or not pairs:
        return {}
    if form.flat:
        for name in list(state_dict):
            match = _FLAT.match(name)
            if match:
                state_dict[match["name"]] = state_dict.pop(name)
        return {}
    if not form.stacked:
        _split(state_dict, form, pairs)
        return {}
    made = _stack(state_dict, form)
    return _placed(state_dict, form.block, pairs, made) if form.block else {}


def check_alike(state_dict: Mapping[str, Any], form: Takes | None, source: str, *, floats: bool = False) -> None:
    """Raise OptionError where experts are FP8 and others not that are stacked in the dtype of the first, which casts
    the others: codes would become values.

    Args:
        state_dict: name -> tensor, as a conversion will be given it.
        form: what it takes.
        source: the checkpoint, for the message.
        floats: has the model no quantized layers, and reads no scales by itself? Then no experts may differ.
    """
    if form is None and not floats:
        return
    down = form.down if form is not None and form.stacked else None  # stacked by us, and in a tensor of its own
    first: dict[tuple[str, bool], dict[bool, str]] = {}
    for name, value in state_dict.items():
        match = _SINGLE.match(name)
        if match and isinstance(value, torch.Tensor):
            kinds = first.setdefault((match["head"], match["proj"] == down), {})
            kinds.setdefault(value.dtype == E4M3FN, name)
            if len(kinds) == 2:
                listed = "" if down or floats else _BOTH
                raise OptionError(
                    f"{source}: {kinds[True]} is FP8, and {kinds[False]} is not, or not any more; this model stacks "
                    f"the experts of a layer in one dtype. {listed}Have all experts as bfloat16: "
                    'fp8_rescale={"dequantize": ["*.experts.*"]}, with modules_to_not_convert left out'
                )


def only_of(layers: Collection[str], placed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of ``as_taken``'s result is of a layer that the model has, by the names that its conversion returned."""
    there = {match["layer"] for match in map(_LAYER.match, layers) if match}
    return {name: t for name, t in placed.items() if any(name.startswith(layer) for layer in there)}


def _placed(
    state_dict: MutableMapping[str, Any], block: str, pairs: Mapping[str, Pair], made: Collection[str]
) -> dict[str, torch.Tensor]:
    """Take the stacks out, [experts, in, out], and their scales away, which ``experts.Part`` has.

    Stacks that were stacks on disk, and not FP8, are the conversion's.
    """
    found, heads = {}, set()
    for name in list(state_dict):
        match, layer = _STACK.match(name), _LAYER.match(short_name(name))
        if match is None or layer is None:
            continue
        pair = pairs.get(short_name(name.removesuffix(".weight")))
        if pair is None and name not in made:
            continue
        stack = state_dict.pop(name)
        heads.add(match["head"])
        lying = stack if pair is None or pair.transposed else stack.transpose(1, 2).contiguous()
        found[f"{layer['layer']}{block}.expert_mlps.mlp_op.{match['proj']}.weight"] = lying
    for name in [n for n in state_dict if n.endswith(".scale") and ".experts." in n]:
        if name.rpartition(".experts.")[0] + ".experts" in heads:
            del state_dict[name]
    return found


def _split(state_dict: MutableMapping[str, Any], form: Takes, pairs: Mapping[str, Pair]) -> None:
    for name in list(state_dict):
        match, value = _STACK.match(name), state_dict[name]
        pair = pairs.get(short_name(name.removesuffix(".weight")))
        if match is None or pair is None or not isinstance(value, torch.Tensor) or value.dim() != 3:
            continue
        del state_dict[name]
        for expert, lying in enumerate(value):
            matrix = lying.T if pair.transposed else lying  # [out, in]
            place = f"{match['head']}.{expert}"
            if match["proj"] == "down_proj":
                state_dict[f"{place}.{form.down}.weight"] = matrix
            else:
                half = matrix.shape[0] // 2
                state_dict[f"{place}.{form.gate}.weight"] = matrix[:half]
                state_dict[f"{place}.{form.up}.weight"] = matrix[half:]


def _stack(state_dict: MutableMapping[str, Any], form: Takes) -> set[str]:
    """Returns the names of the stacks made."""
    made = set()
    layers: dict[str, dict[int, dict[str, str]]] = {}
    for name in state_dict:
        match = _SINGLE.match(name)
        if match:
            layers.setdefault(match["head"], {}).setdefault(int(match["number"]), {})[match["proj"]] = name
    for head, experts in layers.items():
        numbers = range(len(experts))
        if any({form.gate, form.up, form.down} - experts.get(n, {}).keys() for n in numbers):
            continue  # not all of them are there: the conversion will say what it misses
        gate, up, down = ([state_dict[experts[n][p]] for n in numbers] for p in (form.gate, form.up, form.down))
        (inter, hidden), experts_count = gate[0].shape, len(experts)
        fused = torch.empty(experts_count, hidden, 2 * inter, dtype=gate[0].dtype)
        downs = torch.empty(experts_count, inter, hidden, dtype=down[0].dtype)
        for n in numbers:
            fused[n, :, :inter], fused[n, :, inter:], downs[n] = gate[n].T, up[n].T, down[n].T
            for p in (form.gate, form.up, form.down):
                del state_dict[experts[n][p]]
        for name, stack in ((f"{head}.gate_up_proj", fused), (f"{head}.down_proj", downs)):
            state_dict[name] = stack
            made.add(name)
    return made
