"""DBRX and contributed models on the real NxD Inference: every rank, expert and row, read as a device does."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_fp8_loader import OptionError, WeightError
from tests.integrations import contributed
from tests.integrations.real_cases import FP8
from tests.integrations.real_moe import (
    HALVED,
    REQUANTIZED,
    TYPES,
    Ranks,
    checkpoint,
    scripted,
    shards,
    twin,
    whole,
    worst,
)

_LINEAR = {f"linear_attn.{n}" for n in ("in_proj_qkv", "in_proj_z", "out_proj")}
_FULL = {"self_attn.output_gate_proj", "self_attn.o_proj.o_proj", *(f"self_attn.qkv_proj.{n}_proj" for n in "qkv")}
_LATENT = {f"self_attn.{n}" for n in ("q_b_proj", "o_proj")}
_SHARED = {f"mlp.shared_{n}_proj" for n in ("gate", "up", "down")}


def fused(block: str) -> set[str]:
    return {f"{block}.expert_mlps.mlp_op.{n}" for n in ("gate_up_proj", "down_proj")}


FP8_OF: dict[str, list[set[str]]] = {  # the modules of each layer that come as FP8
    "dbrx": [{"self_attn.qkv_proj.Wqkv", "self_attn.o_proj.o_proj"} | fused("ffn")] * 2,
    "deepseek_v3": [
        _LATENT | {f"mlp.{n}_proj" for n in ("gate", "up", "down")},
        _LATENT | fused("mlp") | {f"mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")},
    ],
    "glm_moe_dsa": [set(), fused("feed_forward.moe")],
    "qwen3_5_moe": [_LINEAR | _SHARED | fused("mlp.moe"), _FULL | _SHARED | fused("mlp.moe")] * 2,
    "minimax_m2": [
        {"self_attn.o_proj.o_proj", *(f"self_attn.qkv_proj.{n}_proj" for n in "qkv")} | fused("block_sparse_moe"),
    ]
    * 2,
    "mixtral_contrib": [
        {"self_attn.o_proj.o_proj", *(f"self_attn.qkv_proj.{n}_proj" for n in "qkv")} | fused("mlp"),
    ]
    * 2,
}


@pytest.fixture(autouse=True)
def _there(request: pytest.FixtureRequest) -> None:
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if not contributed.there(params.get("family", "")):
        pytest.skip("MINIMAX_SRC is not set")


def check(family: str, ranks: Ranks, twins: Ranks, *, experts: float, others: float) -> None:
    """The least dB that every FP8 row must reach; what is not FP8 is the twin's, rounded to bfloat16."""
    found = worst(ranks, twins)
    expected = {f"layers.{n}.{name}.weight" for n, names in enumerate(FP8_OF[family]) for name in names}
    assert set(found) == expected
    for name, least in found.items():
        assert least > (experts if ".expert_mlps." in name else others), (name, least)
    for rank, other in zip(ranks, twins, strict=True):
        for name, tensor in other.items():
            if rank[name].dtype != FP8:
                assert torch.equal(rank[name], tensor.to(rank[name].dtype)), name


ROWS = [
    ("dbrx", "tensor", "expert_wise", 1),
    ("dbrx", "tensor", "expert_wise", 4),
    ("dbrx", "tensor", "blockwise", 2),
    ("dbrx", "tensor", "per_channel", 2),
    ("deepseek_v3", "block", "expert_wise", 2),
    ("deepseek_v3", "block", "blockwise", 4),
    ("deepseek_v3", "channel", "expert_wise", 1),
    ("deepseek_v3", "tensor", "blockwise", 2),
    ("glm_moe_dsa", "block", "expert_wise", 4),
    ("glm_moe_dsa", "block", "blockwise", 2),
    ("glm_moe_dsa", "channel", "expert_wise", 1),
    ("qwen3_5_moe", "block", "expert_wise", 2),
    ("qwen3_5_moe", "block", "blockwise", 4),
    ("qwen3_5_moe", "channel", "expert_wise", 1),
    ("minimax_m2", "block", "expert_wise", 4),
    ("minimax_m2", "block", "blockwise", 2),
    ("minimax_m2", "channel", "expert_wise", 1),
    ("mixtral_contrib", "channel", "expert_wise", 2),
    ("mixtral_contrib", "block", "blockwise", 1),
]


@pytest.mark.parametrize(("family", "form", "kind", "tp"), ROWS)
def test_every_row(family: str, form: str, kind: str, tp: int) -> None:
    fp8, plain = checkpoint(family, form)
    ranks = shards(family, fp8, tp, **TYPES[kind])
    exact = form != "block"
    experts = HALVED if exact or kind == "blockwise" else REQUANTIZED
    check(family, ranks, twin(family, plain, tp), experts=experts, others=HALVED if exact else REQUANTIZED)


@pytest.mark.parametrize(
    ("family", "form", "kind"),
    [
        ("deepseek_v3", "block", "blockwise"),
        ("deepseek_v3", "block", "expert_wise"),
        ("glm_moe_dsa", "block", "blockwise"),
        ("qwen3_5_moe", "block", "expert_wise"),
        ("mixtral", "block", "blockwise"),
        ("qwen3_moe", "channel", "expert_wise"),
        ("llama4", "channel", "expert_wise"),
        ("dbrx", "tensor", "expert_wise"),
    ],
)
def test_every_tensor_is_as_close_as_a_scripts(family: str, form: str, kind: str) -> None:
    fp8, plain = checkpoint(family, form)
    ranks, twins = shards(family, fp8, 2, **TYPES[kind]), twin(family, plain, 2)
    names = [name for name, tensor in ranks[0].items() if tensor.dtype == FP8]
    ours, rivals = (whole(r, twins, names) for r in (ranks, twin(family, scripted(family, form, kind), 2)))
    for name, dB in ours.items():
        assert dB >= rivals[name], (name, dB, rivals[name])
        if ".expert_mlps." in name and (kind == "blockwise" or form != "block"):
            assert dB > 100
            assert rivals[name] < 35


@pytest.mark.parametrize("family", sorted(FP8_OF))
def test_the_comparison_sees_one_scale_in_the_place_of_another(family: str) -> None:
    fp8, plain = checkpoint(family, "tensor" if family == "dbrx" else "block")
    ranks, twins = shards(family, fp8, 2, **TYPES["blockwise"]), twin(family, plain, 2)
    name = next(n for n in ranks[1] if n.endswith("gate_up_proj.scale"))
    old = ranks[1][name]
    # DBRX's experts have the same scale, its gate and up have not
    ranks[1][name] = old.flip(-1) if family == "dbrx" else old[[1, 0, 2, 3]]
    with pytest.raises(AssertionError, match=re.escape(name.removesuffix("scale"))):
        check(family, ranks, twins, experts=HALVED, others=REQUANTIZED)


@pytest.mark.parametrize("family", ["qwen3_5_moe", "minimax_m2"])
def test_with_attention_fused(family: str) -> None:
    fp8, plain = checkpoint(family, "block")
    more = {"fused_qkv": True}
    ranks = shards(family, fp8, 2, **TYPES["expert_wise"], **more)
    off = {"quantized": False, "torch_dtype": "float32", "fp8_rescale": False}
    found = worst(ranks, shards(family, plain, 2, **off, **more))
    assert "layers.1.self_attn.qkv_proj.Wqkv.weight" in found
    assert min(found.values()) > REQUANTIZED


@pytest.mark.parametrize("family", ["qwen3_5_moe", "glm_moe_dsa", "dbrx", "qwen3_moe", "llama4", "minimax_m2"])
def test_experts_as_bfloat16(family: str) -> None:
    """The list names paths that hang on the model: ``mlp.moe``, ``layers`` for ``blocks``; GLM's own list would leave
    its experts out. A list of single modules misses those of a fused kernel: the error says what to set."""
    fp8, plain = checkpoint(
        family, {"dbrx": "tensor", "qwen3_moe": "channel", "llama4": "channel"}.get(family, "block")
    )
    given = {"fp8_rescale": {"dequantize": ["*.experts.*"]}, **TYPES["expert_wise"]}
    if family in ("qwen3_moe", "llama4"):
        block = "mlp" if family == "qwen3_moe" else "feed_forward.moe"
        stacks = [f"layers.{n}.{block}.expert_mlps.mlp_op.{p}_proj" for n in range(2) for p in ("gate_up", "down")]
        given["modules_to_not_convert"] = ["lm_head", *stacks]
        given["moe_fused_nki_kernel_enabled"] = family == "qwen3_moe"
    if family in ("qwen3_moe", "llama4"):
        with pytest.raises(OptionError, match=r"expert_mlps\.mlp_op") as error:
            shards(family, fp8, 2, **given)
        suggested = re.search(r"set modules_to_not_convert=(\[.*\])", str(error.value))
        assert suggested
        given["modules_to_not_convert"] = ast.literal_eval(suggested[1])
    ranks = shards(family, fp8, 2, **given)
    for rank, other in zip(ranks, twin(family, plain, 2), strict=True):
        names = [n for n in other if ".mlp_op." in n]
        assert names
        for name in names:
            assert rank[name].dtype == torch.bfloat16
            assert torch.allclose(rank[name].float(), other[name], rtol=2**-8, atol=0)  # the twin was rounded before
            assert name.replace("weight", "scale") not in rank
        assert any(t.dtype == FP8 for t in rank.values()) == (family != "glm_moe_dsa")


@pytest.mark.parametrize("family", ["deepseek_v3", "glm_moe_dsa", "minimax_m2"])
def test_a_model_that_dequantizes_by_itself(family: str) -> None:
    """DeepSeek and MiniMax with quantized=False, as bfloat16; GLM quantizes anew, one scale for all experts."""
    fp8, plain = checkpoint(family, "block")
    if family != "glm_moe_dsa":
        ranks = shards(family, fp8, 2, quantized=False)
        for rank, other in zip(ranks, twin(family, plain, 2), strict=True):
            for name, tensor in other.items():
                assert rank[name].dtype == tensor.dtype or rank[name].dtype == torch.bfloat16
                assert torch.allclose(rank[name].float(), tensor.float(), rtol=2**-7, atol=1e-6), name
        return
    ranks, twins = shards(family, fp8, 2, **TYPES["per_tensor"]), twin(family, plain, 2)
    assert ranks[0]["layers.1.feed_forward.moe.expert_mlps.mlp_op.down_proj.scale"].shape == (1, 1, 1)
    assert min(worst(ranks, twins).values()) > 20


def test_scales_of_dbrx_one_an_expert(tmp_path: Path) -> None:
    fp8, plain = checkpoint("dbrx", "tensor")
    tensors, twins = load_file(fp8 / "model.safetensors"), load_file(plain / "model.safetensors")
    factors = torch.tensor([1.0, 2.0, 0.25, 8.0])
    for name in [n for n in tensors if ".experts.mlp." in n and n.endswith("_weight_scale")]:
        weight = name.removesuffix("_weight_scale")
        tensors[name] = tensors[name] * factors
        twins[weight] = (twins[weight].view(4, -1) * factors[:, None]).view_as(twins[weight])
    for path, what, config in (("fp8", tensors, fp8), ("twin", twins, plain)):
        (tmp_path / path).mkdir()
        save_file(what, tmp_path / path / "model.safetensors")
        (tmp_path / path / "config.json").write_text((config / "config.json").read_text())
    for kind in ("expert_wise", "blockwise"):
        ranks = shards("dbrx", tmp_path / "fp8", 2, **TYPES[kind])
        check("dbrx", ranks, twin("dbrx", tmp_path / "twin", 2), experts=HALVED, others=HALVED)


REFUSED: list[tuple[str, str, dict[str, Any], type[Exception], str]] = [
    ("dbrx", "channel", TYPES["expert_wise"], OptionError, r"w2 has one scale per 256 rows.*dequantize"),
    ("dbrx", "tensor", TYPES["per_tensor"], OptionError, r"2 different scales.*expert_wise_per_channel_symmetric"),
    ("dbrx", "tensor", {"quantized": False}, WeightError, "quantized=True.*dequantize"),
    ("qwen3_5_moe", "block", {"quantized": False}, WeightError, "quantized=True.*dequantize"),
    ("qwen3_5_moe", "channel", TYPES["blockwise"], OptionError, "expert_wise_per_channel_symmetric"),
    ("minimax_m2", "channel", TYPES["blockwise"], OptionError, "expert_wise_per_channel_symmetric"),
    ("minimax_m2", "tensor", TYPES["per_tensor"], OptionError, r"different scales.*expert_wise_per_channel_symmetric"),
    ("deepseek_v3", "channel", TYPES["blockwise"], OptionError, "expert_wise_per_channel_symmetric"),
    (
        "deepseek_v3",
        "block",
        {**TYPES["expert_wise"], "modules_to_not_convert": ["lm_head"]},
        OptionError,
        "kv_b_proj",
    ),
    ("qwen3_5_moe", "block", {**TYPES["expert_wise"], "modules_to_not_convert": ["lm_head"]}, OptionError, "A_log"),
]


@pytest.mark.parametrize(("family", "form", "given", "kind", "text"), REFUSED)
def test_refused_in_words(family: str, form: str, given: dict[str, Any], kind: type[Exception], text: str) -> None:
    fp8, _ = checkpoint(family, form)
    with pytest.raises(kind) as error:
        shards(family, fp8, 1, **given)
    assert re.search(text, str(error.value), re.DOTALL), str(error.value)


def test_latent_attention_keeps_the_weight_that_it_multiplies_by() -> None:
    """``kv_b_proj`` is used without its layer: FP8 codes there would never meet their scales."""
    fp8, plain = checkpoint("deepseek_v3", "block")
    rank = shards("deepseek_v3", fp8, 1, **TYPES["expert_wise"])[0]
    exact = load_file(plain / "model.safetensors")["model.layers.1.self_attn.kv_b_proj.weight"]
    assert torch.equal(rank["layers.1.self_attn.kv_b_proj.weight"], exact.bfloat16())
    assert np.isfinite(exact.numpy()).all()
