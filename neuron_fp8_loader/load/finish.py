"""The last step of every driver: the tensors as they come out, under their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..plan import Recipe, Step


def finished(
    recipe: Recipe, tensors: Mapping[str, Any], made: Mapping[str, torch.Tensor], fused: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """The tensors as they come out, under their names; ``made`` takes the place of what was there, a fused tensor that
    of the first tensor that went into it."""
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        step = recipe.steps.get(name)
        if step is None:  # no tensor
            out[name] = tensor
        elif step.place is not None:
            out[step.out] = fused[step.out]
        elif step.action != "drop":
            out[step.out] = as_codes(step, made.get(name, tensor))
    return out


def as_codes(step: Step, tensor: torch.Tensor) -> torch.Tensor:
    """A weight of another FP8 dtype, translated where it lay, gets the dtype of its new codes."""
    if step.action == "translate" and str(tensor.dtype) != f"torch.{step.dtype}":
        return tensor.view(torch.float8_e4m3fn)
    return tensor
