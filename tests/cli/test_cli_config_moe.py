"""``neuron-fp8 config`` for mixtures of experts: degrees and batch sizes, and what NxD cannot do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_fp8_loader import OptionError
from neuron_fp8_loader.tools.moe_settings import degrees
from neuron_fp8_loader.tools.settings import settings_for
from tests.cli.helpers import codes, one_line, run, run_json, single
from tests.integrations import moe_checkpoints
from tests.support import shared


def moe(directory: Path, *, experts: int = 8, hidden: int = 512, inter: int = 384, top_k: int | None = 2) -> Path:
    """Experts with blocks of 128x128, [experts, out, in] on disk."""
    tensors: dict[str, torch.Tensor] = {}
    for name, rows, columns in (("gate_up_proj", 2 * inter, hidden), ("down_proj", hidden, inter)):
        head = f"model.layers.0.mlp.experts.{name}"
        tensors[head] = codes(0x10, shape=(experts, rows, columns))
        tensors[f"{head}_scale_inv"] = torch.ones(experts, -(-rows // 128), -(-columns // 128))
    single(directory, tensors)
    config: dict[str, Any] = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    if top_k is not None:
        config["num_experts_per_tok"] = top_k
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_expert_parallelism_says_what_it_needs() -> None:
    args = ("config", shared("ct_fp8_dynamic_moe"), "--tp", 4, "--moe-ep", 2)
    data, text = run_json(*args), run(*args).stdout
    wanted = {"tp_degree": 4, "moe_tp_degree": 2, "moe_ep_degree": 2, "batch_size": 2}
    assert {name: data["neuron_config"][name] for name in wanted} == wanted
    demo = data["inference_demo"]
    for option, value in (("--moe-tp-degree", "2"), ("--moe-ep-degree", "2"), ("--batch-size", "2")):
        assert demo[demo.index(option) + 1] == value
    assert "--max-num-seqs 2" in text
    assert any("batch_size=2 is the least" in note for note in data["notes"])
    assert any("runs natively" in note for note in data["notes"])


def test_tensor_parallelism_alone_adds_nothing() -> None:
    config = run_json("config", shared("ct_fp8_dynamic_moe"), "--tp", 4)["neuron_config"]
    assert config["tp_degree"] == 4
    assert not {"moe_tp_degree", "moe_ep_degree", "batch_size"} & set(config)
    dense = run_json("config", shared("hf_fp8_block"), "--tp", 4)
    assert not any("expert" in note for note in dense["notes"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((8, None, None), (8, 8, 1)),
        ((8, 2, None), (8, 2, 4)),
        ((8, None, 8), (8, 1, 8)),
        ((None, 4, 2), (8, 4, 2)),
        ((8, 4, 2), (8, 4, 2)),
    ],
)
def test_degrees_follow_from_one_another(
    given: tuple[int | None, int | None, int | None], expected: tuple[int, int, int]
) -> None:
    assert degrees(*given) == expected


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"tp_degree": 8, "moe_tp_degree": 2, "moe_ep_degree": 2}, "is 4, and tp_degree=8"),
        ({"tp_degree": 8, "moe_ep_degree": 3}, "tp_degree=8 is no multiple"),
        ({"moe_ep_degree": 2}, "need tp_degree beside them"),
        ({"tp_degree": 8, "moe_ep_degree": 0}, "from 1 up"),
        ({"tp_degree": 16, "moe_ep_degree": 16}, "8 experts cannot be split evenly; expected one of 1, 2, 4, 8"),
        ({"tp_degree": 5}, "384 cannot be split evenly"),
        ({"tp_degree": 48, "experts": "blockwise"}, "blocks of 8 would cover"),
    ],
)
def test_what_nxd_cannot_do_is_refused(tmp_path: Path, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        settings_for(moe(tmp_path / "ckpt"), **given)


def test_notes_on_blocks_and_kernels(tmp_path: Path) -> None:
    def notes(path: Path, **given: Any) -> str:
        return "\n".join(settings_for(path, **given).notes)

    path = moe(tmp_path / "ckpt")
    shares = notes(path, tp_degree=4, experts="blockwise")
    assert "a rank's 96 of 384 rows are not whole blocks of 128: the flag makes them blocks of 32" in shares
    assert "wrong output" in notes(path, tp_degree=4, moe_ep_degree=2, experts="blockwise")
    assert "whole blocks" not in notes(path, tp_degree=3, experts="blockwise")
    assert "whole blocks" not in notes(path, tp_degree=4)
    assert "kernel for prompts" not in notes(path)
    assert "kernel for prompts" in notes(moe(tmp_path / "odd", hidden=640))
    assert "does not tell how many" in notes(moe(tmp_path / "untold", top_k=None), tp_degree=2, moe_ep_degree=2)


def test_degrees_without_experts_and_for_the_other_plugin(tmp_path: Path) -> None:
    assert "no FP8 experts" in one_line(run("config", shared("hf_fp8_block"), "--tp", 4, "--moe-ep", 2))
    copy = shutil.copytree(shared("ct_fp8_dynamic_moe"), tmp_path / "copy")
    found = run("config", copy, "--for", "vllm-neuron", "--moe-ep", 2)
    assert "--moe-ep is for NxD Inference" in found.stderr


def test_a_model_that_shares_each_expert_among_all_ranks_takes_no_degrees(tmp_path: Path) -> None:
    """NxD Inference's Mixtral and DBRX: degrees would be read by nobody."""
    fp8, _ = moe_checkpoints.write(tmp_path, "mixtral", "channel")
    assert "shares each expert among all ranks" in one_line(run("config", fp8, "--tp", 4, "--moe-ep", 2))
    with pytest.raises(OptionError, match="leave them out"):
        settings_for(fp8, tp_degree=4, moe_tp_degree=2)
    given = settings_for(fp8, tp_degree=4, moe_tp_degree=4).neuron_config
    assert (given["moe_tp_degree"], given["moe_ep_degree"]) == (4, 1)
    fp8, _ = moe_checkpoints.write(tmp_path / "dbrx", "dbrx", "tensor")
    assert "is a dbrx" in one_line(run("config", fp8, "--tp", 4, "--moe-ep", 2))


EXPERT_WISE, BLOCKWISE = "expert_wise_per_channel_symmetric", "blockwise_symmetric"


@pytest.mark.parametrize(
    ("form", "kind", "floats", "refused", "why"),
    [
        ("tensor", EXPERT_WISE, False, "blockwise", "no blocks; use 'expert_wise'"),
        ("channel", EXPERT_WISE, True, "expert_wise", "are inputs, so that its scales are not .* as bfloat16"),
        ("mx", EXPERT_WISE, True, "blockwise", "no blocks that NxD takes"),
        ("block", BLOCKWISE, False, "expert_wise", "are inputs, so that its scales are not .* use 'blockwise'"),
    ],
)
def test_experts_whose_rows_are_inputs(
    tmp_path: Path, form: str, kind: str, floats: bool, refused: str, why: str
) -> None:
    """DBRX's w2."""
    fp8, _ = moe_checkpoints.write(tmp_path, "dbrx", form)
    data = run_json("config", fp8, "--tp", 2, code=0)
    given = data["neuron_config"]
    assert given["quantization_type"] == kind
    assert given["fp8_rescale"] == ({"dequantize": ["*.experts.*"]} if floats else True)
    assert ("layers.0.ffn" in given["modules_to_not_convert"]) == floats
    assert ("as bfloat16" in data["layout"]) == floats
    assert run_json("inspect", fp8)["nxd"]["quantization_type"] == kind
    with pytest.raises(OptionError, match=why):
        settings_for(fp8, experts=refused)
    ratio = settings_for(fp8, method="ratio").neuron_config["fp8_rescale"]
    assert ratio == ({"dequantize": ["*.experts.*"], "method": "ratio"} if floats else "ratio")


def test_one_scale_an_expert_is_a_scale_that_is_known(tmp_path: Path) -> None:
    fp8, _ = moe_checkpoints.write(tmp_path, "dbrx", "tensor")
    tensors = load_file(fp8 / "model.safetensors")
    for name in [n for n in tensors if ".experts.mlp." in n and n.endswith("_scale")]:
        tensors[name] = tensors[name].expand(4).contiguous()
    save_file(tensors, fp8 / "model.safetensors")
    assert settings_for(fp8).neuron_config["quantization_type"] == EXPERT_WISE


def test_blocks_of_stacks_that_lie_in_before_out(tmp_path: Path) -> None:
    fp8, _ = moe_checkpoints.write(tmp_path, "llama4", "block", stack=True)
    given = run_json("config", fp8, "--experts", "blockwise", code=0)["neuron_config"]
    assert (given["quantization_block_axis"], given["quantization_block_size"]) == ([1, 2], [128, 128])
    mx, _ = moe_checkpoints.write(tmp_path / "mx", "mixtral", "mx")
    assert settings_for(mx, experts="blockwise").neuron_config["quantization_block_size"] == [32, 1]


def test_without_a_config_json_nxd_reads_nothing() -> None:
    notes = " ".join(settings_for(shared("derived_comfy_scaled_old")).notes)
    assert "no config.json" in notes
    assert "no config.json" not in " ".join(settings_for(shared("hf_fp8_block")).notes)


def test_inference_demo_is_left_out_where_it_does_not_run_the_model(tmp_path: Path) -> None:
    fp8, _ = moe_checkpoints.write(tmp_path, "llama4", "channel")
    assert run_json("config", fp8)["inference_demo"] == []
    assert "import inference_demo" not in run("config", fp8).stdout
    assert "import inference_demo" in run("config", shared("ct_fp8_dynamic_moe")).stdout
