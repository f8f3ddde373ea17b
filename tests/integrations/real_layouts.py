"""Real checkpoints of every scale shape on the quantized layers of the real NxD Inference, by one flag."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.integrations.real_cases import ON, H, logits
from tests.support import e4m3fn, raw, shared

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
SCALES = ("_scale", "_scale_inv")


def dequantized(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float32 weights by the names of transformers, in the test's own arithmetic."""
    plain = {}
    for name, t in original.items():
        if t.dtype == torch.float8_e4m3fn:
            if name.endswith("_weight_qdata"):
                scale, target = original[name.replace("qdata", "scale")], name.replace("_weight_qdata", "weight")
            else:
                scale, target = next(original[name + s] for s in SCALES if name + s in original), name
            if scale.dtype == torch.uint8:
                values = np.exp2(raw(scale).astype(np.float64) - 127)
            else:
                values = scale.double().numpy()
            if values.ndim == 4:
                values = values[:, 0, :, 0]
            if values.ndim == 2 and values.shape[1] > 1:  # blocks of 128, or groups of 32 a row
                rows = 1 if values.shape[0] == t.shape[0] else 128
                values = values.repeat(rows, 0).repeat(128 if rows > 1 else 32, 1)[: t.shape[0], : t.shape[1]]
            elif values.ndim == 2 and t.shape[0] > 128 and values.shape[0] < t.shape[0] and values.size > 1:
                values = values.repeat(128, 0)[: t.shape[0]]
            elif values.ndim == 1 and values.size > 1:
                values = values[:, None]
            plain[target] = torch.from_numpy(e4m3fn(t) * values).float()
        elif "scale" not in name.rsplit(".", 1)[-1]:
            plain[name] = t.float()
    return plain


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
