"""A conversion that casts FP8 weights leaves codes where values should be, and no FP8 weight that would tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_fp8_loader import WeightError
from neuron_fp8_loader.integrations.cast import Elements
from tests.integrations.checkpoints import write
from tests.integrations.conftest import Standin
from tests.integrations.test_experts import EXPERTS, LAYERS, checkpoint
from tests.integrations.test_experts import load as load_by
from tests.support import random_codes

FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]
Convert = Callable[[Tensors, torch.dtype], Tensors]
AT = "layers.0.self_attn"


def _cast(state: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: t.to(dtype) if t.dtype == FP8 else t for name, t in state.items()}


def _without_scales(state: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: t for name, t in _cast(state, dtype).items() if "scale" not in name}


def _renamed_with_scales(state: Tensors, dtype: torch.dtype) -> Tensors:
    return {name.replace("proj", "projection"): t for name, t in _cast(state, dtype).items()}


def _fused_and_transposed(state: Tensors, dtype: torch.dtype) -> Tensors:
    whole = torch.empty(96, 128, dtype=dtype)
    for n, name in enumerate(("q_proj", "k_proj", "v_proj")):
        whole[32 * n : 32 * (n + 1)] = state.pop(f"{AT}.{name}.weight")
        del state[f"{AT}.{name}.scale"]
    return {**state, f"{AT}.Wqkv.weight": whole.t()}


def _stacked(state: Tensors, dtype: torch.dtype) -> Tensors:
    both = torch.empty(1, 128, 64, dtype=dtype)
    both[0, :, :32] = state.pop(f"{AT}.q_proj.weight").t()
    both[0, :, 32:] = state.pop(f"{AT}.k_proj.weight").t()
    return {**state, f"{AT}.both": both}


def given() -> Tensors:
    """Codes as large as scales of rows, blocks and matrices make them, and weights that were never FP8."""
    state = {f"{AT}.o_proj.weight": torch.randn(32, 128).bfloat16(), f"{AT}.norm.weight": torch.full((128,), 16.0)}
    for n, name in enumerate(("q_proj", "k_proj", "v_proj")):
        state[f"{AT}.{name}.weight"] = random_codes((32, 128), n, top=0x77)
        state[f"{AT}.{name}.scale"] = torch.rand(32, 1) / 100
    return state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("convert", [_cast, _without_scales, _renamed_with_scales, _fused_and_transposed, _stacked])
def test_codes_as_values_are_refused(convert: Convert, dtype: torch.dtype) -> None:
    state = given()
    elements = Elements.of(state)
    with pytest.raises(WeightError, match=rf"ckpt: the model's conversion cast FP8 weights.*\n.*{AT}"):
        elements.check(convert(state, dtype), "ckpt")


def _dequantized(state: Tensors, dtype: torch.dtype) -> Tensors:
    scales = {name.removesuffix(".scale"): t for name, t in state.items() if name.endswith(".scale")}
    weights = {f"{module}.weight": state[f"{module}.weight"].float() * scale for module, scale in scales.items()}
    return {**state, **{name: t.to(dtype) for name, t in weights.items()}}


def _quantized_anew(state: Tensors, dtype: torch.dtype) -> Tensors:
    return {**state, f"{AT}.q_proj.weight": random_codes((32, 128), 9)}


def _dropped(state: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: t for name, t in state.items() if t.dtype != FP8}


def _as_they_were(state: Tensors, dtype: torch.dtype) -> Tensors:
    """With a float tensor that could be taken for codes."""
    return {**state, f"{AT}.masks": torch.tensor([[0.0, 16.0], [24.0, 448.0]])}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("convert", [_dequantized, _quantized_anew, _dropped, _as_they_were])
@pytest.mark.parametrize("power", [False, True])
def test_what_is_no_cast_passes(convert: Convert, dtype: torch.dtype, power: bool) -> None:
    state = given()
    if power:  # as MX scales are: all products are FP8 numbers
        state |= {name: torch.full_like(t, 2.0**-9) for name, t in state.items() if name.endswith(".scale")}
    elements = Elements.of(state)
    elements.check(convert(state, dtype), "ckpt")


def test_weights_that_never_had_a_scale_are_values() -> None:
    state = {f"{AT}.q_proj.weight": random_codes((32, 128))}
    Elements.of(state).check(_cast(state, torch.bfloat16), "ckpt")


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("which", ["self_attn", "experts"])
def test_a_load_ends(enabled: Standin, tmp_path: Path, quantized: bool, which: str) -> None:
    """Of a model that puts experts into what it has for them."""

    def convert(state: Tensors, config: Any) -> Tensors:
        state = {name: t for name, t in state.items() if (which in name or ".layers." not in name)}
        for layer in range(LAYERS):
            at = f"layers.{layer}.mlp"
            parts = [state.pop(f"{at}.experts.{n}.up_proj.weight", None) for n in range(EXPERTS)]
            if parts[0] is not None:
                state[f"{at}.up.weight"] = torch.stack([p.to(torch.bfloat16) for p in parts if p is not None])
        return _without_scales(state, torch.bfloat16)

    tensors, _ = checkpoint("channel")
    with pytest.raises(WeightError, match="the model's conversion cast FP8 weights"):
        load_by(enabled, write(tmp_path, tensors), convert, **({} if quantized else {"quantized": False}))
