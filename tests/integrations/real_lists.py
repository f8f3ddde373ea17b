"""A user's ``modules_to_not_convert``, and ``quantized=False``, with every family: right on every rank, or refused.

What is not FP8 any more is the checkpoint's value, rounded to bfloat16 once; what is still FP8 is right row by row.
"""

from __future__ import annotations

import pytest
import torch

from neuron_fp8_loader import OptionError, WeightError
from tests.integrations.real_cases import FP8
from tests.integrations.real_config import Row, check, pasted, twin
from tests.integrations.real_moe import HALVED, REQUANTIZED, checkpoint, shards

FAMILIES: list[tuple[Row, str]] = [
    (("qwen3_moe", "channel", False), "mlp"),
    (("qwen3_moe", "block", False), "mlp"),
    (("mixtral", "channel", False), "mlp"),
    (("llama4", "channel", True), "feed_forward"),
    (("llama4", "block", False), "feed_forward"),
    (("dbrx", "tensor", False), "ffn"),
    (("deepseek_v3", "block", False), "mlp"),
    (("glm_moe_dsa", "block", False), "feed_forward"),
    (("qwen3_5_moe", "block", False), "mlp"),
    (("mixtral_contrib", "channel", False), "mlp"),
]
LISTS = {  # what a user adds to what config prints
    "a layer": ["layers.1."],
    "experts of a layer": ["layers.1.{block}"],
    "all attention": ["self_attn"],
    "one projection": ["o_proj"],
    "gate and up of experts": ["mlp_op.gate_up_proj"],
    "down of experts": ["down_proj"],
    "all": ["layers."],
    "names of the checkpoint": ["model.layers.0.self_attn.q_proj", "model.layers.1.{block}.experts"],
}


GLM_OWN = ["lm_head", "self_attn", "shared_expert", "layers.0.mlp"]
"""The list that GLM-5.2 makes for itself: its conversion dequantizes what it names, whatever another list says."""
# their conversions stack all experts of a layer in one dtype
ONE_DTYPE = ("qwen3_moe", "mixtral", "mixtral_contrib", "deepseek_v3")


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize(("row", "block"), FAMILIES)
def test_lists(row: Row, block: str, name: str) -> None:
    path, plain = checkpoint(*row)
    given = pasted(path, "--tp", 2)
    more = [entry.format(block=block) for entry in LISTS[name]]
    given["modules_to_not_convert"] = [
        *(GLM_OWN if row[0] == "glm_moe_dsa" else given["modules_to_not_convert"]),
        *more,
    ]
    if row[0] in ONE_DTYPE and name in ("gate and up of experts", "down of experts"):
        with pytest.raises(OptionError, match=r"in one dtype.*modules_to_not_convert"):
            shards(row[0], path, 2, **given)
        return
    ranks = shards(row[0], path, 2, **given)
    least = HALVED if row[1] in ("channel", "tensor") else REQUANTIZED
    names = check(ranks, twin(row[0], plain, 2), experts=least, others=least)
    assert not [n for n in names if any(entry in n for entry in more)]
    none = name == "all" or (row[0] == "glm_moe_dsa" and name in ("a layer", "experts of a layer"))
    assert bool(names) != none


# reads weight_scale_inv and dequantizes by itself, in an arithmetic of its own
BY_THEMSELVES = [("deepseek_v3", "block")]


@pytest.mark.parametrize("row", [row for row, _ in FAMILIES])
def test_without_quantized_layers(row: Row) -> None:
    path, plain = checkpoint(*row)
    twins = twin(row[0], plain, 2)
    ranks = shards(row[0], path, 2, quantized=False, fp8_rescale={"dequantize": ["*"]})
    assert not check(ranks, twins, experts=0, others=0)
    if row[:2] not in BY_THEMSELVES:
        with pytest.raises(WeightError, match=r"(?s)quantized=False, but .* FP8 weight.*quantized=True.*dequantize"):
            shards(row[0], path, 2, quantized=False)
        return
    for rank, other in zip(shards(row[0], path, 2, quantized=False), twins, strict=True):
        assert rank.keys() == other.keys()
        for name, tensor in other.items():
            assert rank[name].dtype != FP8
            assert torch.allclose(rank[name].float(), tensor.float(), rtol=2**-7, atol=1e-6), name
