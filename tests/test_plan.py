"""Headers in, plan out: what decides is the weight's dtype, and what cannot be decided is said at once."""

from __future__ import annotations

import json

import pytest
import torch
from support import TINY, codes, random_codes, save, save_shards, shared

from neuron_fp8_loader import conventions, plan_checkpoint
from neuron_fp8_loader.checkpoint import describe
from neuron_fp8_loader.checkpoint.declared import Declared, read_declared
from neuron_fp8_loader.conventions import Convention
from neuron_fp8_loader.errors import OptionError, PlanError
from neuron_fp8_loader.plan import Plan, make_plan

FP8 = torch.float8_e4m3fn


def plan_of(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], declared: Declared | None = None) -> Plan:
    infos = {n: describe(n, torch.empty(shape, dtype=dtype, device="meta")) for n, (dtype, shape) in tensors.items()}
    return make_plan(infos, "here", declared)


def pair(weight: str, scale: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    return {weight: (FP8, (4, 8)), scale: (dtype, (4, 1))}


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv", "scale"])
def test_the_three_conventions(suffix):
    plan = plan_of(pair("a.weight", f"a.{suffix}"))
    assert [(p.weight, p.scale, p.convention, str(p.granularity)) for p in plan.pairs] == [
        ("a.weight", f"a.{suffix}", suffix, "row")
    ]
    assert plan.scale_of == {"a.weight": f"a.{suffix}"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.uint8, torch.float8_e5m2, torch.float32])
def test_the_weights_dtype_decides_not_its_name(dtype):
    plan = plan_of({"a.weight": (dtype, (4, 8)), "a.weight_scale": (torch.float32, (4, 1))})
    assert plan.pairs == plan.unscaled == plan.untouched_fp8 == ()


def test_an_fp8_weight_of_any_shape_counts():
    for shape in ((), (0,), (8,), (4, 8), (2, 4, 8), (2, 4, 3, 3)):
        assert plan_of({"a.weight": (FP8, shape), "a.weight_scale": (torch.float32, ())}).pairs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "uint8", "float8_e8m0fnu"])
def test_scale_dtypes(dtype):
    if not hasattr(torch, dtype):
        pytest.skip(f"this torch has no {dtype}")
    assert len(plan_of(pair("a.weight", "a.weight_scale", getattr(torch, dtype))).pairs) == 1


def test_all_problems_at_once():
    tensors = {
        **pair("two.weight", "two.weight_scale"),
        "two.weight_scale_inv": (torch.float32, (4, 1)),
        **pair("int.weight", "int.weight_scale", torch.int32),
        **pair("good.weight", "good.weight_scale"),
    }
    with pytest.raises(PlanError) as error:
        plan_of(tensors)
    assert len(error.value.problems) == 2
    text = str(error.value)
    assert text.startswith("here: 2 problems:")
    assert (
        "two.weight: has 2 candidates for its scale, two.weight_scale (weight_scale) and two.weight_scale_inv" in text
    )
    assert "int.weight: its scale int.weight_scale is int32; expected one of float32, bfloat16" in text
    assert "good" not in text


def test_a_weight_without_a_scale_is_listed():
    plan = plan_of({"a.weight": (FP8, (4, 8)), "b.weight": (FP8, (4, 8)), "b.weight_scale_2": (torch.float32, ())})
    assert plan.unscaled == ("a.weight", "b.weight")


def test_nvfp4_and_int8_stay_untouched():
    plan = plan_of(
        {
            "a.weight_packed": (torch.uint8, (4, 4)),
            "a.weight_scale": (FP8, (4, 1)),
            "b.weight": (torch.uint8, (4, 4)),  # ModelOpt's NVFP4
            "b.weight_scale": (FP8, (4, 1)),
            "b.weight_scale_2": (torch.float32, ()),
            "c.weight": (torch.int8, (4, 8)),
            "c.weight_scale": (torch.bfloat16, (4, 1)),
        }
    )
    assert plan.untouched_fp8 == ("a.weight_scale", "b.weight_scale")
    assert plan.pairs == plan.unscaled == ()


@pytest.mark.parametrize("name", ["ct_nvfp4", "ct_int8_w8a8"])
def test_real_controls_have_nothing_to_do(name):
    plan = plan_checkpoint(shared(name))
    assert plan.pairs == plan.unscaled == plan.activation_scales == ()
    assert len(plan.untouched_fp8) == (14 if name == "ct_nvfp4" else 0)


def test_mixed_precision_is_decided_tensor_by_tensor():
    plan = plan_of(
        {
            **pair("fp8.weight", "fp8.weight_scale"),
            "nv.weight": (torch.uint8, (4, 4)),
            "nv.weight_scale": (FP8, (4, 1)),
            "plain.weight": (torch.bfloat16, (4, 8)),
            "norm.weight": (torch.bfloat16, (8,)),
        }
    )
    assert [p.weight for p in plan.pairs] == ["fp8.weight"]
    assert plan.untouched_fp8 == ("nv.weight_scale",)
    assert plan.unquantized == ("plain",)


def test_fnuz_weights_are_apart():
    plan = plan_of({"a.weight": (torch.float8_e4m3fnuz, (4, 8)), "a.weight_scale": (torch.float32, ())})
    assert plan.other_formats == ("a.weight",)
    assert plan.pairs == ()


def test_weights_that_share_a_scale_are_one_group():
    name = "mine"
    conventions.register(Convention(name, "{}_proj.weight", "{}_proj.weight_scale", "a test"))
    conventions.register(Convention("fused", "{}.x.weight", "{}.shared_scale", "a test"))
    conventions.register(Convention("fused too", "{}.y.weight", "{}.shared_scale", "a test"))
    try:
        plan = plan_of(
            {**pair("m.x.weight", "m.shared_scale"), "m.y.weight": (FP8, (4, 8)), **pair("n.weight", "n.scale")}
        )
        assert [[p.weight for p in group] for group in plan.groups] == [["m.x.weight", "m.y.weight"], ["n.weight"]]
    finally:
        for rule in (name, "fused", "fused too"):
            conventions.unregister(rule)
    with pytest.raises(OptionError, match="no convention 'mine'"):
        conventions.unregister(name)


# -- activation scales ----------------------------------------------------------------------------------------


def test_activation_scales_belong_to_fp8_modules():
    plan = plan_of(
        {
            **pair("a.weight", "a.weight_scale"),
            "a.input_scale": (torch.float32, ()),
            "b.weight": (torch.bfloat16, (4, 8)),
            "b.input_scale": (torch.float32, ()),  # of a module that is not FP8
            "c.weight_packed": (torch.uint8, (4, 4)),
            "c.input_scale": (torch.float32, ()),  # NVFP4
            "attn.k_scale": (torch.float32, (1,)),
            "attn.v_scale": (torch.float32, (1,)),
            "experts.input_scale": (torch.float32, ()),  # no weight of its own
            "a.other_scale": (torch.float32, ()),
        }
    )
    names = [a.name for a in plan.activation_scales]
    assert names == ["a.input_scale", "attn.k_scale", "attn.v_scale", "experts.input_scale"]
    assert {a.kind for a in plan.activation_scales} == {"input", "kv"}


def test_no_fp8_weight_no_activation_scales():
    assert (
        plan_of({"attn.k_scale": (torch.float32, (1,)), "a.input_scale": (torch.float32, ())}).activation_scales == ()
    )


@pytest.mark.parametrize(
    ("name", "inputs", "kv"),
    [
        ("ct_fp8_static_kv", 14, 4),
        ("modelopt_fp8_kv", 14, 4),
        ("quark_fp8_tensor_kv", 14, 4),
        ("ct_fp8_dynamic", 0, 0),
    ],
)
def test_real_activation_scales(name, inputs, kv):
    kinds = [a.kind for a in plan_checkpoint(shared(name)).activation_scales]
    assert (kinds.count("input"), kinds.count("kv")) == (inputs, kv)


# -- files ----------------------------------------------------------------------------------------------------


def test_scales_in_another_shard_in_any_order(tmp_path):
    first = {"a.weight": random_codes((4, 8)), "b.weight_scale": torch.ones(4, 1)}
    second = {"b.weight": random_codes((4, 8)), "a.weight_scale": torch.ones(4, 1)}
    files = save_shards(tmp_path, first, second)
    for path in (tmp_path, *files):
        plan = plan_checkpoint(path)
        assert plan.scale_of == {"a.weight": "a.weight_scale", "b.weight": "b.weight_scale"}
        assert plan.where("b.weight") == f"{files[1]}: b.weight"


def test_real_split_shards():
    plan = plan_checkpoint(shared("derived_split_shards"))
    assert len(plan.pairs) == 14
    apart = [p for p in plan.pairs if plan.tensors[p.weight].file != plan.tensors[p.scale].file]
    assert apart


def test_the_tiny_checkpoint():
    plan = plan_checkpoint(TINY)
    assert len(plan.pairs) == 14
    assert plan.warnings == ()
    assert "14 FP8 weights" in plan.summary()
    assert plan.to_dict()["tensors"] == len(plan.tensors)


# -- what the config says -------------------------------------------------------------------------------------


def declare(directory, **files) -> Declared:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_declared(directory)


FP8_CONFIG = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}


def test_declared_block_and_method(tmp_path):
    found = declare(tmp_path, config=FP8_CONFIG)
    assert (found.source, found.method, found.fp8, found.block) == ("config.json", "fp8 e4m3", True, (128, 128))


def test_declared_in_other_places(tmp_path):
    assert declare(tmp_path) == Declared()
    assert declare(tmp_path, hf_quant_config={"quantization": {"quant_algo": "FP8"}}).method == "modelopt FP8"
    nested = declare(tmp_path, config={"text_config": FP8_CONFIG})
    assert nested.block == (128, 128)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"quantization_config": "fp8"}', '{"text_config": null}'])
def test_a_config_that_says_nothing(tmp_path, content):
    found = declare(tmp_path, config=content)
    assert found.method == ""
    assert found.block is None


@pytest.mark.parametrize(
    ("section", "promises"),
    [
        ({"quant_method": "fp8"}, True),
        ({"quant_method": "fbgemm_fp8"}, True),
        ({"quant_method": "gptq"}, False),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, True),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, False),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, None),
        ({"config_groups": {"g": {"weights": {"type": "float", "num_bits": 8}}}}, True),
        ({"config_groups": {"g": {"weights": {"type": "int", "num_bits": 8}}}}, False),
        ({"quant_method": "torchao"}, None),
    ],
)  # fmt: skip
def test_promises(tmp_path, section, promises):
    assert declare(tmp_path, config={"quantization_config": section}).fp8 is promises


def test_warnings_where_config_and_tensors_disagree(tmp_path):
    file = save(tmp_path / "model.safetensors", {"a.weight": codes([[1]]), "a.weight_scale": torch.ones(1)})
    assert plan_checkpoint(file).warnings == ()
    declare(tmp_path, config={})
    assert plan_checkpoint(file).warnings == (
        "config.json declares no quantization, but there are float8_e4m3fn weights; their dtype counts",
    )
    declare(tmp_path, config={"quantization_config": {"quant_method": "gptq"}})
    assert "declares gptq, not FP8" in plan_checkpoint(file).warnings[0]
    declare(tmp_path, config=FP8_CONFIG)
    assert plan_checkpoint(file).warnings == ()
    save(file, {"a.weight": torch.ones(2, 2)})
    warnings = plan_checkpoint(file).warnings
    assert warnings == ("config.json declares FP8 (fp8 e4m3), but no tensor is float8_e4m3fn",)
    assert warnings[0] in plan_checkpoint(file).summary()
