"""Families of models that take experts in a form of their own, on the stand-in of NxD Inference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neuron_fp8_loader import OptionError, WeightError
from neuron_fp8_loader.codes.granularity import granularity
from neuron_fp8_loader.integrations.experts import parts_of
from neuron_fp8_loader.plan import Pair
from tests.integrations.apps import config_for
from tests.integrations.checkpoints import write
from tests.integrations.conftest import Standin
from tests.integrations.moe_checkpoints import quantized
from tests.integrations.test_experts import (
    BLOCKWISE,
    EXPERT_WISE,
    EXPERTS,
    HIDDEN,
    INTER,
    LAYERS,
    checkpoint,
    conversion,
    pairs,
)
from tests.support import random_codes, sqnr

Tensors = dict[str, torch.Tensor]
FLAT = ("w1", "v1", "w2")
FP8 = torch.float8_e4m3fn


def load(nxdi: Standin, family: str, path: str, convert: Callable[..., Tensors], **given: Any) -> Tensors:
    base = nxdi.application.NeuronApplicationBase
    body = {"convert_hf_to_neuron_state_dict": staticmethod(convert), "__module__": f"contrib.modeling_{family}"}
    config = config_for(nxdi, path, **given)
    config.ffn_config = SimpleNamespace(moe_num_experts=EXPERTS)
    loaded: Tensors = type("App", (base,), body)(path, config).checkpoint_loader_fn()
    return loaded


def sees_no_experts(state_dict: Tensors, config: Any) -> Tensors:
    """A conversion that would quantize experts anew, if it found them."""
    assert not [name for name in state_dict if ".experts." in name]
    return {name: t for name, t in state_dict.items() if not name.startswith(f"layers.{LAYERS}.")}


@pytest.mark.parametrize(("family", "place"), [("glm5", "feed_forward.moe"), ("qwen35", "mlp.moe")])
@pytest.mark.parametrize("given", [EXPERT_WISE, BLOCKWISE])
def test_experts_are_put_around_a_conversion(
    enabled: Standin, tmp_path: Path, family: str, place: str, given: dict[str, Any]
) -> None:
    tensors, exact = checkpoint("block")
    one_more = {n.replace("layers.0.", f"layers.{LAYERS}."): t.clone() for n, t in tensors.items() if "layers.0." in n}
    loaded = load(enabled, family, write(tmp_path, tensors | one_more), sees_no_experts, **given)
    least = 50 if given is BLOCKWISE else 25
    for name, want, got in pairs(loaded, exact, place=place):
        assert all(sqnr(w, g) > least for w, g in zip(want, got, strict=True)), name
    # a layer that the model does not have, such as one that predicts more tokens, is dropped
    assert not [name for name in loaded if name.startswith(f"layers.{LAYERS}.")]


def test_experts_of_a_model_without_quantized_layers_lie_as_it_takes_them(enabled: Standin, tmp_path: Path) -> None:
    """Qwen3.5's conversion does not miss experts that lie one by one: it would have none."""
    tensors, exact = checkpoint("block")
    given = {"quantized": False, "fp8_rescale": {"dequantize": ["*"]}}
    loaded = load(enabled, "qwen35", write(tmp_path, tensors), sees_no_experts, **given)
    for layer in range(LAYERS):
        down = loaded[f"layers.{layer}.mlp.moe.expert_mlps.mlp_op.down_proj.weight"]
        for expert in range(EXPERTS):
            want = exact[f"layers.{layer}.mlp.experts.{expert}.down_proj"]
            assert torch.equal(down[expert].T, want.bfloat16())


def test_a_conversion_that_stops_at_fp8_weights_is_explained(enabled: Standin, tmp_path: Path) -> None:
    def stops(state_dict: Tensors, config: Any) -> Tensors:
        raise KeyError("layers.0.feed_forward.experts.down_proj")

    tensors, _ = checkpoint("channel")
    path = write(tmp_path, tensors)
    with pytest.raises(WeightError, match=r"quantized=False, but 20 FP8 weights") as error:
        load(enabled, "llama4", path, stops, quantized=False)
    assert isinstance(error.value.__cause__, KeyError)
    with pytest.raises(KeyError):
        load(enabled, "llama4", path, stops, quantized=False, fp8_rescale={"dequantize": ["*"]})


@pytest.mark.parametrize("plain", ["down_proj", "gate_up_proj"])
def test_half_of_the_experts_as_bfloat16(enabled: Standin, tmp_path: Path, plain: str) -> None:
    """A conversion that stacks in one dtype would cast the others; where they are stacked here, each has its own."""
    tensors, _ = checkpoint("channel")
    path = write(tmp_path, tensors)
    given = {**EXPERT_WISE, "modules_to_not_convert": ["lm_head", f"mlp_op.{plain}"]}
    with pytest.raises(OptionError, match=r"the experts of a layer in one dtype.*both gate_up_proj and"):
        load(enabled, "qwen3_moe", path, lambda tensors, config: tensors, **given)
    loaded = load(enabled, "qwen35", path, sees_no_experts, **given)
    for part in ("down_proj", "gate_up_proj"):
        name = f"layers.0.mlp.moe.expert_mlps.mlp_op.{part}"
        assert (loaded[f"{name}.weight"].dtype == torch.bfloat16) == (part == plain)
        assert (f"{name}.scale" in loaded) == (part != plain)


@pytest.mark.parametrize("chosen", [["*gate_proj"], ["*.experts.0.*"], ["*.experts.2.down_proj"]])
@pytest.mark.parametrize("family", ["qwen35", "qwen3_moe", "unheard_of"])
def test_some_experts_as_bfloat16_for_a_model_without_quantized_layers(
    enabled: Standin, tmp_path: Path, family: str, chosen: list[str]
) -> None:
    """The codes of the others would be cast to bfloat16, and so be used as values, and no FP8 weight be left."""

    def stack(state_dict: Tensors, config: Any) -> Tensors:
        for head in {name.partition(".experts.")[0] for name in state_dict if ".experts." in name}:
            for proj in ("gate_proj", "up_proj", "down_proj"):
                parts = [state_dict.pop(f"{head}.experts.{n}.{proj}.weight") for n in range(EXPERTS)]
                both = torch.empty(EXPERTS, *parts[0].shape, dtype=torch.bfloat16)
                for n, part in enumerate(parts):
                    both[n] = part
                state_dict[f"{head}.expert_mlps.{proj}.weight"] = both
        return {name: t for name, t in state_dict.items() if ".experts." not in name}

    given = {"quantized": False, "fp8_rescale": {"dequantize": ["*.self_attn.*", *chosen]}}
    with pytest.raises(OptionError, match=r"is FP8, and \S+ is not, or not any more.*\*\.experts\.\*"):
        load(enabled, family, write(tmp_path, checkpoint("block")[0]), stack, **given)


@pytest.mark.parametrize("kept", [False, True])
def test_experts_that_predict_more_tokens_are_of_no_layer_of_the_decoder(
    enabled: Standin, tmp_path: Path, kept: bool
) -> None:
    """Qwen3.5's `mtp.layers.0`: its port drops it."""
    tensors, exact = checkpoint("block")
    as_bytes = {n: t.view(torch.uint8) if t.dtype == FP8 else t for n, t in tensors.items() if ".layers." in n}
    more = {n.replace("model.", "mtp."): t.flip(0) for n, t in as_bytes.items()}
    more = {n: t.view(FP8) if n.endswith(".weight") else t for n, t in more.items()}
    stack = conversion()

    def convert(state_dict: Tensors, config: Any) -> Tensors:
        own = {n.removeprefix("mtp."): state_dict.pop(n) for n in list(state_dict) if n.startswith("mtp.")}
        result = stack(state_dict, config)
        return result | {f"mtp.{n}": t for n, t in stack(own, config).items()} if kept else result

    loaded = load(enabled, "unheard_of", write(tmp_path, tensors | more), convert, **EXPERT_WISE)
    upside_down = {name: value.flip(0) for name, value in exact.items()}
    both = {"": exact, "mtp.": upside_down} if kept else {"": exact}
    for prefix, wanted in both.items():
        own = {n.removeprefix(prefix): t for n, t in loaded.items() if n.startswith(prefix)}
        for name, want, got in pairs(own, wanted):
            assert all(sqnr(w, g) > 25 for w, g in zip(want, got, strict=True)), prefix + name


def test_experts_as_bfloat16_are_put_around_it_too(enabled: Standin, tmp_path: Path) -> None:
    tensors, exact = checkpoint("block")
    loaded = load(
        enabled, "qwen35", write(tmp_path, tensors), sees_no_experts, fp8_rescale={"dequantize": ["*.experts.*"]}
    )
    down = loaded["layers.1.mlp.moe.expert_mlps.mlp_op.down_proj.weight"]
    for expert in range(EXPERTS):
        assert torch.equal(down[expert].T, exact[f"layers.1.mlp.experts.{expert}.down_proj"].bfloat16())
    assert "layers.1.mlp.moe.expert_mlps.mlp_op.down_proj.scale" not in loaded


def test_a_class_that_reads_by_itself_and_makes_scales(enabled: Standin, tmp_path: Path) -> None:
    """MiniMax-M2: its own reading is passed by, in this load alone, and a list that it does not have is kept."""
    tensors, exact = checkpoint("block")
    path = write(tmp_path, tensors)
    body = {"__module__": "contrib.modeling_minimax_m2"}

    def read(cls: type, path: str, config: Any) -> Tensors:
        return {"read": torch.ones(1)}

    def stack(state_dict: Tensors, config: Any) -> Tensors:
        for layer in range(LAYERS):
            at = f"layers.{layer}.mlp"
            own = {
                n: [state_dict.pop(f"{at}.experts.{e}.{n}_proj.weight").view(torch.uint8).T for e in range(EXPERTS)]
                for n in ("gate", "up", "down")
            }
            both = torch.stack([torch.cat(pair, dim=1) for pair in zip(own["gate"], own["up"], strict=True)])
            place = f"layers.{layer}.block_sparse_moe.expert_mlps.mlp_op"
            state_dict[f"{place}.gate_up_proj.weight"] = both.view(torch.float8_e4m3fn)
            state_dict[f"{place}.down_proj.weight"] = torch.stack(own["down"]).view(torch.float8_e4m3fn)
        return state_dict

    convert = {"get_state_dict": classmethod(read), "convert_hf_to_neuron_state_dict": staticmethod(stack)}
    app = type("App", (enabled.application.NeuronApplicationBase,), body | convert)
    loader = app(path, config_for(enabled, path, **EXPERT_WISE))
    loaded = loader.checkpoint_loader_fn()
    assert "read" not in loaded
    for name, want, got in pairs(loaded, exact, place="block_sparse_moe"):
        assert all(sqnr(w, g) > 25 for w, g in zip(want, got, strict=True)), name
    assert "read" in loader.get_state_dict(path, loader.config)
    assert "read" in app(path, config_for(enabled, path, fp8_rescale=False)).checkpoint_loader_fn()


def flat(covers: str, end: str = "") -> tuple[Tensors, dict[str, np.ndarray]]:
    """DBRX: (tensors, float64 [experts, in, out] of w1, v1, w2), scales of a matrix, an expert or a row."""
    rng, tensors, exact = np.random.default_rng(1), {}, {}
    for layer in range(LAYERS):
        for name in FLAT:
            place = f"transformer.blocks.{layer}.ffn.experts.mlp.{name}"
            weight, scale, value = quantized(rng, "channel" if covers == "row" else "tensor", EXPERTS * INTER, HIDDEN)
            factors = torch.tensor([1.0, 4.0, 0.125]) if covers == "expert" else torch.ones(1)
            tensors |= {
                f"{place}{end}": weight,
                f"{place}_weight_scale": scale if covers == "row" else scale * factors,
            }
            whole = value.view(EXPERTS, INTER, HIDDEN).double()
            whole = whole if covers == "row" else whole * factors.double().reshape(-1, 1, 1)
            exact[f"{layer}.{name}"] = (whole if name == "w2" else whole.transpose(1, 2)).numpy()
    return tensors, exact


def as_dbrx(state_dict: Tensors, config: Any) -> Tensors:
    done = {}
    for layer in range(LAYERS):
        w1, v1, w2 = (
            state_dict[f"transformer.blocks.{layer}.ffn.experts.mlp.{n}"].view(EXPERTS, INTER, HIDDEN) for n in FLAT
        )
        place = f"layers.{layer}.ffn.expert_mlps.mlp_op"
        both = torch.cat([w1.view(torch.uint8), v1.view(torch.uint8)], dim=1).transpose(1, 2)
        done[f"{place}.gate_up_proj.weight"] = both.view(torch.float8_e4m3fn)
        done[f"{place}.down_proj.weight"] = w2
    return done


@pytest.mark.parametrize("covers", ["matrix", "expert"])
@pytest.mark.parametrize("end", ["", "_weight"])
@pytest.mark.parametrize("given", [EXPERT_WISE, BLOCKWISE])
def test_experts_one_below_another(
    enabled: Standin, tmp_path: Path, covers: str, end: str, given: dict[str, Any]
) -> None:
    from tests.integrations.test_experts import dequantized

    tensors, exact = flat(covers, end)
    loaded = load(enabled, "dbrx", write(tmp_path, tensors), as_dbrx, **given)
    for layer in range(LAYERS):
        place = f"layers.{layer}.ffn.expert_mlps.mlp_op"
        gate_up, down = (dequantized(loaded, f"{place}.{n}") for n in ("gate_up_proj", "down_proj"))
        found = dict(zip(FLAT, (gate_up[..., :INTER], gate_up[..., INTER:], down), strict=True))
        for name, got in found.items():
            for expert in range(EXPERTS):
                assert sqnr(exact[f"{layer}.{name}"][expert], got[expert]) > 50, (name, expert)


def test_scales_along_the_input_are_refused(enabled: Standin, tmp_path: Path) -> None:
    """A row of w2 is an input of its expert."""
    tensors, _ = flat("row")
    with pytest.raises(OptionError, match=rf"w2 has one scale per {HIDDEN} rows and 1 columns.*dequantize"):
        load(enabled, "dbrx", write(tmp_path, tensors), as_dbrx, **EXPERT_WISE)


def test_as_many_experts_as_the_config_says(enabled: Standin, tmp_path: Path) -> None:
    tensors, _ = flat("matrix")
    tensors["transformer.blocks.0.ffn.experts.mlp.w1"] = tensors["transformer.blocks.0.ffn.experts.mlp.w1"][:-1]
    with pytest.raises(WeightError, match=rf"mlp\.w1 \[383, {HIDDEN}\].*rows of {EXPERTS} experts"):
        load(enabled, "dbrx", write(tmp_path, tensors), as_dbrx, **EXPERT_WISE)


@pytest.mark.parametrize(("rows", "grid"), [(64, (2, 2)), (32, (1, 4))])
def test_as_many_blocks_as_experts_are_not_one_each(rows: int, grid: tuple[int, int]) -> None:
    name, shape = "blocks.0.ffn.experts.mlp.w1", (4 * rows, 128 * grid[1])
    covers = granularity(shape, grid, (128, 128))
    assert covers.block == (128, 128)
    state = {f"{name}.weight": random_codes(shape), f"{name}.scale": torch.rand(grid)}
    pair = Pair(f"{name}.weight", f"{name}.scale", "", covers, name)
    with pytest.raises(WeightError, match="of which no two experts share one"):
        parts_of(state, {name: pair}, flat=4)


@pytest.mark.parametrize("columns", [64, 32])
def test_a_scale_along_the_input_of_stacked_experts_is_none_of_their_rows(columns: int) -> None:
    name = "layers.0.mlp.experts.down_proj"
    state = {name: random_codes((4, 64, columns)), f"{name}.scale": torch.rand(4, 1, columns)}
    pair = Pair(name, f"{name}.scale", "", granularity((4, 64, columns), (4, 1, columns)), name)
    with pytest.raises(WeightError, match=rf"down_proj \[4, 64, {columns}\]: a scale \[4, 1, {columns}\]; expected"):
        parts_of(state, {name: pair})
