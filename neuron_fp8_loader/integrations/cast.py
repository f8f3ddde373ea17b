"""Did a model's conversion cast FP8 weights? Then codes are values, and no FP8 weight is left that would tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..codes.formats import E4M3FN
from ..conventions import module_of
from ..errors import WeightError, listing
from .check import is_weight
from .complete import ENDINGS
from .experts import layer_of

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_LOOKED_AT = 32  # elements along each axis
_LEAST = 16.0  # what is no weight's value, and many a code's


@dataclass(frozen=True)
class Elements:
    """How many elements of FP8 weights with a scale a conversion is given, by the number of the layer."""

    given: Mapping[str, int]

    @classmethod
    def of(cls, state_dict: Mapping[str, Any]) -> Elements:
        given: Counter[str] = Counter()
        for name, value in state_dict.items():
            if is_weight(name, value, state_dict) and any(module_of(name) + end in state_dict for end in ENDINGS):
                given[layer_of(name)] += value.numel()
        return cls(given)

    def check(self, converted: Mapping[str, Any], source: str) -> None:
        """Raise WeightError, naming them, for floats that are codes, in layers that have fewer FP8 elements now.

        Weights that were multiplied by their scales are none: a product that an FP8 number holds exactly is rare, and
        hundreds in a row, as large as codes are, do not come by chance.
        """
        left: Counter[str] = Counter()
        for name, value in converted.items():
            if isinstance(value, torch.Tensor) and value.dtype == E4M3FN:
                left[layer_of(name)] += value.numel()
        fewer = {layer for layer, count in self.given.items() if left[layer] < count}
        cast = [name for name, value in converted.items() if layer_of(name) in fewer and _are_codes(value)]
        if cast:
            raise WeightError(
                f"{source}: the model's conversion cast FP8 weights, {listing('weight', cast)}\n"
                "Their codes would be used as values, without their scales. Have what they were made of as bfloat16: "
                'fp8_rescale={"dequantize": [...]}, or ["*"] for all, with modules_to_not_convert left out'
            )


def _are_codes(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype not in _FLOATS or value.dim() < 2 or value.is_meta:
        return False
    chosen = [torch.linspace(0, size - 1, min(size, _LOOKED_AT), device="cpu").round().long() for size in value.shape]
    seen = value[torch.meshgrid(chosen, indexing="ij")].float()  # at once: a stack's first axis alone is the stack
    return bool((seen.abs() >= _LEAST).any()) and torch.equal(seen.to(E4M3FN).float(), seen)
