"""The names under which NxD's quantized layers look for weights and scales: ``X.weight`` and ``X.scale``."""

from __future__ import annotations

import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import PlanError
from ..plan import Plan


def nxd_names(plan: Plan) -> dict[str, str]:
    """Old name -> new name of what NxD would not find. ``X.weight_scale`` is renamed by NxD Inference itself."""
    names = {}
    for pair in plan.pairs:
        module = pair.module
        if pair.weight != module:
            names[pair.weight] = f"{module}.weight"
        if pair.scale != f"{module}.weight_scale":
            names[pair.scale] = f"{module}.scale"
    return {old: new for old, new in names.items() if old != new}


def renamed(state_dict: Mapping[str, Any], names: Mapping[str, str], source: str) -> dict[str, Any]:
    """``state_dict`` with new names, in the same order. Names not in it (scales of dequantized weights) do not matter.

    Raises:
        PlanError: a new name is taken.
    """
    taken = [
        f"{old}: NxD Inference looks for it under {new}, which the checkpoint has, too"
        for old, new in names.items()
        if old in state_dict and new in state_dict and new not in names
    ]
    there = Counter(names[name] for name in state_dict if name in names)
    taken += [f"{new}: two tensors would get this name" for new in sorted(there) if there[new] > 1]
    if taken:
        raise PlanError(source, taken)
    return {names.get(name, name): value for name, value in state_dict.items()}


def reads_scale_inv(cls: type) -> bool:
    """Does a model class read ``weight_scale_inv`` by itself?

    qwen3_moe dequantizes block-scaled weights in its conversion, and so do classes of others; their modules speak of
    the name, which nothing else in NxD Inference does.
    """
    return any("_scale_inv" in source for source in _sources(cls))


def quantizes_itself(cls: type) -> bool:
    """Does a model class read ``weight_scale_inv`` and make the scales of its quantized layers from it (GLM-5.2)?

    The others dequantize everything, and have nothing for quantized layers.
    """
    return any("_scale_inv" in source and _MADE.search(source) for source in _sources(cls))


_MADE = re.compile(r"\.(gate_up_proj|down_proj)\.scale[\"']")


def _sources(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        module = sys.modules.get(base.__module__)
        try:
            if module is not None:
                yield inspect.getsource(module)
        except (OSError, TypeError):  # no source: a builtin, or a class made in a session
            continue
