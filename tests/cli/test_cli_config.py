"""``neuron-fp8 config``: what it prints is what the libraries take."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

from neuron_fp8_loader import OptionError
from neuron_fp8_loader.tools.settings import settings_for
from tests.cli.helpers import codes, layer, one_line, run, run_json, sharded, single
from tests.support import TINY, shared


@pytest.mark.parametrize(
    ("name", "quantization_type"),
    [
        ("ct_fp8_static", "per_tensor_symmetric"),
        ("ct_fp8_dynamic", "per_channel_symmetric"),
        ("ct_fp8_dynamic_moe", "expert_wise_per_channel_symmetric"),
        ("hf_fp8_block_moe_fused", "expert_wise_per_channel_symmetric"),
        ("hf_fp8_block", "per_channel_symmetric"),
        ("ct_mxfp8", "per_channel_symmetric"),
        ("derived_llama4_modelopt", "expert_wise_per_channel_symmetric"),
        ("modelopt_fp8", "per_tensor_symmetric"),
    ],
)
def test_quantization_type_follows_the_scales(name: str, quantization_type: str) -> None:
    config = run_json("config", shared(name), code=0)["neuron_config"]
    assert config["quantization_type"] == quantization_type
    assert config["quantization_dtype"] == "f8e4m3"  # the one spelling that brings the compiler's flag
    assert config["fp8_rescale"] is True
    assert config["quantized_checkpoints_path"] == str(shared(name).resolve())


def test_blocks_of_experts_are_kept_where_asked_for() -> None:
    args = ("config", shared("hf_fp8_block_moe_fused"), "--experts", "blockwise")
    config, text = run_json(*args)["neuron_config"], run(*args).stdout
    blocks = "quantization_block_axis=[1, 2], quantization_block_size=[128, 128]"
    assert f"fp8_rescale=True, {blocks}, moe_fused_nki_kernel_enabled=False))" in text
    assert config["quantization_type"] == "blockwise_symmetric"
    assert config["quantization_block_axis"] == [1, 2]
    assert config["quantization_block_size"] == [128, 128]


@pytest.mark.parametrize(
    ("name", "experts", "reason"),
    [
        ("ct_fp8_dynamic_moe", "blockwise", "no blocks"),
        ("hf_fp8_block", "blockwise", "no FP8 experts"),
        ("hf_fp8_block", "expert_wise", "no FP8 experts"),
    ],
)
def test_experts_that_are_not_there_are_refused(name: str, experts: str, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        settings_for(shared(name), experts=experts)


def test_all_three_forms_say_the_same(tmp_path: Path) -> None:
    modules = tmp_path / "modules.json"
    args = ("config", TINY, "--tp", 8, "--method", "ratio", "--modules-file", modules)
    text, data = run(*args).stdout, run_json(*args)
    call = re.search(r"^NeuronConfig\(.*?^\)", text, re.S | re.M)
    assert call
    written = ast.parse(call[0], mode="eval").body
    assert isinstance(written, ast.Call)
    assert {k.arg: ast.literal_eval(k.value) for k in written.keywords} == data["neuron_config"]
    vllm = shlex.split(text[text.index("vllm serve") : text.index("# inference_demo")].replace("\\\n", " "))
    assert json.loads(vllm[vllm.index("--additional-config") + 1]) == data["additional_config"]
    assert vllm[vllm.index("--tensor-parallel-size") + 1] == "8"
    demo = shlex.split(text[text.index("python -c") : text.index("# scales")].replace("\\\n", " "))
    assert demo[3:] == data["inference_demo"]
    assert "fp8_rescale='ratio'" in demo[2]
    compile(demo[2], "launch", "exec")
    assert json.loads(modules.read_text())["modules_to_not_convert"] == data["neuron_config"]["modules_to_not_convert"]
    assert data["environment"] == {"XLA_HANDLE_SPECIAL_SCALAR": "1", "UNSAFE_FP8FNCAST": "1"}
    assert "export UNSAFE_FP8FNCAST=1" in text


@pytest.mark.skipif(not os.environ.get("NXDI_SRC"), reason="NXDI_SRC is not set")
def test_inference_demo_has_these_options() -> None:
    package = Path(os.environ["NXDI_SRC"]) / "src" / "neuronx_distributed_inference"
    known = set(re.findall(r'"(--[a-z-]+)"', (package / "inference_demo.py").read_text()))
    arguments = run_json("config", TINY, "--tp", 2)["inference_demo"]
    assert {a for a in arguments if a.startswith("--")} <= known


@pytest.mark.skipif(not os.environ.get("NXDI_SRC"), reason="NXDI_SRC is not set")
def test_neuron_config_takes_these_keywords() -> None:
    package = Path(os.environ["NXDI_SRC"]) / "src" / "neuronx_distributed_inference"
    known = set(re.findall(r'kwargs\.pop\(\s*"(\w+)"', (package / "models" / "config.py").read_text()))
    config = run_json("config", TINY, "--tp", 2)["neuron_config"]
    assert set(config) - known == {"fp8_rescale"}


def test_the_launcher_hands_over_the_flag() -> None:
    """Run the printed program with stand-ins for the two packages."""
    text = run("config", TINY).stdout
    program = shlex.split(text[text.index("python -c") : text.index("# scales")].replace("\\\n", " "))[2]
    seen = {}

    class Demo:
        @staticmethod
        def create_neuron_config(model: str, args: argparse.Namespace) -> None:
            seen.update(vars(args))

        @staticmethod
        def main() -> None:
            Demo.create_neuron_config("model", argparse.Namespace(quantized=True))

    program = program.replace("from neuronx_distributed_inference import inference_demo as demo", "")
    program = program.replace("neuron_fp8_loader.enable()", "")
    exec(program, {"demo": Demo})
    assert seen == {"quantized": True, "fp8_rescale": True}


def test_blocks_and_fused_qkv_are_explained(tmp_path: Path) -> None:
    block = {"m.weight": codes(0x7E, shape=(256, 256)), "m.weight_scale_inv": torch.ones(2, 2)}
    assert "block scales (128x128)" in run("config", single(tmp_path / "b", block)).stdout
    tensor = {"m.weight": codes(0x7E, shape=(256, 256)), "m.weight_scale": torch.ones(())}
    assert "fused_qkv" in run("config", single(tmp_path / "t", tensor)).stdout


def test_an_index_and_a_shard_lead_to_the_directory(tmp_path: Path) -> None:
    path = sharded(tmp_path / "c", layer(0), layer(1))
    for given in (path, path / "model.safetensors.index.json", path / "model-00001-of-00002.safetensors"):
        assert run_json("config", given)["neuron_config"]["quantized_checkpoints_path"] == str(path)


def test_no_fp8_is_a_finding(tmp_path: Path) -> None:
    path = single(tmp_path / "c", {"m.weight": torch.ones(4, 4, dtype=torch.bfloat16)})
    data = run_json("config", path, code=1)
    assert data["neuron_config"] == {}
    assert "no FP8 weights" in run("config", path).stdout


def test_wrong_use() -> None:
    assert run("config", TINY, "--tp", 0).exit_code == 2
    assert "no such file" in one_line(run("config", TINY / "nothing"))
    with pytest.raises(OptionError):
        settings_for(TINY, tp_degree=0)
    with pytest.raises(OptionError):
        settings_for(TINY, method="clamp")


# -- what would not load -------------------------------------------------------------------------------------------


def test_config_refuses_what_inspect_says_will_be_refused(tmp_path: Path) -> None:
    nan = layer(0) | {"x.weight": codes(0x7F, shape=(4, 4)), "x.weight_scale": torch.ones(1)}
    bare = layer(0) | {"y.weight": codes(0x7E, shape=(4, 4))}
    scale = layer(0) | {"z.weight": codes(0x10, shape=(4, 4)), "z.weight_scale": torch.tensor([float("nan")])}
    fnuz = {"w.weight": torch.ones(4, 4).to(torch.float8_e4m3fnuz), "w.weight_scale": torch.ones(1)}
    for name, tensors in {"nan": nan, "bare": bare, "scale": scale, "fnuz": fnuz}.items():
        path = single(tmp_path / name, tensors)
        for stack in ("nxd", "vllm-neuron"):
            reasons = run_json("inspect", path, "--for", stack, code=1)["refusals"]
            done = run("config", path, "--for", stack)
            assert done.exit_code == 1, (name, stack)
            assert done.stdout == ""
            assert len(done.stderr.splitlines()) == len(reasons) > 0
            assert run_json("config", path, "--for", stack, code=1)["refusals"] == reasons
        quick = run("config", path, "--headers-only").exit_code
        assert quick == (1 if name == "fnuz" else 0)


@pytest.mark.parametrize(
    ("heads", "tp", "said"),
    [
        ((4, 2), 2, ""),
        ((8, 4), 2, ""),
        ((4, 2), 8, "pads the 4 attention heads with zeros to 8 and gives each of the 2 KV heads to 4 ranks"),
        ((6, 2), 4, "pads the 6 attention heads with zeros to 8 and gives each of the 2 KV heads to 2 ranks"),
        ((4, 4), 3, "pads the 4 attention and KV heads with zeros to 6"),
        ((4, None), 8, "pads the 4 attention and KV heads with zeros to 8"),
        ((4, 2), 3, None),
        ((8, 4), 6, None),
        ((6, 3), 2, None),
    ],
)
def test_degrees_that_do_not_divide_the_heads(
    tmp_path: Path, heads: tuple[int, int | None], tp: int, said: str | None
) -> None:
    """``tests/integrations/real_cases.py`` holds the same against the real NxD."""
    path = single(tmp_path / "c", layer(0))
    config = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    declared = {"quantization_config": {"quant_method": "fp8"}}
    for text in (config, {"text_config": config}):
        (path / "config.json").write_text(json.dumps({**text, **declared}))
        if said is None:
            assert f"--tp {tp}: " in (line := one_line(run("config", path, "--tp", tp)))
            assert "KV heads" in line
            continue
        (note,) = run_json("config", path, "--tp", tp, code=0)["notes"] or [""]
        assert said in note
        assert bool(note) == bool(said)
    (path / "config.json").write_text(json.dumps({**config, **declared, "kv_lora_rank": 512}))
    assert run_json("config", path, "--tp", tp, code=0)["notes"] == []


def test_a_scale_of_one_value_is_not_padded(tmp_path: Path) -> None:
    path = single(tmp_path / "c", {"m.weight": codes(0x7E, shape=(4, 4)), "m.weight_scale": torch.ones(1)})
    (path / "config.json").write_text('{"num_attention_heads": 4}')
    kinds = [settings_for(path, tp_degree=tp).neuron_config["quantization_type"] for tp in (2, 3, 8)]
    assert kinds == ["per_tensor_symmetric", "per_channel_symmetric", "per_tensor_symmetric"]


def test_a_scale_of_one_value_is_not_padded_with_the_rows_of_an_mlp(tmp_path: Path) -> None:
    tensors = {}
    for name, shape in (("gate_proj", (12, 4)), ("up_proj", (12, 4)), ("down_proj", (4, 12))):
        tensors[f"model.layers.0.mlp.{name}.weight"] = codes(0x7E, shape=shape)
        tensors[f"model.layers.0.mlp.{name}.weight_scale"] = torch.ones(())
    path = single(tmp_path / "c", tensors)
    (path / "config.json").write_text('{"num_attention_heads": 16}')
    kinds = [settings_for(path, tp_degree=tp).neuron_config["quantization_type"] for tp in (4, 8)]
    assert kinds == ["per_tensor_symmetric", "per_channel_symmetric"]
