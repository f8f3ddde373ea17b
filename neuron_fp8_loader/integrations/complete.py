"""After a model's conversion: has every FP8 weight its scale and a layer that takes it, and every scale its weight?"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from ..codes.dequantize import dequantize
from ..codes.granularity import granularity
from ..conventions import module_of
from ..errors import WeightError, listing
from .check import is_weight
from .modules import Modules
from .names import short_name

log = logging.getLogger("neuron_fp8_loader")

ENDINGS = (".scale", ".weight_scale", ".weight_scale_inv", "_scale_inv")


def scales_of(state_dict: Mapping[str, Any]) -> dict[str, str]:
    """The scales of FP8 weights in a state dict, by names without the model's prefix, and their weights' modules."""
    found = {}
    for name, value in state_dict.items():
        if is_weight(name, value, state_dict):
            module = module_of(name)
            found.update({short_name(module + e): module for e in ENDINGS if module + e in state_dict})
    return found


def as_their_layers(state_dict: MutableMapping[str, Any], modules: Modules | None, source: str, threads: int) -> None:
    """Make FP8 weights bfloat16 whose layers are not quantized, which the checkpoint's names did not tell.

    NxD would cast their codes and leave their scales.

    Args:
        state_dict: what a model's conversion returned, with the scales where they belong; changed.
        modules: of the model; None where they are not known.
        source: the checkpoint, for messages.
        threads: how many work at once.
    """
    found = []
    names = [] if modules is None else [n for n in state_dict if modules.quantized.get(module_of(n)) is False]
    for name in names:
        module, weight = module_of(name), state_dict[name]
        scale = state_dict.get(f"{module}.scale")
        if isinstance(scale, torch.Tensor) and is_weight(name, weight, state_dict):
            state_dict[name] = dequantize(weight, scale, granularity(tuple(weight.shape), tuple(scale.shape)), threads)
            del state_dict[f"{module}.scale"]
            found.append(module)
    if found:
        log.info("%s: as bfloat16, for NxD does not quantize %s", source, listing("FP8 module", found, 5))


def check_complete(
    state_dict: Mapping[str, Any],
    before: Mapping[str, str],
    source: str,
    *,
    quantized: bool,
    unscaled: Collection[str] = (),
) -> None:
    """Raise WeightError, naming all, for FP8 weights and scales that a model's conversion has torn apart.

    Args:
        state_dict: what the conversion returned.
        before: what ``scales_of`` found in the dict that it was given.
        source: the checkpoint, for the message.
        quantized: does the model have quantized layers? If not, no FP8 weight may be left.
        unscaled: modules, by their possible paths, whose weights never had a scale.
    """
    weights = [n for n, value in state_dict.items() if is_weight(n, value, state_dict)]
    fp8 = {module_of(name) for name in weights}
    if not quantized:
        scaled = [n for n in weights if short_name(module_of(n)) not in unscaled]
        if scaled:
            raise codes_as_values(source, scaled)
        return
    bare = [
        name
        for name in weights
        if not any(module_of(name) + e in state_dict for e in ENDINGS) and short_name(module_of(name)) not in unscaled
    ]
    left = []
    for name in state_dict:
        owner = before.get(short_name(name))
        if owner is not None and not any(name.endswith(e) and name.removesuffix(e) in fp8 for e in ENDINGS):
            left.append(name)
    if not bare and not left:
        return
    parts = []
    if bare:
        parts.append(listing("FP8 weight", bare) + "\n  without a scale")
    if left:
        parts.append(listing("scale", left) + "\n  left behind, without its FP8 weight")
    modules = [before.get(short_name(n), "") for n in left] or [module_of(n) for n in bare]
    raise WeightError(
        f"{source}: the model's conversion keeps FP8 weights and their scales apart.\n" + "\n".join(parts) + "\n"
        "The weights would be used without their scales. Have these modules as bfloat16: "
        f'fp8_rescale={{"dequantize": {_families(modules)}}}, with modules_to_not_convert left out'
    )


def codes_as_values(source: str, names: Sequence[str]) -> WeightError:
    """What to say of FP8 weights, by name, that a model without quantized layers was given."""
    return WeightError(
        f"{source}: quantized=False, but {listing('FP8 weight', names)}\n"
        "Their codes would be used as values, without their scales. Set quantized=True with "
        'quantization_dtype="f8e4m3" and quantized_checkpoints_path, or have all of them as bfloat16: '
        'fp8_rescale={"dequantize": ["*"]}'
    )


def _families(modules: Collection[str]) -> list[str]:
    """Shell patterns for these modules, whatever their layer and expert."""
    found = dict.fromkeys("*" + re.sub(r"\.\d+(?=\.|$)", ".*", "." + short_name(m)) for m in modules)
    experts = {"*.experts.*" if ".experts." in p else p for p in found}
    return sorted(experts)[:8]
