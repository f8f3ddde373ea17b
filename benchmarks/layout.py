"""Block scales to one scale a row: the way of the public preprocess scripts, and this package's layout step."""

from __future__ import annotations

from dataclasses import fields

import torch

import neuron_fp8_loader
from neuron_fp8_loader import Options

BLOCK = 128
NEURON_MAX = 240.0


def has_layout() -> bool:
    """Does the installed package have the layout step?"""
    return any(f.name == "layout" for f in fields(Options))


def spread(scale: torch.Tensor, shape: tuple[int, int], block: tuple[int, int] = (BLOCK, BLOCK)) -> torch.Tensor:
    """One scale value per weight: [out, in], from [out/b, in/b], ragged last blocks included."""
    rows = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def public_scripts(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the per-model preprocess scripts do: a float32 copy, dequantized block by block in a Python loop, divided
    by each row's largest value / 240, cast.

    Args:
        weight: float8_e4m3fn [out, in].
        scale: float32 [out/128, in/128].

    Returns:
        float8_e4m3fn [out, in], none above 240, and float32 [out, 1].
    """
    copy = weight.to(torch.float32)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            copy[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] *= scale[i, j].float()
    rows = (copy.abs().amax(dim=1, keepdim=True) / NEURON_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (copy / rows).clamp(-NEURON_MAX, NEURON_MAX).to(torch.float8_e4m3fn), rows


def ours(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by ``layout="per_channel"``. Call only where ``has_layout()``."""
    names = ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight_scale_inv")
    result = neuron_fp8_loader.rescale_state_dict(dict(zip(names, (weight, scale), strict=True)), layout="per_channel")
    (new_weight,) = (t for t in result.values() if t.dtype == torch.float8_e4m3fn)
    (new_scale,) = (
        t for t in result.values() if t.dtype != torch.float8_e4m3fn
    )  # its name may change with its layout
    return new_weight, new_scale


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Signal to quantization noise in dB, float64; inf where they are equal."""
    reference, other = reference.double(), other.double()
    noise = float((reference - other).square().sum())
    return float("inf") if noise == 0 else float(10 * torch.log10(reference.square().sum() / noise))
