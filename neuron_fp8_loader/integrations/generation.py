"""NxD's fused kernel for experts when tokens are generated: will it find the scales that it reads?

``modules/moe/moe_fused_tkg.py`` reads ``mlp_op.gate_up_proj.scale`` wherever the configuration says ``quantized``, and
views it as [experts, 2, inner]; GLM-5.2's kernel in its place reads the same. A layer of experts that is not quantized
has no scale, which stops a compilation with an AttributeError; scales of blocks may be viewed so, and mean nothing.

Whether a model has that kernel hangs on its class (Qwen3-MoE: the flag, and a rank's share of the intermediate size in
steps of 128; Llama 4 and GLM-5.2: always, and without the flag NxD decides by the batch and by shared experts), so the
built model is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..errors import OptionError
from .flag import EXPERT_WISE, FUSED_KERNEL

_KERNEL = "MoEFusedTKG"


def check_fused_kernel(model: torch.nn.Module, neuron_config: Any, source: str) -> None:
    """Raise OptionError for a model that generates tokens by the kernel without the scales that it takes.

    Args:
        model: built, its layers quantized.
        neuron_config: its own; that for prompts does not run the kernel.
        source: the model's name, for the message.
    """
    if getattr(neuron_config, "is_prefill_stage", None) is not False:
        return
    for path, layer, flag in _read_by_the_kernel(model, int(getattr(neuron_config, "batch_size", 1) or 1)):
        scale, experts = getattr(layer, "scale", None), layer.weight.shape[0]
        what = f"{source}: {FUSED_KERNEL}={flag}: NxD generates tokens by its fused kernel here, "
        if scale is None:
            raise OptionError(
                f"{what}which with quantized=True reads the scales of experts, and {path} is not quantized and has "
                f"none: the compilation would stop. Set {FUSED_KERNEL}=False, or have the experts FP8: "
                "name none of them in modules_to_not_convert, and dequantize none"
            )
        if scale.numel() > 1 and tuple(scale.shape[:-1]) != (experts, 1):
            raise OptionError(
                f"{what}which takes one scale an output row of each expert, and would misread {path}.scale "
                f'{list(scale.shape)}. Set {FUSED_KERNEL}=False, or quantization_type="{EXPERT_WISE}"'
            )


def _read_by_the_kernel(model: torch.nn.Module, batch: int) -> Iterator[tuple[str, Any, bool | None]]:
    """(path, layer, the flag of its kernel)."""
    for path, module in model.named_modules():
        if type(module).__name__ != _KERNEL or not module.config.quantized or not _runs(module, batch):
            continue
        operation: Any = getattr(module.expert_mlps, "mlp_op")  # noqa: B009
        for name in ("gate_up_proj", "down_proj"):
            enabled = getattr(module.config, "moe_fused_kernel_enabled", None)
            yield f"{path}.expert_mlps.mlp_op.{name}", getattr(operation, name), enabled


def _runs(module: Any, batch: int) -> bool:
    """NxD's own answer, for one token of each prompt of a batch on a device; False from a version that has none."""
    try:
        shape = [batch, 1] if module.sequence_dimension == 1 else [1, batch]
        hidden = torch.empty(*shape, module.hidden_size, device="meta")
        return bool(module._can_use_nki_kernel("moe_fused", hidden))
    except (AttributeError, TypeError):
        return False
