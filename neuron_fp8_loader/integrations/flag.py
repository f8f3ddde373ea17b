"""``fp8_rescale``, the flag on NeuronConfig: what it may be, and what it asks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from ..codes.device import needs_rescale, platform
from ..codes.formats import METHODS
from ..errors import OptionError
from ..options import Options
from ..plan import Plan

log = logging.getLogger("neuron_fp8_loader")

FLAG = "fp8_rescale"

EXPERT_WISE, BLOCKWISE = "expert_wise_per_channel_symmetric", "blockwise_symmetric"
"""The types that only fused experts take."""

FUSED_KERNEL = "moe_fused_nki_kernel_enabled"
"""NxD's option for its fused kernel, which takes one scale an output row of each expert."""

LAYOUTS = {
    "per_tensor_symmetric": "per_tensor",
    "per_channel_symmetric": "per_channel",
    "expert_wise_per_channel_symmetric": "per_channel",
}
"""``quantization_type`` -> the layout that its layers take, without blocks."""


def parse(value: Any) -> dict[str, Any] | None:
    """The options that a value of the flag stands for; None where it is off.

    Args:
        value: True (``"half"``), ``"half"``, ``"ratio"``, a dict of options; False or None for off.

    Raises:
        OptionError: anything else.
    """
    if value is None or value is False:
        return None
    if value is True:
        return {}
    if isinstance(value, str) and value in METHODS:
        return {"method": value}
    if not isinstance(value, Mapping):
        raise OptionError(
            f"{FLAG}={value!r}: expected True, False, {', '.join(map(repr, METHODS))} or a dict of options"
        )
    try:
        Options.of(value)
    except (OptionError, TypeError) as error:
        raise OptionError(f"{FLAG}={dict(value)!r}: {error}") from error
    if value.get("experts") == "fused":
        raise OptionError(
            f'{FLAG}={dict(value)!r}: experts="fused" is for apps of one\'s own; a model of NxD Inference stacks its '
            "experts itself, and their scales follow. Leave it out"
        )
    return dict(value)


def acts() -> bool:
    """Is there anything to rescale for on this platform? Logs where there is not."""
    target = platform()
    if needs_rescale(target):
        return True
    log.warning("%s does nothing on %s, which reads float8_e4m3fn up to 448 as it is", FLAG, target)
    return False


def options_for(neuron_config: Any) -> dict[str, Any] | None:
    """What the flag on a NeuronConfig asks for on this platform; None where nothing is to be done.

    Raises:
        OptionError: the flag was set, after construction, to what it cannot be.
    """
    options = parse(getattr(neuron_config, FLAG, None))
    if options is None or not acts():
        return None
    return {"layout": layout_for(neuron_config), **options}


def layout_for(neuron_config: Any) -> str:
    """The layout that brings scales into the shape which the layers of this ``quantization_type`` take."""
    if not getattr(neuron_config, "quantized", False):
        return "keep"
    if experts_apart(neuron_config):
        return "per_channel"
    return LAYOUTS.get(quantization_type(neuron_config), "keep")


def quantization_type(neuron_config: Any) -> str:
    """NeuronConfig's ``quantization_type``, be it a string or a member of NxD's enumeration."""
    given = getattr(neuron_config, "quantization_type", "")
    return str(getattr(given, "value", given))


def experts_apart(neuron_config: Any) -> bool:
    """Is the type one that only fused experts take, so that all other layers get one scale an output row?

    Both the compilation and the load ask here. Blocks along a third axis have no meaning for a weight of two.
    """
    kind = quantization_type(neuron_config)
    axes = getattr(neuron_config, "quantization_block_axis", None) or ()
    return kind == EXPERT_WISE or (kind == BLOCKWISE and any(axis > 1 for axis in axes))


def dequantized(plan: Plan, options: Mapping[str, Any]) -> set[str]:
    """The FP8 weights of a checkpoint that these options have returned as bfloat16."""
    chosen = Options.of(options)
    names = set(plan.unscaled) if chosen.unscaled == "dequantize" else set()
    return names | {p.weight for p in plan.pairs if any(fnmatchcase(p.module, d) for d in chosen.dequantize)}
