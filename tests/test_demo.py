"""The demo, and its Llama against transformers'."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, TINY, shared


def test_demo_shows_both_readings() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    without, with_loader = done.stdout.split("With neuron_fp8_loader")
    assert "device: 0 of 6144 logits finite" in without
    assert "device: 6144 of 6144 logits finite" in with_loader
    assert "14 of 14 FP8 weights rescaled (half)" in with_loader


def test_demo_says_which_checkpoints_it_takes(tmp_path) -> None:
    for checkpoint in (tmp_path, shared("hf_fp8_block"), shared("ct_fp8_dynamic_moe")):
        command = [sys.executable, str(ROOT / "examples" / "demo.py"), str(checkpoint)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, "CHECKPOINT is a Llama" in done.stderr, done.stdout) == (1, True, "")


def test_llama_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = json.loads((TINY / "config.json").read_text())
    weights = load_file(TINY / "model.safetensors")
    plain = {}
    for name, t in weights.items():
        if t.dtype == torch.float8_e4m3fn:
            plain[name] = t.float() * weights[f"{name}_scale"].float()
        elif not name.endswith("_scale"):
            plain[name] = t.float()
    keep = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype", "dtype")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keep)).float().eval()
    model.load_state_dict(plain)
    ids = torch.arange(3, 19)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    ours = runpy.run_path(str(ROOT / "examples" / "tiny_llama.py"))["logits"]
    torch.testing.assert_close(ours(weights, config, ids, torch.Tensor.float), expected, atol=1e-4, rtol=1e-4)
