"""The scales of experts follow their weights through whatever a model's conversion does with them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuron_fp8_loader import OptionError, WeightError
from tests.integrations.apps import config_for
from tests.integrations.checkpoints import write
from tests.integrations.conftest import Standin
from tests.integrations.moe_checkpoints import quantized
from tests.support import ieee_e4m3, sqnr

FP8 = torch.float8_e4m3fn
HIDDEN, INTER, EXPERTS, LAYERS = 256, 128, 3, 2
PROJECTIONS = {"gate_proj": (INTER, HIDDEN), "up_proj": (INTER, HIDDEN), "down_proj": (HIDDEN, INTER)}
EXPERT_WISE: dict[str, Any] = {"quantization_type": "expert_wise_per_channel_symmetric"}
BLOCKWISE: dict[str, Any] = {
    "quantization_type": "blockwise_symmetric",
    "quantization_block_axis": [1, 2],
    "quantization_block_size": [128, 128],
}
Tensors = dict[str, torch.Tensor]


def checkpoint(form: str, *, same: bool = False) -> tuple[Tensors, Tensors]:
    """(FP8 tensors, float32 weights): experts one by one, and one attention projection a layer.

    With ``same``, the bytes of all weights of one shape are the same, so that only names tell them apart.
    """
    rng, tensors, exact = np.random.default_rng(0), {"model.embed_tokens.weight": torch.zeros(8, HIDDEN)}, {}
    scale_name = "weight_scale_inv" if form == "block" else "weight_scale"
    for layer in range(LAYERS):
        names = [(f"model.layers.{layer}.self_attn.q_proj", (HIDDEN, HIDDEN))]
        for expert in range(EXPERTS):
            names += [(f"model.layers.{layer}.mlp.experts.{expert}.{p}", shape) for p, shape in PROJECTIONS.items()]
        for name, (rows, columns) in names:
            weight, scale, value = quantized(rng, form, rows, columns)
            if same:
                first = next((t for t in tensors.values() if t.shape == weight.shape and t.dtype == FP8), weight)
                value, weight = first.float() * scale, first.clone()
            tensors |= {f"{name}.weight": weight, f"{name}.{scale_name}": scale}
            exact[name.removeprefix("model.")] = value
    return tensors, exact


def conversion(
    *, order: tuple[int, ...] = (0, 1, 2), up_first: bool = False, pad: int = 0, place: str = "mlp"
) -> Callable[..., Tensors]:
    """As models write it: stack, transpose, fuse, pad; experts in an order of one's own."""

    def convert(state_dict: Tensors, config: Any) -> Tensors:
        for layer in range(LAYERS):
            head = f"layers.{layer}.mlp.experts"

            def part(expert: int, name: str, head: str = head) -> torch.Tensor:
                matrix = state_dict.pop(f"{head}.{expert}.{name}.weight").T.view(torch.uint8)
                wide = (0, pad) if name != "down_proj" else (0, 0, 0, pad)
                return torch.nn.functional.pad(matrix, wide)

            names = ("up_proj", "gate_proj") if up_first else ("gate_proj", "up_proj")
            both = torch.stack([torch.cat([part(e, n) for n in names], 1) for e in order])
            down = torch.stack([part(e, "down_proj") for e in order])
            target = f"layers.{layer}.{place}.expert_mlps.mlp_op"
            state_dict[f"{target}.gate_up_proj.weight"] = both.view(FP8)
            state_dict[f"{target}.down_proj.weight"] = down.view(FP8)
        return state_dict

    return convert


def load(nxdi: Standin, path: str, convert: Callable[..., Tensors], **given: Any) -> Tensors:
    base = nxdi.application.NeuronApplicationBase
    # not of this file, which speaks of block scales as a model does that reads them by itself
    body = {"convert_hf_to_neuron_state_dict": staticmethod(convert), "__module__": base.__module__}
    kind = type("App", (base,), body)
    loaded: Tensors = kind(path, config_for(nxdi, path, **given)).checkpoint_loader_fn()
    return loaded


def dequantized(loaded: Tensors, name: str) -> np.ndarray:
    """float64 [experts, in, out] as a device reads it."""
    weight, scale = loaded[f"{name}.weight"], loaded[f"{name}.scale"].double().numpy()
    assert loaded[f"{name}.scale"].dtype == torch.float32
    for axis, size in enumerate(weight.shape):
        assert size % scale.shape[axis] == 0
        scale = scale.repeat(size // scale.shape[axis], axis)
    return ieee_e4m3(weight) * scale


def pairs(
    loaded: Tensors, exact: Tensors, order: tuple[int, ...] = (0, 1, 2), place: str = "mlp", wide: int = INTER
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, expected [out, in], found), by the names that the checkpoint has."""
    for layer in range(LAYERS):
        target = f"layers.{layer}.{place}.expert_mlps.mlp_op"
        gate_up, down = (dequantized(loaded, f"{target}.{p}") for p in ("gate_up_proj", "down_proj"))
        for slot, expert in enumerate(order):
            found = {
                "gate_proj": gate_up[slot][:, :INTER],
                "up_proj": gate_up[slot][:, wide : wide + INTER],
                "down_proj": down[slot][:INTER],
            }
            for name, value in found.items():
                yield name, exact[f"layers.{layer}.mlp.experts.{expert}.{name}"].double().numpy(), value.T


@pytest.mark.parametrize(
    ("form", "given", "least"),
    [
        ("channel", EXPERT_WISE, 50),
        ("tensor", EXPERT_WISE, 50),
        ("block", EXPERT_WISE, 25),
        ("mx", EXPERT_WISE, 25),
        ("block", BLOCKWISE, 50),
        ("tensor", BLOCKWISE, 50),
        ("mx", {**BLOCKWISE, "quantization_block_size": [32, 1]}, 50),
    ],
)
def test_forms_and_types(enabled: Standin, tmp_path: Path, form: str, given: dict[str, Any], least: float) -> None:
    tensors, exact = checkpoint(form)
    loaded = load(enabled, write(tmp_path, tensors), conversion(), **given)
    for name, want, got in pairs(loaded, exact):
        assert all(sqnr(w, g) > least for w, g in zip(want, got, strict=True)), name
    assert not [name for name in loaded if ".experts." in name]
    assert loaded["layers.0.self_attn.q_proj.scale"].shape == (
        HIDDEN,
        1,
    )  # not an expert: one a row, whatever they are


def test_shapes_of_every_type(enabled: Standin, tmp_path: Path) -> None:
    tensors, _ = checkpoint("block")
    path, target = write(tmp_path, tensors), "layers.0.mlp.expert_mlps.mlp_op"
    shapes = {
        "expert_wise": (EXPERT_WISE, (3, 1, 256), (3, 1, 256)),
        "blockwise": (BLOCKWISE, (3, 2, 2), (3, 1, 2)),
        "per_channel": ({"quantization_type": "per_channel_symmetric"}, (1, 1, 256), (1, 1, 256)),
    }
    for given, gate_up, down in shapes.values():
        loaded = load(enabled, path, conversion(), **given)
        assert loaded[f"{target}.gate_up_proj.scale"].shape == gate_up
        assert loaded[f"{target}.down_proj.scale"].shape == down


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("place", ["mlp", "feed_forward.moe"])
@pytest.mark.parametrize("given", [EXPERT_WISE, BLOCKWISE])
def test_order_and_names_do_not_matter(
    enabled: Standin, tmp_path: Path, order: tuple[int, ...], place: str, given: dict[str, Any]
) -> None:
    tensors, exact = checkpoint("block")
    loaded = load(enabled, write(tmp_path, tensors), conversion(order=order, place=place), **given)
    for _, want, got in pairs(loaded, exact, order, place):
        assert sqnr(want, got) > 25


def test_up_before_gate(enabled: Standin, tmp_path: Path) -> None:
    tensors, exact = checkpoint("channel")
    loaded = load(enabled, write(tmp_path, tensors), conversion(up_first=True), **EXPERT_WISE)
    gate_up = dequantized(loaded, "layers.1.mlp.expert_mlps.mlp_op.gate_up_proj")
    for expert in range(EXPERTS):
        up, gate = gate_up[expert].T[:INTER], gate_up[expert].T[INTER:]
        assert sqnr(exact[f"layers.1.mlp.experts.{expert}.up_proj"].double().numpy(), up) > 50
        assert sqnr(exact[f"layers.1.mlp.experts.{expert}.gate_proj"].double().numpy(), gate) > 50


@pytest.mark.parametrize(("given", "pad"), [(EXPERT_WISE, 64), (BLOCKWISE, 128)])
def test_padding(enabled: Standin, tmp_path: Path, given: dict[str, Any], pad: int) -> None:
    tensors, exact = checkpoint("block")
    loaded = load(enabled, write(tmp_path, tensors), conversion(pad=pad), **given)
    for _, want, got in pairs(loaded, exact, wide=INTER + pad):
        assert sqnr(want, got) > 25


def test_where_bytes_are_the_same_names_decide(enabled: Standin, tmp_path: Path) -> None:
    tensors, exact = checkpoint("channel", same=True)
    loaded = load(enabled, write(tmp_path, tensors), conversion(), **EXPERT_WISE)
    for _, want, got in pairs(loaded, exact):
        assert sqnr(want, got) > 50


def with_twins(one: str, other: str) -> tuple[Tensors, Tensors]:
    """The second projection of layer 1 has the bytes of the first, and a scale of its own."""
    tensors, exact = checkpoint("channel")
    one, other = (f"layers.1.mlp.experts.{name}" for name in (one, other))
    tensors[f"model.{other}.weight"] = tensors[f"model.{one}.weight"].clone()
    exact[other] = tensors[f"model.{one}.weight"].float() * tensors[f"model.{other}.weight_scale"]
    return tensors, exact


@pytest.mark.parametrize(
    ("one", "other", "convert"),
    [
        ("0.gate_proj", "1.gate_proj", conversion(order=(2, 1, 0))),
        ("0.down_proj", "2.down_proj", conversion(order=(1, 2, 0))),
        ("1.gate_proj", "1.up_proj", conversion(up_first=True)),
    ],
)
def test_equal_bytes_with_different_scales_are_refused_where_names_mislead(
    enabled: Standin, tmp_path: Path, one: str, other: str, convert: Callable[..., Tensors]
) -> None:
    tensors, exact = with_twins(one, other)
    path = write(tmp_path, tensors)
    with pytest.raises(WeightError, match=rf"experts.{one}.weight and \S+experts.{other}.weight are alike"):
        load(enabled, path, convert, **EXPERT_WISE)
    for _, want, got in pairs(load(enabled, path, conversion(), **EXPERT_WISE), exact):
        assert sqnr(want, got) > 50


@pytest.mark.parametrize("up_first", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_experts_of_zeros(enabled: Standin, tmp_path: Path, order: tuple[int, ...], up_first: bool) -> None:
    """Such as fill a checkpoint up to a number of experts."""
    tensors, exact = checkpoint("channel")
    for name in PROJECTIONS:
        at = f"layers.0.mlp.experts.1.{name}"
        tensors[f"model.{at}.weight"].view(torch.uint8)[:] = 0
        exact[at] = torch.zeros_like(exact[at])
    convert = conversion(order=order, up_first=up_first, pad=64)
    loaded = load(enabled, write(tmp_path, tensors), convert, **EXPERT_WISE)
    for name, want, got in pairs(loaded, exact, order, wide=INTER + 64):
        if not up_first or name == "down_proj":
            assert np.array_equal(want, got) or sqnr(want, got) > 50
    gate_up = dequantized(loaded, "layers.0.mlp.expert_mlps.mlp_op.gate_up_proj")
    assert np.isfinite(gate_up).all()
    assert not gate_up[order.index(1)].any()


def test_experts_of_which_nothing_is_seen_are_refused(enabled: Standin, tmp_path: Path) -> None:
    tensors, _ = checkpoint("channel")
    weight = tensors["model.layers.0.mlp.experts.1.up_proj.weight"].view(torch.uint8)
    weight[torch.linspace(0, len(weight) - 1, 8).round().long()] = 0
    with pytest.raises(
        WeightError, match=r"experts\.1\.up_proj\.weight \[128, 256\]: zeros wherever it was looked at"
    ):
        load(enabled, write(tmp_path, tensors), conversion(), **EXPERT_WISE)


def test_one_scale_for_all_experts_says_what_it_cost(
    enabled: Standin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, exact = checkpoint("channel")
    with caplog.at_level(logging.INFO, logger="neuron_fp8_loader"):
        loaded = load(enabled, write(tmp_path, tensors), conversion())
    assert "one scale for all experts cost" in caplog.text
    found = list(pairs(loaded, exact))
    assert sqnr(np.concatenate([w.ravel() for _, w, _ in found]), np.concatenate([g.ravel() for *_, g in found])) > 20


def broken(what: str) -> Callable[..., Tensors]:
    whole = conversion()

    def convert(state_dict: Tensors, config: Any) -> Tensors:
        state_dict = whole(state_dict, config)
        name = "layers.1.mlp.expert_mlps.mlp_op.gate_up_proj.weight"
        codes = state_dict[name].view(torch.uint8)
        if what == "rounded":
            codes[2] &= 0xF8
        elif what == "shifted":
            codes[:] = codes.roll(1, dims=1)
        elif what == "interleaved":
            codes = codes.unflatten(2, (2, INTER)).transpose(2, 3).flatten(2).contiguous()
        elif what == "added":
            codes = torch.cat([codes, codes[:1] ^ 0x01])
        elif what == "bfloat16":
            state_dict = {n: t for n, t in state_dict.items() if ".experts." not in n}
            return {**state_dict, name: state_dict[name].bfloat16()}
        return {**state_dict, name: codes.view(FP8)}

    return convert


@pytest.mark.parametrize("what", ["rounded", "shifted", "interleaved", "added", "bfloat16"])
def test_a_conversion_that_is_not_understood_is_refused(enabled: Standin, tmp_path: Path, what: str) -> None:
    tensors, _ = checkpoint("channel")
    with pytest.raises(WeightError) as error:
        load(enabled, write(tmp_path, tensors), broken(what), **EXPERT_WISE)
    assert "layers.1.mlp" in str(error.value)
    assert "dequantize" in str(error.value)


def test_a_layer_that_the_model_does_not_have_may_go(enabled: Standin, tmp_path: Path) -> None:
    tensors, _ = checkpoint("channel")
    whole = conversion()

    def convert(state_dict: Tensors, config: Any) -> Tensors:
        return {n: t for n, t in whole(state_dict, config).items() if not n.startswith("layers.1.")}

    loaded = load(enabled, write(tmp_path, tensors), convert, **EXPERT_WISE)
    assert loaded["layers.0.mlp.expert_mlps.mlp_op.down_proj.scale"].shape == (3, 1, 256)


@pytest.mark.parametrize(("form", "given"), [("channel", BLOCKWISE), ("mx", BLOCKWISE)])
def test_blocks_that_are_not_there_are_refused(
    enabled: Standin, tmp_path: Path, form: str, given: dict[str, Any]
) -> None:
    tensors, _ = checkpoint(form)
    with pytest.raises(OptionError, match="expert_wise_per_channel_symmetric"):
        load(enabled, write(tmp_path, tensors), conversion(), **given)


@pytest.mark.parametrize("given", [EXPERT_WISE, BLOCKWISE, {"quantization_type": "per_tensor_symmetric"}])
def test_stacks_with_one_scale_for_all(enabled: Standin, tmp_path: Path, given: dict[str, Any]) -> None:
    """ModelOpt's Llama 4: [experts, in, out] as NxD has it, and one value for each stack."""
    rng, place = np.random.default_rng(0), "model.layers.0.feed_forward.experts"
    shapes = {"gate_up_proj": (EXPERTS * HIDDEN, 2 * INTER), "down_proj": (EXPERTS * INTER, HIDDEN)}
    made = {name: quantized(rng, "tensor", *shape) for name, shape in shapes.items()}
    tensors = {f"{place}.{name}": w.view(EXPERTS, -1, w.shape[1]) for name, (w, *_) in made.items()}
    tensors |= {f"{place}.{name}_weight_scale": scale for name, (_, scale, _) in made.items()}
    target = "layers.0.feed_forward.moe.expert_mlps.mlp_op"

    def convert(state_dict: Tensors, config: Any) -> Tensors:
        for name in shapes:
            state_dict[f"{target}.{name}.weight"] = state_dict.pop(f"layers.0.feed_forward.experts.{name}")
        return state_dict

    loaded = load(enabled, write(tmp_path, tensors), convert, **given)
    for name, (_, _, exact) in made.items():
        scale = loaded[f"{target}.{name}.scale"]
        assert scale.shape == (1,) or scale.dim() == 3
        got = ieee_e4m3(loaded[f"{target}.{name}.weight"]) * float(scale.flatten()[0])
        assert bool((scale == scale.flatten()[0]).all())
        assert sqnr(exact.view(EXPERTS, -1, exact.shape[1]).double().numpy(), got) > 50
    assert not [name for name in loaded if "experts." in name and "mlp_op" not in name]
