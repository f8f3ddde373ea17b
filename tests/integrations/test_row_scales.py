"""An output row of attention or of an MLP keeps its scale, whatever a model's conversion does with its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from neuron_fp8_loader import WeightError
from neuron_fp8_loader.integrations.row_scales import Rows
from tests.support import e4m3fn, random_codes

FP8 = torch.float8_e4m3fn
WIDE = 64
SIZES = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
AT = "layers.1.self_attn"
Tensors = dict[str, torch.Tensor]


def given(*, one: bool = False) -> Tensors:
    """Projections of two layers, under the names that a conversion gets."""
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(2):
        for n, (name, rows) in enumerate(SIZES.items()):
            module = f"layers.{layer}.self_attn.{name}"
            tensors[f"{module}.weight"] = random_codes((rows, WIDE), 10 * layer + n, top=0x77)
            shape = (1,) if one else (rows, 1)
            tensors[f"{module}.scale"] = torch.from_numpy(rng.uniform(1e-4, 1, shape).astype(np.float32))
    return tensors


def value(tensors: Tensors, module: str) -> np.ndarray:
    scale = tensors[f"{module}.scale"].double().numpy().reshape(-1, 1)
    return e4m3fn(tensors[f"{module}.weight"]) * scale


def converted(tensors: Tensors, convert: Callable[[Tensors], None]) -> Tensors:
    rows, result = Rows.of(tensors), dict(tensors)
    convert(result)
    rows.attach(result, "ckpt")
    return result


def without_scales(tensors: Tensors) -> None:
    """What conversions that know nothing of scales leave: some drop them, some carry them along."""
    for name in SIZES:
        del tensors[f"{AT}.{name}.scale"]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("left", [False, True])
def test_fused(left: bool) -> None:
    tensors = given()

    def fuse(state: Tensors) -> None:
        parts = [raw(state.pop(f"{AT}.{name}.weight")) for name in SIZES]
        state[f"{AT}.Wqkv.weight"] = torch.cat(parts).view(FP8)
        if not left:
            without_scales(state)

    result = converted(tensors, fuse)
    want = np.concatenate([value(tensors, f"{AT}.{name}") for name in SIZES])
    assert np.array_equal(value(result, f"{AT}.Wqkv"), want)
    assert result[f"{AT}.Wqkv.scale"].shape == (64, 1)
    assert not [name for name in result if name.startswith(AT) and "Wqkv" not in name]
    assert torch.equal(result["layers.0.self_attn.q_proj.scale"], tensors["layers.0.self_attn.q_proj.scale"])


def test_cut_in_two_interleaved_and_padded() -> None:
    tensors = given()

    def cut(state: Tensors) -> None:
        heads = raw(state.pop(f"{AT}.q_proj.weight")).view(4, 2, 4, WIDE)
        state[f"{AT}.query.weight"] = torch.nn.functional.pad(heads[:, 0].reshape(16, WIDE), (0, 0, 0, 8)).view(FP8)
        state[f"{AT}.gate.weight"] = heads[:, 1].reshape(16, WIDE).view(FP8)

    result = converted(tensors, cut)
    heads = value(tensors, f"{AT}.q_proj").reshape(4, 2, 4, WIDE)
    assert np.array_equal(value(result, f"{AT}.query")[:16], heads[:, 0].reshape(16, WIDE))
    assert not value(result, f"{AT}.query")[16:].any()
    assert np.array_equal(value(result, f"{AT}.gate"), heads[:, 1].reshape(16, WIDE))
    assert f"{AT}.q_proj.scale" not in result


def test_scales_that_a_conversion_moved_by_itself_stay() -> None:
    tensors = given()

    def rename(state: Tensors) -> None:
        state[f"{AT}.query.weight"] = state.pop(f"{AT}.q_proj.weight")
        state[f"{AT}.query.scale"] = state.pop(f"{AT}.q_proj.scale") + 1

    assert torch.equal(converted(tensors, rename)[f"{AT}.query.scale"], tensors[f"{AT}.q_proj.scale"] + 1)


def test_one_scale_a_weight() -> None:
    tensors = given(one=True)

    def rename(state: Tensors) -> None:
        state[f"{AT}.query.weight"] = state.pop(f"{AT}.q_proj.weight")

    result = converted(tensors, rename)
    assert torch.equal(result[f"{AT}.query.scale"], tensors[f"{AT}.q_proj.scale"])
    assert result[f"{AT}.query.scale"].shape == (1,)


def _fuse(state: Tensors) -> None:
    parts = [raw(state.pop(f"{AT}.{name}.weight")) for name in SIZES]
    state[f"{AT}.Wqkv.weight"] = torch.cat(parts).view(FP8)


def _add(state: Tensors) -> None:
    _fuse(state)
    more = torch.cat([raw(state[f"{AT}.Wqkv.weight"]), torch.full((1, WIDE), 7, dtype=torch.uint8)])
    state[f"{AT}.Wqkv.weight"] = more.view(FP8)


def _in_place(state: Tensors) -> None:
    whole = raw(state[f"{AT}.q_proj.weight"])
    whole.copy_(whole.flip(0))
    _fuse(state)


def _of_another_layer(state: Tensors) -> None:
    other = raw(state["layers.0.self_attn.q_proj.weight"])
    state[f"{AT}.Wqkv.weight"] = torch.cat([raw(state.pop(f"{AT}.q_proj.weight")), other]).view(FP8)


@pytest.mark.parametrize(
    ("convert", "one", "text"),
    [
        (_add, False, r"Wqkv\.weight \[65, 64\]: row 64 is of no weight"),
        (_in_place, False, r"wrote into layers\.1\.self_attn\.q_proj"),
        (_of_another_layer, False, "row 32 is of no weight"),
        (_fuse, True, "3 scales.*per_channel_symmetric"),
    ],
)
def test_refused_in_words(convert: Callable[[Tensors], None], one: bool, text: str) -> None:
    with pytest.raises(WeightError, match=text) as error:
        converted(given(one=one), convert)
    assert "ckpt" in str(error.value)
    assert "dequantize" in str(error.value)


@pytest.mark.parametrize("equal", [False, True])
def test_the_same_row_in_two_weights(equal: bool) -> None:
    tensors = given()
    raw(tensors[f"{AT}.k_proj.weight"])[5] = raw(tensors[f"{AT}.q_proj.weight"])[2]
    if equal:
        tensors[f"{AT}.k_proj.scale"][5] = tensors[f"{AT}.q_proj.scale"][2]
        assert value(converted(tensors, _fuse), f"{AT}.Wqkv").shape == (64, WIDE)
        return
    with pytest.raises(WeightError, match=r"row 2 may be row 2 of \S+q_proj or row 5 of \S+k_proj, which have"):
        converted(tensors, _fuse)


def test_two_rows_of_one_weight_that_are_the_same() -> None:
    tensors = given()
    raw(tensors[f"{AT}.q_proj.weight"])[5] = raw(tensors[f"{AT}.q_proj.weight"])[2]
    with pytest.raises(WeightError, match=r"row 2 may be row 2 of \S+q_proj or row 5 of \S+q_proj, which have"):
        converted(tensors, _fuse)


@pytest.mark.parametrize("one", [False, True])
def test_keys_that_are_also_values(one: bool) -> None:
    """Tied: every row is in both, and both lose their scales."""
    tensors = given(one=one)
    for end in ("weight", "scale"):
        tensors[f"{AT}.v_proj.{end}"] = tensors[f"{AT}.k_proj.{end}"].clone()
        if one:
            tensors[f"{AT}.q_proj.scale"] = tensors[f"{AT}.k_proj.scale"].clone()
    want = np.concatenate([value(tensors, f"{AT}.{name}") for name in SIZES])
    result = converted(tensors, _fuse)
    assert np.array_equal(value(result, f"{AT}.Wqkv"), want)
    assert not [name for name in result if name.startswith(AT) and "Wqkv" not in name]


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_weights_of_zeros(fused: bool, one: bool) -> None:
    tensors = given(one=one)
    raw(tensors[f"{AT}.v_proj.weight"])[:] = torch.tensor([0, 0x80], dtype=torch.uint8).repeat(WIDE // 2)
    if one:
        tensors[f"{AT}.k_proj.scale"] = tensors[f"{AT}.q_proj.scale"].clone()

    def convert(state: Tensors) -> None:
        if fused:
            _fuse(state)
        else:
            state[f"{AT}.values.weight"] = state.pop(f"{AT}.v_proj.weight")

    result = converted(tensors, convert)
    at = f"{AT}.Wqkv" if fused else f"{AT}.values"
    assert np.array_equal(value(result, at)[-16:], np.zeros((16, WIDE)))
    assert result[f"{at}.scale"].shape == ((1,) if one else (len(result[f"{at}.weight"]), 1))
    assert f"{AT}.v_proj.scale" not in result


def test_another_weight_that_the_conversion_wrote_into_is_not_in_the_way() -> None:
    tensors = given()
    tensors[f"{AT}.o_proj.weight"] = random_codes((32, WIDE), 77, top=0x77)
    tensors[f"{AT}.o_proj.scale"] = torch.rand(32, 1)

    def convert(state: Tensors) -> None:
        raw(state[f"{AT}.o_proj.weight"])[:, :4] = 0
        _fuse(state)

    want = np.concatenate([value(tensors, f"{AT}.{name}") for name in SIZES])
    assert np.array_equal(value(converted(tensors, convert), f"{AT}.Wqkv"), want)


def test_rows_in_another_order_in_place_keep_the_one_scale_of_their_weight() -> None:
    tensors = given(one=True)
    scale = tensors[f"{AT}.q_proj.scale"].clone()

    def convert(state: Tensors) -> None:
        raw(state[f"{AT}.q_proj.weight"]).copy_(raw(state[f"{AT}.q_proj.weight"]).flip(0).clone())

    assert torch.equal(converted(tensors, convert)[f"{AT}.q_proj.scale"], scale)


@pytest.mark.parametrize("end", ["columns padded", "columns in another order", "one scale, transposed"])
def test_what_keeps_a_scale_right_passes(end: str) -> None:
    tensors = given(one=end.startswith("one"))
    name = f"{AT}.q_proj.weight"

    def convert(state: Tensors) -> None:
        old = raw(state[name])
        more = torch.nn.functional.pad(old, (0, 8))
        state[name] = {"c": more if end.endswith("padded") else old.flip(1), "o": old.T}[end[0]].contiguous().view(FP8)

    scale = tensors[f"{AT}.q_proj.scale"].clone()
    assert torch.equal(converted(tensors, convert)[f"{AT}.q_proj.scale"], scale)


def _transpose(state: Tensors) -> None:
    state[f"{AT}.q_proj.weight"] = raw(state[f"{AT}.q_proj.weight"]).T.contiguous().view(FP8)


def _exchange(state: Tensors) -> None:
    k, v = (f"{AT}.{n}_proj.weight" for n in "kv")
    state[k], state[v] = state[v], state[k]


def _exchange_scales(state: Tensors) -> None:
    k, v = (f"{AT}.{n}_proj.scale" for n in "kv")
    state[k], state[v] = state[v], state[k]


def _fuse_in_another_order(state: Tensors) -> None:
    scales = [state.pop(f"{AT}.{name}.scale") for name in SIZES]
    _fuse(state)
    padding = torch.ones(2, 1)
    state[f"{AT}.Wqkv.scale"] = torch.cat([*scales[::-1], padding])
    weight = torch.nn.functional.pad(raw(state[f"{AT}.Wqkv.weight"]), (0, 0, 0, 2))
    state[f"{AT}.Wqkv.weight"] = weight.view(FP8)


def _rename_and_move(state: Tensors) -> None:
    state[f"{AT}.query.weight"] = raw(state.pop(f"{AT}.q_proj.weight")).flip(0).view(FP8)
    state[f"{AT}.query.scale"] = state.pop(f"{AT}.q_proj.scale")


@pytest.mark.parametrize(
    ("convert", "one", "text"),
    [
        (_transpose, False, "it was transposed, its scale was not"),
        (_exchange, False, "row 0 is row 0 of .*v_proj, whose scale is another"),
        (_exchange, True, "row 0 is row 0 of .*v_proj, whose scale is another"),
        (_rename_and_move, False, "row 0 is row 31 of .*rows were moved"),
        (_exchange_scales, False, "row 0 is row 0 of .*k_proj, whose scale is another"),
        (_exchange_scales, True, "row 0 is row 0 of .*k_proj, whose scale is another"),
        (_fuse_in_another_order, False, "row 0 is row 0 of .*q_proj, whose scale is another"),
    ],
)
def test_a_scale_that_stayed_where_its_weight_did_not(
    convert: Callable[[Tensors], None], one: bool, text: str
) -> None:
    tensors = given(one=one)
    if convert is _transpose:
        tensors[f"{AT}.q_proj.weight"] = random_codes((WIDE, WIDE), 5, top=0x77)
        tensors[f"{AT}.q_proj.scale"] = torch.rand(WIDE, 1)
    with pytest.raises(WeightError, match=text):
        converted(tensors, convert)


def test_rows_swapped_in_place_that_no_sample_tells_apart() -> None:
    """torch counts the change."""
    tensors = given()
    weight = raw(tensors[f"{AT}.q_proj.weight"])
    weight[:, :: WIDE // 16] = 7

    def convert(state: Tensors) -> None:
        weight[[0, 1]] = weight[[1, 0]]

    with pytest.raises(WeightError, match="wrote into"):
        converted(tensors, convert)


def test_weights_that_are_not_known_are_left() -> None:
    tensors: dict[str, Any] = given()

    def transpose(state: Tensors) -> None:
        state[f"{AT}.query.weight"] = state.pop(f"{AT}.q_proj.weight").T.contiguous()

    result = converted(tensors, transpose)
    assert f"{AT}.query.scale" not in result
    assert f"{AT}.q_proj.scale" in result  # for check_complete, which names both


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
def test_rows_in_another_order_under_the_same_name(inplace: bool, with_scale: bool) -> None:
    """As for rotary embeddings: what moves rows and not their scales is refused, and so is writing into the weight."""
    tensors = given()
    name, order = f"{AT}.q_proj", torch.arange(SIZES["q_proj"]).roll(1)
    raw(tensors[f"{name}.weight"])[3] = 0  # any scale is right for zeros
    before = value(tensors, name)[order.numpy()]

    def convert(result: Tensors) -> None:
        weight = result[f"{name}.weight"]
        moved = raw(weight)[order].view(weight.dtype)
        if inplace:
            raw(weight).copy_(raw(moved))
        else:
            result[f"{name}.weight"] = moved
        if with_scale:
            result[f"{name}.scale"] = result[f"{name}.scale"][order]

    if with_scale and not inplace:
        np.testing.assert_array_equal(value(converted(tensors, convert), name), before)
        return
    with pytest.raises(WeightError, match="rows were moved" if not inplace else "wrote into"):
        converted(tensors, convert)


def test_two_rows_swapped_in_place_with_one_byte_in_common() -> None:
    """A sample of one column would not tell."""
    tensors = given()
    name = f"{AT}.q_proj"
    raw(tensors[f"{name}.weight"])[:, WIDE // 2] = 7

    def convert(result: Tensors) -> None:
        weight = raw(result[f"{name}.weight"])
        weight[[0, 1]] = weight[[1, 0]]
        without_scales(result)

    with pytest.raises(WeightError, match="wrote into"):
        converted(tensors, convert)
