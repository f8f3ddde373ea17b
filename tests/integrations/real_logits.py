"""Logits of mixtures of experts: NxD's own forward where it runs on a CPU, and transformers' in float64.

The latter runs on what a rank got, read as a device reads it.

In a process of its own: a forward wants real process groups, sharding wants NxD's mock of them.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integrations.real_cases import H
from tests.integrations.real_moe import MX_BLOCKS, TYPES, Ranks, checkpoint, shards, values
from tests.support import sqnr

TOKENS = torch.tensor([[1, 5, 17, 42, 99, 3, 64, 127, 11, 8]])
PROJECTIONS = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
BLOCKS = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}


def reference(family: str, path: Path, weights: dict[str, torch.Tensor] | None = None) -> np.ndarray:
    """float64 logits [tokens, vocabulary] of transformers' model, of a checkpoint or of other weights for it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float64).eval()
    if weights is None:
        from safetensors.torch import load_file

        weights = load_file(path / "model.safetensors")
    missing, unexpected = model.load_state_dict({n: t.double() for n, t in weights.items()}, strict=False)
    assert not unexpected
    assert not [name for name in missing if "rotary" not in name]
    with torch.no_grad():
        logits: np.ndarray = model(TOKENS).logits[0].numpy()
    return logits


def as_hf(family: str, rank: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the one rank got, as transformers names it: FP8 as a device reads it."""
    done: dict[str, torch.Tensor] = {}
    for name, tensor in rank.items():
        if name.endswith("scale") or "rank" in name:
            continue
        value = torch.from_numpy(values(rank, name)) if tensor.dtype == torch.float8_e4m3fn else tensor.double()
        hf = "model." * (not name.startswith("lm_head")) + name.replace(".qkv_proj.", ".").replace(".o_proj.o_", ".o_")
        hf = (
            hf.replace("q_layernorm", "q_norm")
            .replace("k_layernorm", "k_norm")
            .replace(".mlp.", f".{BLOCKS[family]}.")
        )
        hf = hf.replace("router.linear_router", "gate")
        if ".mlp_op." not in hf:
            done[hf] = value
            continue
        gate, up, down = PROJECTIONS[family]
        head = hf.partition(".expert_mlps.")[0] + ".experts"
        for expert, matrix in enumerate(value):
            parts = dict(zip((gate, up), matrix.chunk(2, dim=1), strict=True)) if "gate_up" in hf else {down: matrix}
            done |= {f"{head}.{expert}.{p}.weight": m.T.contiguous() for p, m in parts.items()}
    return done


@pytest.mark.parametrize(
    ("family", "form", "kind", "least"),
    [
        ("mixtral", "channel", TYPES["expert_wise"], 80),
        ("mixtral", "tensor", TYPES["blockwise"], 80),
        ("mixtral", "block", TYPES["blockwise"], 20),  # attention is requantized to rows
        ("mixtral", "block", TYPES["expert_wise"], 20),
        ("mixtral", "mx", MX_BLOCKS, 40),
        ("qwen3_moe", "channel", TYPES["expert_wise"], 80),
        ("qwen3_moe", "block", TYPES["blockwise"], 20),
    ],
)
def test_logits_of_what_a_rank_gets(family: str, form: str, kind: dict[str, Any], least: float) -> None:
    fp8, plain = checkpoint(family, form)
    want = reference(family, plain)
    got = reference(family, plain, as_hf(family, shards(family, fp8, 1, **kind)[0]))
    assert sqnr(want, got) > least, sqnr(want, got)
    assert least < 80 or (want.argmax(axis=1) == got.argmax(axis=1)).all()


def test_a_wrong_scale_is_seen_in_the_logits() -> None:
    fp8, plain = checkpoint("mixtral", "channel")
    ranks: Ranks = shards("mixtral", fp8, 1, **TYPES["expert_wise"])
    name = "layers.1.mlp.expert_mlps.mlp_op.down_proj.scale"
    ranks[0][name] = ranks[0][name][[1, 0, 2, 3]]
    assert sqnr(reference("mixtral", plain), reference("mixtral", plain, as_hf("mixtral", ranks[0]))) < 40


def test_the_forward_of_nxd_with_experts_as_bfloat16() -> None:
    import families

    fp8, plain = checkpoint("mixtral", "channel")

    def logits(path: Path, **given: Any) -> np.ndarray:
        with contextlib.redirect_stdout(io.StringIO()):
            app = H.load_on_cpu(families.build("mixtral", path, **given))
            found: np.ndarray = H.run_logits(app, ieee=True, input_ids=TOKENS).double().numpy()
        return found

    got = logits(fp8, fp8_rescale={"dequantize": ["*.experts.*"]}, **TYPES["expert_wise"])
    want = logits(plain, quantized=False)
    assert np.isfinite(got).all()
    assert sqnr(want, got) > 30, sqnr(want, got)
