"""experts="fused" from headers: names, what cannot be stacked, and that it stays quick."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
from experts import Kind, per_expert
from support import random_codes

from neuron_fp8_loader import Options, PlanError, rescale_state_dict
from neuron_fp8_loader.checkpoint import TensorInfo
from neuron_fp8_loader.conventions.experts import FAMILIES, is_among_experts, locate
from neuron_fp8_loader.plan import make_plan, make_recipe

BLOCK = "model.layers.0.mlp"
EXPERTS = f"{BLOCK}.experts"
BLOCKS = Kind(scale=".weight_scale_inv", covers="block")


@pytest.mark.parametrize(
    "block",
    [
        "model.layers.0.mlp",
        "model.layers.3.block_sparse_moe",
        "language_model.model.layers.1.feed_forward",
        "layers.2.ffn",
        "model.layers.0.moe.experts.inner",
        "",
    ],
)
def test_the_block_keeps_its_name(block):
    sd = {n.removeprefix("."): t for n, t in per_expert(Kind(), 2, 64, 96, block=block).items()}
    out = rescale_state_dict(sd, experts="fused")
    fused = (block and block + ".") + "expert_mlps.mlp_op."
    assert set(out) == {fused + p + e for p in ("gate_up_proj", "down_proj") for e in (".weight", ".scale")}


def test_shared_experts_and_routers_are_left_alone():
    sd = {
        f"{BLOCK}.shared_experts.gate_proj.weight": random_codes((8, 8)),
        f"{BLOCK}.shared_experts.gate_proj.weight_scale": torch.ones(8, 1),
        f"{BLOCK}.shared_expert_gate.weight": torch.ones(1, 8),
        f"{BLOCK}.gate.e_score_correction_bias": torch.ones(4),
        "experts_are_great.weight": torch.ones(2),
    }
    assert set(rescale_state_dict(sd, experts="fused")) == set(sd)


def refused(sd: dict[str, torch.Tensor], layout: str = "per_channel", **options: object) -> tuple[str, ...]:
    with pytest.raises(PlanError) as caught:
        rescale_state_dict(sd, experts="fused", layout=layout, **options)
    assert caught.value.problems
    return caught.value.problems


def without(sd: dict[str, torch.Tensor], *parts: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in sd.items() if not any(part in name for part in parts)}


def test_missing_experts_and_projections_all_at_once():
    sd = per_expert(Kind(), 12, 64, 96)
    problems = refused(without(sd, "experts.3.", "experts.7.up_proj", "experts.11.down_proj"))
    assert len(problems) == 3
    assert problems[0].startswith(f"{EXPERTS}.3: is missing, and there is expert 11; expected gate_proj, up_proj")
    assert any(p.startswith(f"{EXPERTS}.7.up_proj: is missing") for p in problems)
    assert any(p.startswith(f"{EXPERTS}.11.down_proj: is missing") for p in problems)
    (problem,) = refused({**without(sd, "experts.11."), f"{BLOCK}.gate.weight": torch.ones(12, 96)})
    assert problem.startswith(f"{BLOCK}.gate.weight: routes to 12 experts, and there are 11")


def test_an_expert_unlike_the_others():
    name = f"{EXPERTS}.2.up_proj.weight"
    sd = per_expert(Kind(), 4, 64, 96)
    other = {
        "bfloat16": {name: torch.ones(64, 96).bfloat16()},
        "[32, 96]": {name: random_codes((32, 96)), name + "_scale": torch.ones(32, 1)},
        "scale per tensor": {name: sd[name], name + "_scale": torch.ones(())},
        "(scale)": {name: sd[name], name.replace("weight", "scale"): sd[name + "_scale"]},
        "torch.bfloat16 [64, 1]": {name: sd[name], name + "_scale": sd[name + "_scale"].bfloat16()},
    }
    for text, tensors in other.items():
        (problem,) = refused(without(sd, "experts.2.up_proj") | tensors)
        assert problem.startswith(f"{name}: is ")
        assert text.removeprefix("torch.") in problem
        assert "; expected float8_e4m3fn [64, 96] with a scale per row, float32 [64, 1]" in problem


def test_projections_that_do_not_go_together():
    sd = per_expert(Kind(), 2, 64, 96)
    for expert in range(2):
        sd[f"{EXPERTS}.{expert}.down_proj.weight"] = random_codes((96, 32))
    (problem,) = refused(sd)
    assert problem.startswith(f"{EXPERTS}.down_proj: has shape [96, 32]; expected [96, 64] beside [64, 96]")
    stack = {f"{EXPERTS}.gate_up_proj": random_codes((2, 64, 64)), f"{EXPERTS}.gate_up_proj_scale_inv": torch.ones(())}
    (problem,) = refused(stack)
    assert problem.startswith(f"{EXPERTS}.down_proj: is missing")


def test_two_kinds_of_names():
    sd = per_expert(Kind(), 2, 64, 96) | per_expert(Kind(names="w"), 2, 64, 96)
    (problem,) = refused(sd)
    assert "gate_proj/up_proj/down_proj and w1/w3/w2" in problem


@pytest.mark.parametrize(
    "name",
    [
        "2.gate_proj.weight_packed",
        "0.gate_proj.bias",
        "mlp.w1",
        "gate_proj.weight",
        "٣.up_proj.weight",
        "007.up_proj.weight",
    ],
)
def test_what_is_not_understood_is_not_lost(name):
    dtype = torch.uint8 if name.endswith("packed") else torch.bfloat16
    (problem,) = refused({**per_expert(Kind(), 2, 64, 96), f"{EXPERTS}.{name}": torch.ones(4, 4, dtype=dtype)})
    assert problem.startswith(f"{EXPERTS}.{name}: is {str(dtype).removeprefix('torch.')} [4, 4]")
    assert "gate_proj, up_proj, down_proj; w1, w3, w2; all in one: gate_up_proj, down_proj" in problem


def test_experts_without_scales_are_refused():
    sd = without(per_expert(Kind(), 2, 64, 96), "experts.1.up_proj.weight_scale")
    assert refused(sd)[0].startswith(f"{EXPERTS}.1.up_proj.weight: is float8_e4m3fn")
    assert refused(sd, unscaled="dequantize")


def test_kept_blocks_must_be_whole():
    for inner, hidden in ((192, 256), (128, 192)):
        problems = refused(per_expert(BLOCKS, 2, inner, hidden), layout="keep")
        assert all('layout="per_channel"' in problem and "128x128" in problem for problem in problems)
    rescale_state_dict(per_expert(BLOCKS, 2, 192, 192), experts="fused", layout="per_channel")


def test_dequantize_does_not_reach_experts():
    problems = refused(per_expert(Kind(), 2, 64, 96), dequantize=["*.experts.1.*"])
    assert len(problems) == 3
    assert all("experts=" in problem and "dequantize=" in problem for problem in problems)


def test_a_name_that_is_taken():
    sd = per_expert(Kind(), 2, 64, 96)
    sd[f"{BLOCK}.expert_mlps.mlp_op.down_proj.weight"] = torch.ones(2, 2)
    (problem,) = refused(sd)
    assert problem.startswith(f"{BLOCK}.expert_mlps.mlp_op.down_proj.weight: the experts and ")


def test_numbers_from_a_hostile_file():
    sd = per_expert(Kind(), 1, 8, 8)
    far = {n.replace("experts.0", "experts.999999"): t for n, t in sd.items()}
    assert refused(sd | far)[0].startswith(f"{EXPERTS}.1: is missing, and there is expert 999999")
    digits = {n.replace("experts.0", "experts." + "9" * 5000): t for n, t in sd.items()}
    assert len(refused(sd | digits)) == 3


def test_families_are_data():
    for names in FAMILIES:
        assert len(names.parts) == (2 if names.stacked else 3)
        for part, name in enumerate(names.parts):
            found = locate(f"a.b.experts.{name}" if names.stacked else f"a.b.experts.17.{name}")
            assert found is not None
            assert (found.block, found.part, found.expert) == ("a.b", part, None if names.stacked else 17)
    assert len(Counter(name for names in FAMILIES for name in names.parts if not names.stacked)) == 6
    assert not is_among_experts("model.layers.0.mlp.shared_experts.up_proj.weight")


def headers(layers: int, experts: int) -> dict[str, TensorInfo]:
    found = {}
    for layer in range(layers):
        for expert in range(experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
                shape = (7168, 2048) if part == "down_proj" else (2048, 7168)
                grid = (56, 16) if part == "down_proj" else (16, 56)
                found[name] = TensorInfo(name, "float8_e4m3fn", shape, 7168 * 2048)
                scale = name + "_scale_inv"
                found[scale] = TensorInfo(scale, "float32", grid, 4 * 16 * 56)
    return found


def test_planning_grows_with_the_number_of_experts():
    """In proportion, not with its square: 60 layers of 256 experts are 46,000 pairs."""

    def seconds(layers: int, experts: int) -> float:
        plan = make_plan(headers(layers, experts), "made up")
        best = 1e9
        for _ in range(3):
            begin = time.process_time()
            recipe = make_recipe(plan, Options(experts="fused", layout="per_channel"))
            assert not recipe.torn(recipe.steps)
            best = min(best, time.process_time() - begin)
        assert len(recipe.fused) == 4 * layers
        return best

    one = seconds(2, 256)
    assert seconds(4, 256) < 3.2 * one
    assert seconds(2, 512) < 3.2 * one


@pytest.mark.parametrize("kind", ["_scale_inv", "_weight_scale"])
@pytest.mark.parametrize("inputs_first", [True, False])
def test_shapes_say_how_stacks_lie_whatever_their_names(kind, inputs_first):
    """Qwen3-VL-MoE has transformers' names and [experts, in, out]."""
    experts, hidden, inner = 2, 128, 192
    shapes = {"gate_up_proj": (hidden, 2 * inner), "down_proj": (inner, hidden)}
    sd = {}
    for name, (inputs, outputs) in shapes.items():
        matrix = (inputs, outputs) if inputs_first else (outputs, inputs)
        sd[f"{EXPERTS}.{name}"] = random_codes((experts, *matrix))
        sd[f"{EXPERTS}.{name}{kind}"] = torch.rand(experts, -(-matrix[0] // 64), -(-matrix[1] // 64)) + 0.5
    out = rescale_state_dict(sd, layout="per_channel")
    for name, (_, outputs) in shapes.items():
        shape = (experts, 1, outputs) if inputs_first else (experts, outputs, 1)
        assert out[f"{EXPERTS}.{name}{kind}"].shape == shape
    fused = rescale_state_dict(sd, layout="per_channel", experts="fused")
    for name, (_, outputs) in shapes.items():
        scale = fused[f"{BLOCK}.expert_mlps.mlp_op.{name}.scale"]
        assert torch.equal(scale, out[f"{EXPERTS}.{name}{kind}"].reshape(experts, 1, outputs))


@pytest.mark.parametrize("names", [("moe.gate_proj", "moe.down_proj"), ("block_sparse_moe.input_linear",)])
def test_stacks_of_a_family_that_is_not_known_are_not_passed_over(names):
    """Step-3 and Granite."""
    sd = {}
    for name in names:
        sd[f"model.layers.0.{name}.weight"] = random_codes((4, 32, 64))
        sd[f"model.layers.0.{name}.weight_scale"] = torch.rand(4, 32, 1) + 0.5
    problems = refused(sd)
    assert [p.partition(": is float8_e4m3fn [4, 32, 64]; ")[0] for p in problems] == list(sd)[::2]
