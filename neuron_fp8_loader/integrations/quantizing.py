"""NxD quantizes all layers of a model alike. Under the flag, experts and the others may differ.

``quantization.quantize.convert`` swaps each float layer by ``quantized_class.from_float(layer, q_config)``. It is
handed classes that choose the configuration by the layer: what the user asked for goes to fused experts, whose
weights have three dimensions; the others get one scale an output row.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import OptionError
from .flag import BLOCKWISE, EXPERT_WISE, experts_apart, options_for

log = logging.getLogger("neuron_fp8_loader")

PER_EXPERT = (BLOCKWISE, EXPERT_WISE)
"""The types by which every expert has scales of its own."""

_LEAST = 16
"""The smallest side of a block: below it the scales take more than a tenth of the memory that FP8 saves."""

ANY_SIZE = f'quantization_type="{EXPERT_WISE}", which takes any size'


def convert(original: Callable[..., Any], module: Any, q_config: Any = None, *args: Any, **kwargs: Any) -> Any:
    """``convert``, by the name that NxD Inference's model_wrapper has for it."""
    neuron_config = getattr(getattr(module, "config", None), "neuron_config", None)
    if q_config is None or args or options_for(neuron_config) is None:
        return original(module, q_config, *args, **kwargs)
    mapping = kwargs.pop("mapping", None)
    if mapping is None:
        known: Any = sys.modules["neuronx_distributed.quantization.quantization_mappings"]
        mapping = known.get_default_quant_module_mappings()
    apart = experts_apart(neuron_config)
    chosen = {kind: _ByLayer(quantized, apart) for kind, quantized in mapping.items()}
    return original(module, q_config, mapping=chosen, **kwargs)


class _ByLayer:
    """In the place of a quantized class; ``apart``: do experts and the others differ?"""

    def __init__(self, quantized: Any, apart: bool) -> None:
        self.quantized, self.apart = quantized, apart

    def from_float(self, mod: Any, q_config: Mapping[str, Any]) -> Any:
        fused = mod.weight.dim() == 3
        if self.apart and not fused:
            q_config = per_channel(q_config)
        elif self.apart and _kind(q_config) == BLOCKWISE:
            q_config = {**q_config, "block_size": block_size(mod, q_config)}
        layer = self.quantized.from_float(mod=mod, q_config=q_config)
        if fused and isinstance(getattr(layer, "scale", None), torch.Tensor):
            _shared_out_alike(layer.weight, layer.scale, _kind(q_config) in PER_EXPERT)
        return layer


def _shared_out_alike(weight: Any, scale: Any, per_expert: bool) -> None:
    """Have NxD share the scales of fused experts out among ranks as it shares out their weights.

    Experts: NxD marks all parameters to be split by them, one scale for all experts too, which cannot be; ports that
    mend this go by its first dimension, and miss the scale of a rank that has one expert.

    Gate and up are split each by itself: ports set the scale's stride to 1, for shares less than a block, which gives
    a rank the scales of another's weights.
    """
    for mark in ("expert_model_parallel", "is_prefill", "expert_distribution"):
        if per_expert and hasattr(weight, mark):
            setattr(scale, mark, getattr(weight, mark))
    if not per_expert and hasattr(scale, "expert_model_parallel"):
        del scale.expert_model_parallel
    if getattr(scale, "tensor_model_parallel", False) and hasattr(weight, "partition_stride"):
        scale.partition_stride = weight.partition_stride


def _kind(q_config: Mapping[str, Any]) -> str:
    return str(getattr(q_config["quantization_type"], "value", q_config["quantization_type"]))


def per_channel(q_config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with one scale an output row instead, on the axis that each layer has for it."""
    kept = {k: v for k, v in q_config.items() if k not in ("block_axis", "block_size", "scale_dtype")}
    kind = type(q_config["quantization_type"])("per_channel_symmetric")
    return {**kept, "quantization_type": kind, "quantization_per_channel_axis": None}


def block_size(mod: Any, q_config: Mapping[str, Any]) -> list[int]:
    """The block sizes for a fused layer: smaller ones where a rank's share is not made of whole blocks.

    A block that two ranks share, or that an axis cuts short, becomes several with the same scale: nothing is lost.

    Raises:
        OptionError: the pieces would be too small; the text names another quantization type.
    """
    rows = mod.input_size_per_partition if hasattr(mod, "input_size_per_partition") else mod.input_size
    columns = getattr(mod, "output_size_per_partition", mod.output_size) // (mod.stride or 1)
    share = {1: rows, 2: columns}
    sizes = []
    for axis, size in zip(q_config["block_axis"], q_config["block_size"], strict=True):
        fits = math.gcd(size, share[axis % 3]) if axis % 3 in share else size
        if fits < min(size, _LEAST):
            raise OptionError(
                f"quantization_block_size={q_config['block_size']}: a rank has {share[axis % 3]} rows or columns of "
                f"an expert ({type(mod).__name__}), which blocks of {fits} would have to cover. Set {ANY_SIZE}; "
                "or another tp_degree or moe_tp_degree"
            )
        sizes.append(fits)
    if sizes != list(q_config["block_size"]):
        log.info(
            "%s: blocks of %s instead of %s, for a rank has %s",
            type(mod).__name__,
            sizes,
            q_config["block_size"],
            share,
        )
    return sizes
