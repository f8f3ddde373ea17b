"""Experts lie on disk one by one or stacked, and a model's conversion takes one of the two: given what it takes.

Only weights are brought into the other form here. Scales follow them after the conversion (``experts``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from ..plan import Pair
from .names import short_name


@dataclass(frozen=True)
class Takes:
    """What the conversion of a family of models takes.

    Attributes:
        stacked: ``experts.gate_up_proj`` [experts, in, out] and ``experts.down_proj``, or each expert by itself,
            ``experts.N.gate_proj.weight`` [out, in] and so on?
        gate, up, down: what each expert's projections are called.
    """

    stacked: bool
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


FAMILIES = {
    "qwen3_moe": Takes(stacked=False),
    "mixtral": Takes(stacked=False, gate="w1", up="w3", down="w2"),
    "llama4": Takes(stacked=True),
}
"""By a part of the path of the Python module that holds the model. A family that is not here gets its experts as they
lie on disk; to have it served with both forms, add a line."""

_STACK = re.compile(r"^(?P<head>.*\.experts)\.(?P<proj>gate_up_proj|down_proj)(\.weight)?$")
_SINGLE = re.compile(r"^(?P<head>.*\.experts)\.(?P<number>\d+)\.(?P<proj>\w+)\.weight$")


def takes(cls: type) -> Takes | None:
    """What the conversion of a model class takes; None where that is not known."""
    for base in cls.__mro__:
        for family, form in FAMILIES.items():
            if family in base.__module__.split(".") or base.__module__.endswith(f"modeling_{family}"):
                return form
    return None


def as_taken(state_dict: MutableMapping[str, Any], form: Takes | None, pairs: Mapping[str, Pair]) -> None:
    """Bring the experts' weights of a state dict into the form that a conversion takes, in place.

    Args:
        state_dict: name -> tensor, of any dtype; split tensors are views.
        form: what is taken; None leaves all as it is.
        pairs: of the checkpoint, by ``short_name`` of the module: they tell how a stack lies. Stacks that were not
            FP8 on disk are left alone.
    """
    if form is None:
        return
    if form.stacked:
        _stack(state_dict, form)
    else:
        _split(state_dict, form, pairs)


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


def _stack(state_dict: MutableMapping[str, Any], form: Takes) -> None:
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
        downs = torch.empty(experts_count, inter, hidden, dtype=gate[0].dtype)
        for n in numbers:
            fused[n, :, :inter], fused[n, :, inter:], downs[n] = gate[n].T, up[n].T, down[n].T
            for p in (form.gate, form.up, form.down):
                del state_dict[experts[n][p]]
        state_dict[f"{head}.gate_up_proj"], state_dict[f"{head}.down_proj"] = fused, downs
