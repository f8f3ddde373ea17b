"""``modules_to_not_convert``. The oracle is NxD's own rule, restated: an entry matches the paths that contain it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuron_fp8_loader import plan_checkpoint
from neuron_fp8_loader.checkpoint import describe
from neuron_fp8_loader.integrations import names
from neuron_fp8_loader.integrations.names import contradictions, misnamed, modules_to_not_convert
from neuron_fp8_loader.plan import Plan, make_plan
from tests.support import TINY, shared

QKV = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def plan_of(fp8: list[str], plain: list[str], *, tied: bool = False) -> Plan:
    """A plan of modules with 16x16 weights; embeddings and a norm are always there, lm_head unless tied."""
    tensors = {
        "model.embed_tokens.weight": torch.zeros(16, 16, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(16),
    }
    if not tied and "lm_head" not in fp8:
        plain = [*plain, "lm_head"]
    for name in fp8:
        tensors[f"{name}.weight"] = torch.zeros(16, 16).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = torch.ones(16, 1)
    tensors |= {f"{name}.weight": torch.zeros(16, 16, dtype=torch.bfloat16) for name in plain}
    return make_plan({name: describe(name, t) for name, t in tensors.items()}, "test")


def nxdi_path(name: str, fused_qkv: bool = False) -> str:
    """Where NxD Inference puts a HF module (modeling_llama.py, gqa.py, modeling_qwen3_moe.py)."""
    name = name.removeprefix("model.")
    head, _, last = name.rpartition(".")
    if last in QKV:
        return f"{head}.qkv_proj.{'Wqkv' if fused_qkv else last}"
    if last == "o_proj":
        return f"{name}.o_proj"
    if ".experts." in name:
        return (
            f"{name.split('.experts.')[0]}.expert_mlps.mlp_op.{'down_proj' if last == 'down_proj' else 'gate_up_proj'}"
        )
    return name.replace(".shared_expert.", ".shared_experts.")


def converted(path: str, entries: list[str]) -> bool:
    """Does NxD make the layer at ``path`` a quantized one? (quantize.py)"""
    return path.split(".")[-1] not in entries and not any(entry in path for entry in entries)


def layer(n: int, *parts: str) -> list[str]:
    groups = {"attn": [f"self_attn.{p}" for p in (*QKV, "o_proj")], "mlp": [f"mlp.{p}" for p in MLP]}
    return [f"model.layers.{n}.{name}" for part in parts for name in groups.get(part, [part])]


def test_a_plain_model_leaves_out_lm_head_only() -> None:
    assert modules_to_not_convert(plan_of([*layer(0, "attn", "mlp"), *layer(1, "attn", "mlp")], [])) == ["lm_head"]


def test_whole_blocks_are_named_as_nxdi_asks_for_them() -> None:
    # modeling_llama.py: fused QKV asks for `f"layers.{l}.self_attn" in list`, get_updated_configs for layers.{i}.mlp
    plan = plan_of(
        [*layer(0, "mlp"), *layer(1, "attn")], [*layer(0, "attn"), *layer(1, "mlp"), *layer(2, "attn", "mlp")]
    )
    assert modules_to_not_convert(plan) == [
        "layers.0.self_attn", "layers.1.mlp", "layers.2.mlp", "layers.2.self_attn", "lm_head",
    ]  # fmt: skip


def test_single_projections_have_their_nxdi_names() -> None:
    fp8 = [*layer(0, "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")]
    entries = modules_to_not_convert(plan_of(fp8, layer(0, "self_attn.q_proj", "mlp.down_proj")))
    assert entries == ["layers.0.mlp.down_proj", "layers.0.self_attn.qkv_proj.q_proj", "lm_head"]


def test_qkv_as_one_where_only_o_proj_is_fp8() -> None:
    plain = [f"model.layers.0.self_attn.{p}" for p in QKV]
    assert "layers.0.self_attn.qkv_proj" in modules_to_not_convert(plan_of(layer(0, "self_attn.o_proj"), plain))


def test_layer_1_is_not_layer_11() -> None:
    entries = modules_to_not_convert(plan_of(layer(11, "attn", "mlp"), layer(1, "attn", "mlp")))
    assert entries == ["layers.1.mlp", "layers.1.self_attn", "lm_head"]
    assert all(converted(nxdi_path(name), entries) for name in layer(11, "attn", "mlp"))


def test_a_router_is_not_named_for_it_would_hit_gate_proj() -> None:
    plan = plan_of(layer(0, "attn", "mlp"), layer(0, "mlp.gate"))
    assert modules_to_not_convert(plan) == ["lm_head"]
    experts = [f"model.layers.1.mlp.experts.{e}.{p}" for e in range(2) for p in MLP]
    assert modules_to_not_convert(plan_of(experts, layer(1, "mlp.gate", "attn"))) == ["layers.1.self_attn", "lm_head"]


def test_experts_and_shared_experts_apart() -> None:
    experts = [f"model.layers.0.mlp.experts.{e}.{p}" for e in range(2) for p in MLP]
    common = [f"model.layers.0.mlp.shared_expert.{p}" for p in MLP]
    assert modules_to_not_convert(plan_of(experts, common)) == ["layers.0.mlp.shared_experts", "lm_head"]
    assert modules_to_not_convert(plan_of(common, experts)) == ["layers.0.mlp.expert_mlps", "lm_head"]


def test_tied_lm_head_is_in_no_file_and_still_named() -> None:
    assert modules_to_not_convert(plan_of(layer(0, "attn", "mlp"), [], tied=True)) == ["lm_head"]
    fp8 = [*layer(0, "attn", "mlp"), "model.embed_tokens"]  # which NxD does not quantize: it is loaded as bfloat16
    assert modules_to_not_convert(plan_of(fp8, [], tied=True)) == ["lm_head"]
    assert modules_to_not_convert(plan_of([*fp8, "lm_head"], [])) == []


def test_fp8_lm_head_is_not_named() -> None:
    assert modules_to_not_convert(plan_of(["lm_head", *layer(0, "attn")], layer(0, "mlp"))) == ["layers.0.mlp"]


def test_other_towers_are_not_the_decoders_business() -> None:
    # "layers.0.mlp" inside the entry would switch the kernel of the decoder's own layer 0 off
    tower = ["vision_tower.encoder.layers.0.mlp.fc1", "visual.blocks.0.attn.qkv", "multi_modal_projector.linear_1"]
    assert modules_to_not_convert(plan_of(layer(0, "attn", "mlp"), tower)) == ["lm_head"]


def test_language_model_prefixes_are_stripped() -> None:
    for prefix in ("language_model.model.", "model.language_model.", "transformer."):
        plan = plan_of([f"{prefix}layers.0.mlp.{p}" for p in MLP], [f"{prefix}layers.0.self_attn.q_proj"])
        assert modules_to_not_convert(plan) == ["layers.0.self_attn", "lm_head"]


def test_what_cannot_be_named_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    experts = [f"model.layers.0.mlp.experts.{e}.{p}" for e in range(2) for p in MLP]
    with caplog.at_level(logging.WARNING, logger="neuron_fp8_loader"):
        entries = modules_to_not_convert(plan_of(experts[1:], experts[:1]))
    assert entries == ["lm_head"]
    assert "experts.0.gate_proj" in caplog.text


def test_dequantized_weights_count_as_unquantized() -> None:
    plan = plan_of(layer(0, "attn", "mlp"), [])
    dequantized = [f"{name}.weight" for name in layer(0, "attn")]
    assert modules_to_not_convert(plan, dequantized) == ["layers.0.self_attn", "lm_head"]


def test_contradictions_list_both_sides() -> None:
    plan = plan_of(layer(0, "attn", "mlp"), layer(1, "attn"))
    assert contradictions(plan, modules_to_not_convert(plan)) == ([], [])
    fp8, missing = contradictions(plan, ["layers.0.mlp", "lm_head"])
    assert fp8 == layer(0, "mlp")
    assert missing == layer(1, "attn")
    assert contradictions(plan, ["layers.1.self_attn"]) == ([], ["lm_head"])
    assert contradictions(plan, ["lm_head", "layers.1.self_attn", "mlp.gate"])[0] == ["model.layers.0.mlp.gate_proj"]


def test_contradictions_are_decided_by_the_paths_that_nxd_looks_at() -> None:
    plan = plan_of(layer(0, "mlp"), layer(0, "attn"))
    assert contradictions(plan, ["self_attn", "lm_head"]) == ([], [])
    for entries in (layer(0, "attn"), ["layers.0.self_attn.q_proj"], ["o_proj", "layers.0.self_attn.v_proj"]):
        left = [n for n in layer(0, "attn") if converted(nxdi_path(n), entries)]
        assert left
        assert contradictions(plan, ["lm_head", *entries]) == ([], left)
    fp8 = plan_of(layer(0, "attn", "mlp"), [])
    assert contradictions(fp8, ["lm_head", *layer(0, "attn", "mlp")]) == ([], [])


@pytest.mark.parametrize(
    ("entry", "instead"),
    [
        ("model.layers.1.self_attn.q_proj", ["layers.1.self_attn.qkv_proj.q_proj"]),
        ("layers.1.self_attn.q_proj", ["layers.1.self_attn.qkv_proj.q_proj"]),
        ("model.layers.1.self_attn.o_proj.weight", ["layers.1.self_attn.o_proj"]),
        ("model.layers.1.self_attn", ["layers.1.self_attn"]),
        ("model.layers.1", ["layers.1."]),  # and not layer 11
        ("model.layers.1.", ["layers.1."]),
        ("model.layers.1.mlp.experts", [f"layers.1.mlp.expert_mlps.mlp_op.{p}_proj" for p in ("down", "gate_up")]),
        ("mlp.experts.0", [f"layers.1.mlp.expert_mlps.mlp_op.{p}_proj" for p in ("down", "gate_up")]),
        ("layers.1.self_attn", None),
        ("q_proj", None),
        ("layers.1.mlp.expert_mlps", None),
        ("model.layers.7.mlp", None),  # of no module: it means nothing here, and harms nothing
        ("model.layers.1.mlp.gate", None),  # a router
        ("model.vision_tower", None),
    ],
)
def test_entries_that_only_the_checkpoint_knows(entry: str, instead: list[str] | None) -> None:
    experts = [f"model.layers.1.mlp.experts.{e}.{p}" for e in range(2) for p in MLP]
    names = [*layer(1, "attn"), *experts, *layer(11, "attn", "mlp")]
    plan = plan_of(names, layer(1, "mlp.gate"))
    assert misnamed(plan, [entry]) == ({} if instead is None else {entry: instead})
    if instead is not None:
        assert all(converted(nxdi_path(name), [entry]) for name in names)
        meant = [nxdi_path(n) for n in names if f"{entry.removesuffix('.weight').rstrip('.')}." in f"{n}."]
        assert {nxdi_path(n) for n in names if not converted(nxdi_path(n), instead)} == set(meant)


@pytest.mark.parametrize(
    ("entry", "instead"),
    [
        (
            r"re:.*layers\.1\.self_attn.*",
            [f"layers.1.self_attn.{p}" for p in ("o_proj", *(f"qkv_proj.{q}_proj" for q in "kqv"))],
        ),
        ("re:.*lm_head", ["lm_head"]),
        ("*.1.self_attn.o_proj", ["layers.1.self_attn.o_proj"]),
        ("re:.*mlp.gate$", None),  # a router
        ("re:(", None),
        ("layers.[", None),
    ],
)
def test_patterns_are_texts_to_nxd(entry: str, instead: list[str] | None) -> None:
    plan = plan_of([*layer(1, "attn"), *layer(11, "attn", "mlp")], layer(1, "mlp.gate"))
    assert misnamed(plan, [entry]) == ({} if instead is None else {entry: instead})


def test_a_long_list_is_held_against_many_experts_once_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3 has 58 layers of 256 experts, and lists name modules one by one."""
    asked: list[str] = []
    experts = [f"model.layers.{n}.mlp.experts.{e}.{p}" for n in range(4) for e in range(50) for p in MLP]
    plan = plan_of(experts, [])
    real = names._named

    def counted(module: Any, entries: list[str]) -> bool:
        asked.append(module.name)
        return real(module, entries)

    monkeypatch.setattr(names, "_named", counted)
    assert contradictions(plan, ["lm_head", "layers.9.mlp"]) == ([], [])
    assert len(asked) <= 4 * 2 + 1


def test_latent_attention_has_its_q_proj_where_the_checkpoint_has_it() -> None:
    """DeepSeek-V2-Lite: no low rank of queries, and no fused layer that holds q, k and v."""
    names = layer(0, *(f"self_attn.{n}" for n in ("q_proj", "kv_a_proj_with_mqa", "o_proj")))
    plan = plan_of(names[1:], names[:1])
    assert contradictions(plan, ["lm_head", "layers.0.self_attn.q_proj"]) == ([], [])
    assert misnamed(plan, ["layers.0.self_attn.q_proj"]) == {}
    assert "layers.0.self_attn.q_proj" in modules_to_not_convert(plan)


def test_minimax_has_its_experts_in_a_block_of_the_checkpoints_name() -> None:
    experts = [f"model.layers.0.block_sparse_moe.experts.{e}.w{p}" for e in range(2) for p in (1, 2, 3)]
    plan = plan_of(layer(0, "attn"), experts)
    for entry in ("block_sparse_moe", "layers.0.mlp"):
        assert contradictions(plan, ["lm_head", entry]) == ([], [])
    assert contradictions(plan, ["lm_head", "model.layers.0.block_sparse_moe"])[1] == experts


def test_modules_that_nxdi_need_not_quantize_are_never_missing() -> None:
    plan = plan_of(layer(0, "attn", "mlp"), layer(0, "mlp.gate", "mlp.shared_expert_gate", "eh_proj"))
    assert contradictions(plan, ["lm_head"]) == ([], [])


NAMES = [name for n in (0, 1, 11, 12) for name in layer(n, "attn", "mlp")]


@given(st.lists(st.booleans(), min_size=len(NAMES), max_size=len(NAMES)), st.booleans())
def test_exactly_the_fp8_modules_are_converted(flags: list[bool], tied: bool) -> None:
    fp8 = [name for name, flag in zip(NAMES, flags, strict=True) if flag]
    plain = [name for name in NAMES if name not in fp8]
    plan = plan_of(fp8, plain, tied=tied)
    entries = modules_to_not_convert(plan)
    assert [name for name in NAMES if converted(nxdi_path(name), entries)] == fp8
    assert not converted("lm_head", entries)
    assert contradictions(plan, entries) == ([], [])


def test_fused_qkv_is_converted_as_one() -> None:
    plan = plan_of(layer(0, "attn"), layer(1, "attn"))
    entries = modules_to_not_convert(plan)
    assert converted(nxdi_path("model.layers.0.self_attn.q_proj", fused_qkv=True), entries)
    assert not converted(nxdi_path("model.layers.1.self_attn.q_proj", fused_qkv=True), entries)


def test_the_example_checkpoint() -> None:
    assert modules_to_not_convert(plan_checkpoint(TINY)) == ["lm_head"]


@pytest.mark.parametrize(
    "name",
    [
        "ct_fp8_dynamic_moe",
        "hf_fp8_block",
        "hf_fp8_block_moe_fused",
        "modelopt_fp8",
        "torchao_fp8_wo",
        "derived_fbgemm",
    ],
)
def test_real_checkpoints(name: str) -> None:
    plan = plan_checkpoint(shared(name))
    entries = modules_to_not_convert(plan)
    assert "lm_head" in entries
    assert contradictions(plan, entries) == ([], [])
    for pair in plan.pairs:
        module = pair.weight.removesuffix("._weight_qdata").removesuffix(".weight")
        assert converted(nxdi_path(module), entries), module


def test_what_latent_attention_multiplies_by_is_never_quantized() -> None:
    attention = [f"self_attn.{n}" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
    plan = plan_of([*layer(0, *attention), *layer(0, "mlp")], [])
    assert modules_to_not_convert(plan) == ["layers.0.self_attn.kv_b_proj", "lm_head"]


def test_vectors_that_are_layers_in_linear_attention() -> None:
    names = [f"model.language_model.layers.0.linear_attn.{n}" for n in ("A_log", "dt_bias")]
    plan = plan_of(layer(0, "linear_attn.in_proj_z"), [])
    plan = make_plan(plan.tensors | {n: describe(n, torch.zeros(4)) for n in names}, "test")
    listed = modules_to_not_convert(plan)
    assert listed == ["layers.0.linear_attn.A_log", "layers.0.linear_attn.dt_bias", "lm_head"]
    assert not converted("layers.0.linear_attn.A_log_weight", listed)
    assert contradictions(plan, ["lm_head"])[1] == names


def test_dbrx_by_the_paths_that_its_modules_have() -> None:
    at = "transformer.blocks.3."
    attention = [f"{at}norm_attn_norm.attn.{n}" for n in ("Wqkv", "out_proj")]
    experts = [f"{at}ffn.experts.mlp.{n}" for n in ("w1", "v1", "w2")]
    assert modules_to_not_convert(plan_of(experts, [*attention, f"{at}ffn.router.layer"])) == [
        "layers.3.self_attn", "lm_head",
    ]  # fmt: skip
    listed = modules_to_not_convert(plan_of([*experts[:2], *attention], [experts[2]]))
    assert listed == ["layers.3.ffn.expert_mlps.mlp_op.down_proj", "lm_head"]
    assert converted("layers.3.ffn.expert_mlps.mlp_op.gate_up_proj", listed)
    listed = modules_to_not_convert(plan_of(attention[1:], attention[:1]))
    assert not converted("layers.3.self_attn.qkv_proj.Wqkv", listed)
    assert converted("layers.3.self_attn.o_proj.o_proj", listed)
