"""What config files declare is read to explain and to warn, and never decides; what is refused says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from convention_rows import ROWS, Row, made
from safetensors.torch import save_file

from neuron_fp8_loader import CheckpointError, Plan, PlanError, load_checkpoint, plan_checkpoint


def declared(directory: Path, tensors: dict[str, torch.Tensor], **files: object) -> Plan:
    save_file(tensors, directory / "model.safetensors")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / f"{name}.json").write_text(text)
    return plan_checkpoint(directory)


FP8 = {"a.weight": "fp8 8 8", "a.weight_scale": "f32"}
BF16 = {"a.weight": "bf16 8 8"}


@pytest.mark.parametrize("row", [row for row in ROWS if row.declared and not row.metadata], ids=lambda row: row.id)
def test_promised_fp8_that_is_not_there(row: Row, tmp_path: Path) -> None:
    files = dict(row.files) if row.config is None else {"config": row.config, **row.files}
    plan = declared(tmp_path, made(BF16), **{name.removesuffix(".json"): text for name, text in files.items()})
    (warning,) = plan.warnings
    assert "declares FP8" in warning
    assert row.declared in warning
    assert "no tensor is float8_e4m3fn" in warning
    assert f"warning: {warning}" in plan.summary()


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({}, "declares no quantization"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized",
          "config_groups": {"g": {"weights": {"type": "int", "num_bits": 8}}}}, "compressed-tensors int-quantized"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
          "config_groups": {"g": {"weights": {"type": "float", "num_bits": 4}}}}, "nvfp4-pack-quantized"),
        # FP8 activations or KV cache are no promise of FP8 weights
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {
            "weights": {"type": "int", "num_bits": 4}, "input_activations": {"type": "float", "num_bits": 8}}}},
         "compressed-tensors pack-quantized"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}, "modelopt NVFP4"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_MXFP4_FP8"}, "modelopt W4A8_MXFP4_FP8"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION",
          "quantized_layers": {"a": {"quant_algo": "NVFP4"}}}, "modelopt MIXED_PRECISION"),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}, "input_tensors": {
            "dtype": "fp8_e4m3"}}}, "quark fp4"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8DynamicActivationInt4WeightConfig"}}},
         "torchao"),
        ({"quant_method": "auto-round", "data_type": "int", "bits": 4}, "auto-round int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_fp8_that_was_not_promised(section: dict[str, object], says: str, tmp_path: Path) -> None:
    plan = declared(tmp_path, made(FP8), config={"quantization_config": section} if section else {"dim": 1})
    (warning,) = plan.warnings
    assert says in warning
    assert "there are float8_e4m3fn weights" in warning
    assert len(plan.pairs) == 1  # and the dtype decides all the same
    (tmp_path / "other").mkdir()
    quiet = declared(tmp_path / "other", made(BF16), config={"quantization_config": section} if section else {})
    assert quiet.warnings == ()


@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
        {"quant_method": "compressed-tensors", "kv_cache_scheme": {"type": "float", "num_bits": 8}},
        {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"},
        {"quant_method": "something new", "fp8": True},
        {"quant_method": "ptpc_fp8"},  # quantizes while loading: nothing is FP8 on disk
    ],
    ids=lambda section: str(list(section.values())[:2]),
)
@pytest.mark.parametrize("tensors", [FP8, BF16], ids=["fp8", "bf16"])
def test_no_warning_where_it_cannot_be_told(
    section: dict[str, object], tensors: dict[str, str], tmp_path: Path
) -> None:
    assert declared(tmp_path, made(tensors), config={"quantization_config": section}).warnings == ()


@pytest.mark.parametrize("content", ["{not json", "", "[1, 2]", "\x00", "[" * 100_000], ids=range(5))
def test_a_broken_config_is_mentioned_and_stops_nothing(content: str, tmp_path: Path) -> None:
    plan = declared(tmp_path, made(FP8), config=content, hf_quant_config=content, quanto_qmap=content)
    assert len(plan.pairs) == 1
    assert len(plan.warnings) == 3
    assert all("going by the tensors alone" in text for text in plan.warnings)
    assert {text.split()[0] for text in plan.warnings} == {"config.json", "hf_quant_config.json", "quanto_qmap.json"}
    assert load_checkpoint(tmp_path).report.rescaled


ODD: list[object] = [
    None, 1, "fp8", [], {"quant_method": 3}, {"quant_method": None, "weight_block_size": 1},
    {"config_groups": [1], "quant_method": "compressed-tensors"},
    {"config_groups": {"a": {"weights": 1}}, "quantized_layers": {"b": 2}},
    {"quant_method": "quark", "global_quant_config": 1, "layer_quant_config": [1]},
    {"quant_method": "torchao", "quant_type": {"default": 1}},
]  # fmt: skip


@pytest.mark.parametrize("section", ODD, ids=range(len(ODD)))
def test_odd_sections_do_not_trip_the_reader(section: object, tmp_path: Path) -> None:
    plan = declared(tmp_path, made(FP8), config={"quantization_config": section, "text_config": section})
    assert len(plan.pairs) == 1


def test_ranks_of_tensorrt_llm_are_refused(tmp_path: Path) -> None:
    for rank in (0, 1):
        save_file(made(FP8), tmp_path / f"rank{rank}.safetensors")
    with pytest.raises(CheckpointError, match="give the path of one file"):
        plan_checkpoint(tmp_path)
    assert len(plan_checkpoint(tmp_path / "rank1.safetensors").pairs) == 1


class Subclass(torch.Tensor):
    """Stands for torchao's tensor subclasses in older, pickled checkpoints."""


def test_pickled_tensor_subclasses_are_refused(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(2, 2).as_subclass(Subclass)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"(?s)pytorch_model\.bin: .*Subclass.*saved flattened, as safetensors"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["fp8 8 1", "i32 8 1", "i8 8 1", "e5m2 8 1"])
def test_a_scale_that_is_none_is_refused(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"a\.weight: its scale a\.weight_scale is .*; expected one of float32"):
        declared(tmp_path, made({"a.weight": "fp8 8 8", "a.weight_scale": dtype}))
