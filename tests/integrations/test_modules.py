"""Knowing the built model's modules: what is found, what becomes bfloat16, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

import pytest
import torch

from neuron_fp8_loader import OptionError, load_state_dict
from neuron_fp8_loader.integrations import modules
from neuron_fp8_loader.integrations.complete import as_their_layers, check_complete
from neuron_fp8_loader.integrations.explain import explained
from neuron_fp8_loader.integrations.keys import quantizes_itself, reads_scale_inv
from neuron_fp8_loader.integrations.modules import (
    Modules,
    check_plain,
    experts_of,
    modules_of,
    not_quantized,
    patterns,
    with_bias,
)
from neuron_fp8_loader.integrations.names import modules_to_not_convert
from tests.integrations.checkpoints import write
from tests.integrations.test_names import plan_of
from tests.support import codes, ieee_e4m3, random_codes

LLAMA4 = Modules(
    {
        "layers.0.self_attn.qkv_proj.q_proj": True,
        "layers.0.feed_forward.moe.expert_mlps.mlp_op.gate_up_proj": True,
        "layers.0.feed_forward.moe.expert_mlps.mlp_op.down_proj": True,
        "layers.0.feed_forward.moe.shared_experts.up_proj": False,
        "layers.1.self_attn.qkv_proj.q_proj": True,
    }
)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model.layers.0.self_attn.q_proj", "layers.0.self_attn.qkv_proj.q_proj"),
        (
            "language_model.model.layers.0.feed_forward.experts.3.w1",
            "layers.0.feed_forward.moe.expert_mlps.mlp_op.gate_up_proj",
        ),
        (
            "language_model.model.layers.0.feed_forward.experts.down_proj",
            "layers.0.feed_forward.moe.expert_mlps.mlp_op.down_proj",
        ),
        (
            "language_model.model.layers.0.feed_forward.shared_expert.up_proj",
            "layers.0.feed_forward.moe.shared_experts.up_proj",
        ),
        ("model.layers.1.feed_forward.shared_expert.up_proj", None),
        ("model.layers.0.mlp.up_proj", None),
    ],
)
def test_where_a_name_of_the_checkpoint_goes(name: str, path: str | None) -> None:
    assert LLAMA4.find(name) == path


def test_the_class_of_the_module_counts_and_where_it_is_unknown_the_list() -> None:
    shared, query = "model.layers.0.feed_forward.shared_expert.up_proj", "model.layers.0.self_attn.q_proj"
    elsewhere = "model.layers.0.mlp.up_proj"
    plan = plan_of([shared, query, elsewhere], [])
    assert not_quantized(plan, ["layers.0.mlp"], LLAMA4) == [shared, elsewhere]
    assert not_quantized(plan, ["layers.0.mlp"], None) == [elsewhere]
    assert not_quantized(plan, [], LLAMA4) == [shared]


def test_routers_and_embeddings_are_never_quantized() -> None:
    """A router has another name in the model, where its codes would be cast and its scale left."""
    names = ["model.embed_tokens", *(f"model.layers.0.{block}.gate" for block in ("mlp", "block_sparse_moe"))]
    plan = plan_of([*names, "model.layers.0.mlp.gate_proj"], [])
    assert not_quantized(plan, [], None) == names
    assert modules_to_not_convert(plan) == ["lm_head"]


def test_weights_whose_layers_are_not_quantized_become_bfloat16() -> None:
    weight, scale = random_codes((4, 8), top=0x77), torch.tensor([[1.0], [2.0], [0.5], [3.0]])
    state = {name: t for m in ("router.linear", "x", "y") for name, t in pair_of(m, weight, scale).items()}
    as_their_layers(state, Modules({"router.linear": False, "x": True}), "model", 1)
    assert set(state) == {"router.linear.weight", "x.weight", "x.scale", "y.weight", "y.scale"}
    exact = torch.from_numpy(ieee_e4m3(weight) * scale.double().numpy())
    assert torch.equal(state["router.linear.weight"], exact.bfloat16())
    assert all(state[f"{m}.weight"] is weight for m in "xy")
    as_their_layers(state, None, "model", 1)


def pair_of(module: str, weight: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{module}.weight": weight, f"{module}.scale": scale}


def test_queries_with_a_bias_are_never_quantized() -> None:
    plan = plan_of(["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"], [])
    plan.tensors["model.layers.0.self_attn.q_proj.bias"] = plan.tensors["model.norm.weight"]  # type: ignore[index]
    assert with_bias(plan) == ["model.layers.0.self_attn.q_proj"]


def test_a_weight_that_is_not_fp8_in_a_quantized_layer_is_refused() -> None:
    plan = plan_of(["model.layers.1.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"])
    with pytest.raises(OptionError, match=r"layers\.0\.self_attn\.qkv_proj\.q_proj, for model\.layers\.0"):
        check_plain(plan, (), LLAMA4)
    with pytest.raises(OptionError, match=r"=\['lm_head', 'layers\.0\.self_attn\.qkv_proj\.q_proj'\]"):
        check_plain(plan, (), LLAMA4, ["lm_head"])
    with pytest.raises(OptionError, match=r"layers\.1\.self_attn"):
        check_plain(plan, {"model.layers.1.self_attn.q_proj.weight"}, LLAMA4)
    good = plan_of(["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"], [])
    check_plain(good, (), LLAMA4)


class Block(torch.nn.Module):
    """NxD's MoE module: the kernel's holds the experts once more."""

    def __init__(self, fused: bool, shared: bool) -> None:
        super().__init__()
        self.expert_mlps = torch.nn.ModuleDict(
            {"gate_up_proj": torch.nn.Linear(2, 2), "down_proj": torch.nn.Linear(2, 2)}
        )
        if shared:
            self.shared_experts = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(2, 2)})
        if fused:
            self.moe_fused_tkg = torch.nn.ModuleDict({"expert_mlps": self.expert_mlps})


def quantized_by_nxd(module: torch.nn.Module, entries: list[str], path: str = "") -> set[int]:
    """The layers that NxD's rule quantizes (quantize.py): every path is looked at, one is enough."""
    found = set()
    for name, child in module.named_children():
        at = f"{path}.{name}".lstrip(".")
        if isinstance(child, torch.nn.Linear):
            if name not in entries and not any(entry in at for entry in entries):
                found.add(id(child))
        else:
            found |= quantized_by_nxd(child, entries, at)
    return found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("which", [("gate_up_proj", "down_proj"), ("down_proj",)])
def test_what_a_missing_entry_is_said_to_be_works_by_nxds_own_rule(
    fused: bool, shared: bool, which: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList(torch.nn.ModuleDict({"mlp": Block(fused, shared)}) for _ in range(12))}
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn)
    monkeypatch.setattr(modules, "_built", lambda app: [model])
    seen = modules_of(None)
    assert seen is not None
    wrong = [f"layers.1.mlp.expert_mlps.{name}" for name in which]
    entries = seen.entries_for(wrong)
    assert (
        entries == ["layers.1.mlp"]
        if fused and len(which) == 2 and not shared
        else all("layers.1." in e for e in entries)
    )
    every = quantized_by_nxd(model, [])
    left = {id(model.get_submodule(path)) for path in wrong}
    assert quantized_by_nxd(model, entries) == every - left


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["model.layers.0.a.b", "model.layers.1.a.b"], ["model.layers.*.a.b"]),
        (["model.layers.1.a.b"], ["model.layers.1.a.b"]),
        # a * would also match the experts' own
        (["model.layers.0.x.b", "model.layers.1.x.b"], ["model.layers.0.x.b", "model.layers.1.x.b"]),
        ([], []),
    ],
)
def test_patterns_match_what_was_chosen_and_nothing_else(chosen: list[str], expected: list[str]) -> None:
    names = [f"model.layers.{n}.{m}" for n in range(2) for m in ("a.b", "x.b", "5.x.b", "y.[b]")]
    plan = plan_of(names, [])
    found = patterns(plan, chosen)
    assert found == expected
    assert {n for n in names if any(fnmatchcase(n, p) for p in found)} == set(chosen)


def test_experts_of_a_checkpoint() -> None:
    names = ["model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.shared_expert.up_proj"]
    assert experts_of(plan_of(names, [])) == names[:1]


def test_scales_kept_beside_a_layout(tmp_path: object) -> None:
    """``keep`` leaves out of the layout what its patterns match, and says so where they match nothing."""
    from pathlib import Path

    weight, scale = codes([[0x7E] * 256] * 256), torch.ones(2, 2)
    names = ("model.layers.0.mlp.experts.0.up_proj", "model.layers.0.self_attn.q_proj")
    tensors = {f"{n}.weight": weight.clone() for n in names} | {f"{n}.weight_scale_inv": scale.clone() for n in names}
    path = write(Path(str(tmp_path)), tensors)
    loaded = load_state_dict(path, layout="per_channel", keep=["*.experts.*"])
    assert loaded[f"{names[0]}.weight_scale_inv"].shape == (2, 2)
    assert loaded[f"{names[1]}.weight_scale_inv"].shape == (256, 1)
    with pytest.raises(Exception, match=r"keep='\*\.nothing' matches no FP8 module"):
        load_state_dict(path, layout="per_channel", keep=["*.nothing"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("layers.0.self_attn.Wqkv.scale"), "fused_qkv=False"),
        (KeyError("layers.0.self_attn.q_proj.scale"), r"have a bias.*\*\.self_attn\.\*.*fused_qkv=False"),
        (KeyError("layers.0.mlp.up_proj.scale"), "Leave modules_to_not_convert out"),
        (RuntimeError("Cannot find layers.0.mlp.x.scale in state_dict"), "no scale came for it"),
    ],
)
def test_obscure_errors_are_said_in_words(error: Exception, words: str) -> None:
    with pytest.raises(OptionError, match=words) as raised, explained("model"):
        raise error
    assert raised.value.__cause__ is error


def verify_scale_dimension(error: Exception) -> None:  # as in gqa.py
    raise error


def _setup_for_scale(error: Exception) -> None:  # as in quantization_layers.py
    raise error


def set_bias_to_state_dict(error: Exception) -> None:  # as there
    raise error


@pytest.mark.parametrize(
    ("raised_by", "error", "words"),
    [
        (verify_scale_dimension, AssertionError(), "no text.*per_channel_symmetric"),
        (_setup_for_scale, AssertionError("per_channel_axis cannot be None"), "axis cannot be None.*per_channel_symm"),
        (set_bias_to_state_dict, NotImplementedError(), "with a bias"),
    ],
)
def test_errors_without_a_text_are_told_by_who_raised_them(
    raised_by: Callable[[Exception], None], error: Exception, words: str
) -> None:
    with pytest.raises(OptionError, match=words) as raised, explained("model"):
        raised_by(error)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        KeyError("layers.0.weight"),
        KeyError("rope_scale"),
        KeyError(3),
        RuntimeError("out of memory"),
        RuntimeError("Cannot find a file with rope scales"),
        ValueError("scale"),
        NotImplementedError(),
        AssertionError(),
        AssertionError("Only GLU MLP is supported"),
        AssertionError("logits must be divided by a scale"),
    ],
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, explained("model"):
        raise error
    assert raised.value is error


def test_complete_dicts_pass() -> None:
    whole = {"x.weight": codes([[1]]), "x.scale": torch.ones(1)}
    check_complete(whole, {"x.scale": "x"}, "model", quantized=True)
    check_complete({"x.weight": codes([[1]])}, {}, "model", quantized=True, unscaled=["x"])
    check_complete({"x.weight": torch.ones(1)}, {"x.scale": "x"}, "model", quantized=True)


class ReadsBlockScales:
    """Of a file that speaks of ``weight_scale_inv`` and of ``mlp_op.gate_up_proj.scale"``."""


def test_a_class_that_makes_its_own_quantized_weights() -> None:
    assert reads_scale_inv(ReadsBlockScales)
    assert quantizes_itself(ReadsBlockScales)
    assert not reads_scale_inv(int)
    assert not quantizes_itself(int)
