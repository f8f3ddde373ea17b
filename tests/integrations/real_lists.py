"""A user's ``modules_to_not_convert``, and ``quantized=False``, with every family: right on every rank, or refused.

What is not FP8 any more is the checkpoint's value, rounded to bfloat16 once; what is still FP8 is right row by row.
"""

from __future__ import annotations

import ast
import functools
import re
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize(
    "given",
    [
        ["lm_head"],
        ["lm_head", "self_attn"],
        ["lm_head", "kv_b_proj", "layers.1.shared_expert"],
        ["lm_head", "model.layers.0.mlp", "shared_experts"],
    ],
)
def test_what_glm_lacks_in_a_list_is_said_at_once(given: list[str]) -> None:
    path, plain = checkpoint("glm_moe_dsa", "block")
    setup = {**pasted(path, "--tp", 2), "modules_to_not_convert": given}
    with pytest.raises(OptionError, match="GLM5InferenceConfig") as error:
        shards("glm_moe_dsa", path, 2, **setup)
    found = re.search(r"set modules_to_not_convert=(\[.*\])$", str(error.value))
    assert found
    setup["modules_to_not_convert"] = ast.literal_eval(found[1])
    assert set(given) <= set(setup["modules_to_not_convert"])
    ranks = shards("glm_moe_dsa", path, 2, **setup)
    names = check(ranks, twin("glm_moe_dsa", plain, 2), experts=REQUANTIZED, others=REQUANTIZED)
    assert any(".expert_mlps." in name for name in names)
    assert any(".self_attn." in name for name in names) == ("self_attn" not in given)


@functools.cache
def kept(row: Row, module: str) -> Path:
    """A model whose publisher kept what is in this module in bfloat16."""
    fp8, plain = checkpoint(*row)
    tensors, twins = (load_file(path / "model.safetensors") for path in (fp8, plain))
    for scale in [n for n in tensors if re.search(r"_scale(_inv)?$", n) and module in n]:
        weight = re.sub(r"_scale(_inv)?$", "", scale)
        weight = weight if weight in tensors else weight.removesuffix("_weight")
        del tensors[scale]
        tensors[weight] = twins[weight].bfloat16()
    path = Path(tempfile.mkdtemp())
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text((fp8 / "config.json").read_text())
    return path


STACKS = [f"layers.1.mlp.expert_mlps.mlp_op.{p}_proj" for p in ("down", "gate_up")]
QWEN3, MIXTRAL = ("qwen3_moe", "channel", False), ("mixtral", "channel", False)
LLAMA4, DBRX, DEEPSEEK = ("llama4", "channel", True), ("dbrx", "tensor", False), ("deepseek_v3", "channel", False)
NAMED: list[
    tuple[Row, str, str, list[str]]
] = [  # a module in the checkpoint, what is before it, and what NxD has it as
    (QWEN3, "model.", "layers.0.self_attn.q_proj", ["layers.0.self_attn.qkv_proj.q_proj"]),
    (QWEN3, "model.", "layers.0.self_attn.o_proj", ["layers.0.self_attn.o_proj"]),
    (QWEN3, "model.", "layers.1.mlp.experts", STACKS),
    (MIXTRAL, "model.", "layers.1.block_sparse_moe.experts", STACKS),
    (LLAMA4, "language_model.model.", "layers.1.self_attn.k_proj", ["layers.1.self_attn.qkv_proj.k_proj"]),
    (DBRX, "transformer.", "blocks.0.norm_attn_norm.attn.Wqkv", ["layers.0.self_attn.qkv_proj.Wqkv"]),
    (DBRX, "transformer.", "blocks.1.norm_attn_norm.attn.out_proj", ["layers.1.self_attn.o_proj"]),
    (DEEPSEEK, "model.", "layers.1.self_attn.o_proj", ["layers.1.self_attn.o_proj"]),
]


@pytest.mark.parametrize(("row", "root", "name", "instead"), NAMED)
def test_names_of_the_checkpoint_match_nothing(row: Row, root: str, name: str, instead: list[str]) -> None:
    """FP8 modules stay FP8; what is not FP8 is refused before anything is compiled, with the entries that work."""
    (fp8, plain), bf16, family, tp = checkpoint(*row), kept(row, name), row[0], 4
    given = pasted(fp8, "--tp", tp)
    twins, entries = twin(family, plain, tp), given["modules_to_not_convert"]
    every = check(shards(family, fp8, tp, **given), twins, experts=HALVED, others=HALVED)
    for entry in {root + name, name} - set(instead):
        listed = {**given, "modules_to_not_convert": [*entries, entry]}
        assert check(shards(family, fp8, tp, **listed), twins, experts=HALVED, others=HALVED) == every
        listed["quantized_checkpoints_path"] = str(bf16)
        with pytest.raises(OptionError, match="contradicts") as error:
            shards(family, bf16, tp, **listed)
        assert f"{entry}: write {', '.join(instead)}" in str(error.value)
    listed = {**given, "modules_to_not_convert": [*entries, *instead], "quantized_checkpoints_path": str(bf16)}
    names = check(shards(family, bf16, tp, **listed), twins, experts=HALVED, others=HALVED)
    assert names == {n for n in every if not any(entry in n for entry in instead)}
