"""Scales of layers that are no experts, where a model's conversion leaves them behind: they follow their rows.

A conversion that renames a weight, fuses queries, keys and values, or cuts a projection in two often forgets the
scale beside it. An output row keeps its scale wherever it goes, so rows are told by their bytes:

- a weight without a scale gets the scale of each row; a row that two scales could belong to is refused;
- where a scale stayed beside a weight, each row that is known must have its own;
- a weight that the conversion wrote into is not what it was: what may be a row of it is refused;
- a weight beside which another's scales of blocks are, or its own though it was changed, is refused.

Rows of zeros take any scale. Of rows that are in no weight of the layer (columns padded or reordered, weights that the
model quantized anew) nothing is claimed: with a scale they pass, without one ``check_complete`` names them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..conventions import module_of
from ..errors import WeightError, listing
from .check import is_weight
from .experts import is_expert, layer_of
from .layer_rows import Given, LayerRows, fits
from .names import short_name

log = logging.getLogger("neuron_fp8_loader")


@dataclass
class Rows:
    """The FP8 weights that a conversion is given, with their scales.

    Attributes:
        layers: by the number of the layer, those that have one scale or one a row.
        blocks: likewise, those that have one for each block.
    """

    layers: dict[str, list[Given]] = field(default_factory=dict)
    blocks: dict[str, list[Given]] = field(default_factory=dict)

    @classmethod
    def of(cls, state_dict: Mapping[str, Any]) -> Rows:
        """Those that have a scale ``X.scale``, and are of no expert."""
        found = cls()
        for name, weight in state_dict.items():
            module = module_of(name)
            scale = state_dict.get(f"{module}.scale")
            if not isinstance(scale, torch.Tensor) or is_expert(name) or not is_weight(name, weight, state_dict):
                continue
            if weight.dim() != 2 or not weight.numel():
                continue
            if fits(scale, weight):
                found.layers.setdefault(layer_of(name), []).append(Given.of(module, weight, scale))
            elif scale.dim() == 2 and scale.shape != (1, weight.shape[1]):  # rows may be moved below one a column
                found.blocks.setdefault(layer_of(name), []).append(Given.of(module, weight, scale))
        return found

    def attach(self, converted: MutableMapping[str, Any], source: str) -> None:
        """Give every FP8 weight [out, in] that has lost its scale the scales of its rows, and take the old ones away.

        Weights of which no row is known are left for ``check_complete`` to name.

        Args:
            converted: what a model's conversion returned; changed.
            source: the checkpoint, for messages.

        Raises:
            WeightError: a row may have come from two weights with different scales, or some rows of a weight are
                known and others are not, or the conversion wrote into a weight, or moved rows and not their scales.
        """
        weights: dict[str, list[str]] = {}
        for name, weight in converted.items():
            if not is_expert(name) and is_weight(name, weight, converted) and weight.dim() == 2 and weight.numel():
                weights.setdefault(layer_of(name), []).append(name)
        problems: list[str] = []
        moved: list[str] = []
        for number, names in weights.items():
            layer = LayerRows(self.layers.get(number, []))
            for name in names:
                weight, place = converted[name], f"{module_of(name)}.scale"
                try:
                    if place in converted:
                        layer.check(name, weight, converted[place])
                        self._check_blocks(number, weight, converted[place])
                        continue
                    scale = layer.scale(weight)
                except ValueError as error:
                    problems.append(f"{name} {list(weight.shape)}: {error}")
                    continue
                if scale is not None:
                    converted[place] = scale
            moved += layer.moved()
        if problems:
            raise WeightError(
                f"{source}: the model's conversion did something to FP8 weights that is not understood, "
                f"{listing('problem', problems, 8)}\n"
                "Expected were weights of which each row is a row of one weight of the same layer, or zeros. "
                'Have these as bfloat16 with fp8_rescale={"dequantize": [...]} and modules_to_not_convert left out'
            )
        owners = {short_name(module) for module in moved}
        for name in [n for n in converted if n.endswith(".scale")]:
            module = name.removesuffix(".scale")
            if f"{module}.weight" not in converted and short_name(module) in owners:
                del converted[name]
        if moved:
            log.info("%s: scales follow rows of %s", source, listing("weight", sorted(moved), 5))

    def _check_blocks(self, number: str, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Raise ValueError where the scales of a weight's blocks are beside what that weight is not, or no longer."""
        values = scale.float().flatten()
        if bool((values == values[:1]).all()):
            return  # in whatever order
        owners = [given for given in self.blocks.get(number, ()) if torch.equal(given.values, values)]
        if owners and not any(given.is_within(weight) for given in owners):
            raise ValueError(f"has the scales of the blocks of {owners[0].module}, and is not what that weight was")
