"""Real checkpoints of every scale shape on the quantized layers of the real NxD Inference, by one flag."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.integrations.at_hand import dequantized
from tests.integrations.real_cases import ON, H, logits
from tests.support import shared

REAL = [
    "hf_fp8_block",
    "derived_split_shards",
    "ct_fp8_block",
    "ct_fp8_static_kv",
    "ct_mxfp8",
    "modelopt_fp8",
    "modelopt_fp8_pb_wo",
    "quark_fp8_tensor_kv",
    "torchao_fp8_wo",
    "derived_fbgemm",
]


def reference(path: Path) -> torch.Tensor:
    """Logits of transformers' own Llama on the dequantized weights."""
    config = json.loads((path / "config.json").read_text())
    drop = ("quantization_config", "torch_dtype", "dtype", "architectures")
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k not in drop})).float().eval()
    files = sorted(path.glob("*.safetensors"))
    model.load_state_dict(dequantized({n: t for f in files for n, t in load_file(f).items()}))
    ids = torch.cat([H.prompt(config["vocab_size"]), torch.tensor([[5]])], 1)
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits[0, -2:].float()
    return result


def close(on: torch.Tensor, expected: torch.Tensor, *, requantized: bool) -> None:
    assert torch.isfinite(on).all()
    error = (on - expected).double().square().mean().sqrt() / expected.double().square().mean().sqrt()
    # one more rounding to four bits costs some percent of the logits; anything mispaired costs them all
    assert error < (0.06 if requantized else 1e-4)
    if not requantized:
        assert torch.equal(on.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(tmp_path: Path, name: str, fused: bool) -> None:
    path = shutil.copytree(shared(name), tmp_path / name)
    over: dict[str, Any] = {"quantization_type": "per_channel_symmetric", "fused_qkv": fused, **ON}
    requantized = "block" in name or name in ("modelopt_fp8_pb_wo", "derived_split_shards")
    close(logits(path, ieee=True, **over), reference(path), requantized=requantized)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("flavour", ["block", "channel_1d", "tensor_scalar"])
def test_flavours(tmp_path: Path, flavour: str, fused: bool) -> None:
    H.make_tiny_checkpoint(tmp_path, flavour=flavour)
    over: dict[str, Any] = {"quantization_type": "per_channel_symmetric", "fused_qkv": fused, **ON}
    close(logits(tmp_path, ieee=True, **over), reference(tmp_path), requantized=flavour == "block")


def test_dequantized_attention_joins_the_unquantized_modules(tmp_path: Path) -> None:
    H.make_tiny_checkpoint(tmp_path, flavour="block")
    flag = {"dequantize": ["*.self_attn.*"]}
    over: dict[str, Any] = {**ON, "fp8_rescale": flag, "quantization_type": "per_channel_symmetric"}
    app = H.build_app(tmp_path, **over)
    listed = app.neuron_config.modules_to_not_convert
    assert "layers.0.self_attn" in listed
    on = H.run_logits(H.load_on_cpu(app), ieee=True)
    assert not any("self_attn" in layer for layer in H.quantized_layers(app))
    close(on, reference(tmp_path), requantized=True)
