"""The scales of fused experts in the shapes that NxD's fused layers have for them.

    expert_wise_per_channel_symmetric   [experts, 1, out]
    blockwise_symmetric                 [experts, in / block, out / block]
    per_channel_symmetric               [1, 1, out], one for all experts: their weights are requantized
    per_tensor_symmetric                [1]

Read in ``neuronx_distributed/quantization/quantization_layers.py`` (``_setup_for_scale``), Neuron SDK 2.29.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from ..codes.requantize import Fidelity, requantize, tiles
from ..errors import OptionError, ScaleError, printable
from ..host.parallel import run
from .experts import Part
from .flag import BLOCKWISE, quantization_type
from .modules import Modules
from .names import short_name
from .quantizing import ANY_SIZE
from .stacked import Placed, find

log = logging.getLogger("neuron_fp8_loader")


@dataclass(frozen=True)
class Form:
    """What the fused layers of a model take.

    Attributes:
        kind: NxD's quantization type.
        block: (in, out) of a block by the configuration, for the blockwise type.
        modules: of the built model, whose own shapes count before the configuration's; None where it is not known.
    """

    kind: str
    block: tuple[int, int] = (0, 0)
    modules: Modules | None = None

    @classmethod
    def of(cls, neuron_config: Any, modules: Modules | None) -> Form:
        """What a configuration and the model built by it ask for."""
        kind = quantization_type(neuron_config)
        if kind != BLOCKWISE:
            return cls(kind, modules=modules)
        sizes = dict(zip(neuron_config.quantization_block_axis, neuron_config.quantization_block_size, strict=True))
        by_axis = {axis % 3: size for axis, size in sizes.items()}
        return cls(kind, (by_axis.get(1, 1), by_axis.get(2, 1)), modules)

    def block_of(self, name: str) -> tuple[int, int]:
        """(in, out) of a block of one weight: of a rank's share of it, if the model is known."""
        shapes = self.modules.shapes.get(name.removesuffix(".weight")) if self.modules else None
        if shapes is None:
            return self.block
        weight, scale = shapes
        return weight[1] // scale[1], weight[2] // scale[2]


def attach_scales(
    converted: MutableMapping[str, Any], parts: list[Part], form: Form, source: str, threads: int
) -> None:
    """Give every stack of experts its scales, under the name that its layer looks for, and take the old ones away.

    Args:
        converted: what a model's conversion returned; changed.
        parts: of what it was given.
        form: what the layers take.
        source: the checkpoint, for messages.
        threads: how many work at once.

    Raises:
        WeightError: see ``stacked.find``.
        OptionError: the quantization type cannot hold these scales without a loss that nobody asked for.
        ScaleError: a scale is not finite, or not above 0 where it must be.
    """
    found = find(parts, converted, source)
    old = {short_name(part.scale_name) for stack in found for _, _, part in stack.places}
    for name in [name for name in converted if short_name(name) in old]:  # some conversions rename scales too
        del converted[name]
    cost = Fidelity()
    for stack in found:
        try:
            scale, lost = _scale(stack, form, threads)
        except ValueError as error:
            raise OptionError(f"{source}: {stack.name}: {error}. {_advice(form.kind)}") from error
        if not bool(torch.isfinite(scale).all()):
            raise ScaleError(f"{source}: {stack.name}: its experts have scales that are not finite")
        converted[stack.name.removesuffix("weight") + "scale"] = scale
        cost += lost
    if found:
        more = "" if cost.signal == 0 else f"; one scale for all experts cost {cost.sqnr:.1f} dB"
        log.info("%s: scales of %d stacks of experts, %s%s", printable(source), len(found), form.kind, more)


def _advice(kind: str) -> str:
    if kind == "expert_wise_per_channel_symmetric":
        return (
            "This type has one scale an output row of an expert. Have the experts as bfloat16: "
            'fp8_rescale={"dequantize": ["*.experts.*"]}, with modules_to_not_convert left out'
        )
    return f"Set {ANY_SIZE}, or, where that is not exact, rounds once more"


def _scale(stack: Placed, form: Form, threads: int) -> tuple[torch.Tensor, Fidelity]:
    if form.kind == BLOCKWISE:
        return _blocks(stack, form.block_of(stack.name)), Fidelity()
    if form.kind == "per_tensor_symmetric":
        values = torch.cat([part.values.flatten() for _, _, part in stack.places]).unique()
        if len(values) > 1:
            raise ValueError(f"its experts have {len(values)} different scales, its layer takes one for all")
        return values, Fidelity()
    scale = _rows(stack)
    return _common(stack.tensor, scale, threads) if form.kind == "per_channel_symmetric" else (scale, Fidelity())


def _rows(stack: Placed) -> torch.Tensor:
    """float32 [experts, 1, out]; 1 for columns that are padding."""
    experts, _, columns = stack.tensor.shape
    scale = torch.ones(experts, 1, columns)
    for place, first, part in stack.places:
        out, inner = part.shape
        scale[place, 0, first : first + out] = part.scale((1, inner))[:, 0]
    return scale


def _blocks(stack: Placed, block: tuple[int, int]) -> torch.Tensor:
    """float32 [experts, in blocks, out blocks]; 1 for blocks that are padding."""
    experts, rows, columns = stack.tensor.shape
    down, across = block
    if rows % down or columns % across:
        raise ValueError(f"its shape {[experts, rows, columns]} is not made of whole blocks of {down} x {across}")
    scale = torch.ones(experts, rows // down, columns // across)
    for place, first, part in stack.places:
        if first % across:
            raise ValueError(f"{part.name} begins at column {first}, within a block of {across}")
        grid = part.scale((across, down)).T
        top, left = 0, first // across
        scale[place, top : top + grid.shape[0], left : left + grid.shape[1]] = grid
    return scale


def _common(weight: torch.Tensor, scale: torch.Tensor, threads: int) -> tuple[torch.Tensor, Fidelity]:
    """One scale a column for all experts: float32 [1, 1, out]; rewrites the codes of ``weight``."""
    experts, rows, columns = weight.shape
    if bool((scale < 0).any()):
        raise ValueError("has negative scales")
    codes = weight.view(torch.uint8).permute(2, 0, 1).reshape(columns, experts * rows).contiguous()
    common = torch.empty(columns)
    each = scale[:, 0].T.double().contiguous()
    costs: list[Fidelity] = []
    parts = tiles(codes, codes, each, common, (1, rows))
    run(parts, lambda tile: costs.append(requantize(tile)), threads)
    weight.view(torch.uint8).copy_(codes.view(columns, experts, rows).permute(1, 2, 0))
    return common.reshape(1, 1, -1), sum(costs, Fidelity())
