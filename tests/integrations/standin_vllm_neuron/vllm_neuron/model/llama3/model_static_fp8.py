"""Static FP8 layers: float8 weights, [128, n] float32 scales in buffers, 240/448 on trn2."""

import torch
from libtorch_neuronx_lite.compile.platform import get_platform_target
from torch import nn

from vllm_neuron.utils.weight_loader import SafetensorsWeightLoader, get_weight_loader, set_weight_loader

from . import model as bf16

_FP8 = torch.float8_e4m3fn


def _needs_downscale():
    return get_platform_target() == "trn2"


def _downscaled(loader):
    if not _needs_downscale():
        return loader

    def transform(slices, rank):
        return (loader.load(slices, rank).float() * (240 / 448)).clamp(-240, 240).to(_FP8)

    return SafetensorsWeightLoader(transform)


def _scalar(lazy):
    value = (lazy[()] if len(lazy.get_shape()) == 0 else lazy[:]).float().reshape(-1)
    assert value.numel() == 1
    return value


def _scale_loader(is_weight):
    def transform(slices, rank):
        factor = 448 / 240 if is_weight and _needs_downscale() else 1.0
        return torch.stack([_scalar(s) * factor for s in slices]).reshape(1, -1).expand(128, len(slices))

    return SafetensorsWeightLoader(transform)


def _qkv_input_scale_loader():
    def transform(slices, rank):
        scales = [_scalar(s) for s in slices]
        assert all(torch.equal(scales[0], other) for other in scales[1:]), "identical input_scale across Q/K/V"
        return scales[0].expand(128, 1)

    return SafetensorsWeightLoader(transform)


def _to_fp8(layer, weights, scales):
    for name in weights:
        before = getattr(layer, name)
        after = nn.Parameter(torch.empty(before.shape, dtype=_FP8), requires_grad=False)
        set_weight_loader(after, _downscaled(get_weight_loader(before)))
        setattr(layer, name, after)
    for name, (columns, loader) in scales.items():
        buffer = torch.empty(128, columns)
        buffer.weight_loader = loader
        layer.register_buffer(name, buffer, persistent=False)


class LlamaAttention(bf16.LlamaAttention):
    def __init__(self, config):
        super().__init__(config)
        scales = {
            "qkv_weight_scale": (3, _scale_loader(True)),
            "qkv_input_scale": (1, _qkv_input_scale_loader()),
            "o_weight_scale": (1, _scale_loader(True)),
            "o_input_scale": (1, _scale_loader(False)),
        }
        _to_fp8(self, ("qkv_proj_weight", "o_proj_weight"), scales)


class LlamaMLP(bf16.LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        weights = ("gate_proj_weight", "up_proj_weight", "down_proj_weight")
        scales = {f"{m}_weight_scale": (1, _scale_loader(True)) for m in ("gate", "up", "down")}
        scales |= {f"{m}_input_scale": (1, _scale_loader(False)) for m in ("gate_up", "down")}
        _to_fp8(self, weights, scales)
