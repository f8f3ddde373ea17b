"""``load_state_dict(slices=...)``: each part has the bytes that the whole has there, and little more is read."""

from __future__ import annotations

import math
import os
import pickle
import tempfile
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import expanded
from support import (
    REAL,
    blob,
    can_save,
    codes,
    e4m3fn,
    halved,
    random_codes,
    raw,
    same_bytes,
    save,
    save_shards,
    shared,
)
from test_reader import MIB, peak_of

from neuron_fp8_loader import kernel, load_checkpoint, load_state_dict, plan_checkpoint, rescale_state_dict
from neuron_fp8_loader.checkpoint import open_checkpoint
from neuron_fp8_loader.errors import CheckpointError, OptionError, ScaleError, WeightError
from neuron_fp8_loader.load.regions import Regions, Wanted
from neuron_fp8_loader.options import Options
from neuron_fp8_loader.plan import ALL, make_recipe, recipe_for
from neuron_fp8_loader.plan.slices import regions
from neuron_fp8_loader.tools.scan import scan_checkpoint


def cut(tensor: torch.Tensor, dim: int, start: int, stop: int) -> torch.Tensor:
    """Through bytes: indexing is not implemented for every dtype."""
    if tensor.element_size() == 1:
        return tensor.view(torch.uint8).narrow(dim, start, stop - start).contiguous().view(tensor.dtype)
    return tensor.narrow(dim, start, stop - start).contiguous()


def block_scale(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).uniform(1e-3, 1, shape)).float()


# -- any weight, any cut -------------------------------------------------------------------------------------------

BLOCK = 16
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)


@st.composite
def pairs(draw):
    """(granularity, weight shape, scale shape, stored in 4 dimensions) of what checkpoints hold."""
    kind = draw(st.sampled_from(["tensor", "row", "block", "block4", "expert", "expert row", "expert block"]))
    experts = (draw(st.integers(2, 5)),) if kind.startswith("expert") else ()
    rows, columns = draw(st.integers(17, 70)), draw(st.integers(17, 70))
    if rows == columns:
        rows += 1
    if "block" in kind:
        rows, columns = (max(2 * BLOCK, n // BLOCK * BLOCK) for n in (rows, columns))
        grid = (rows // BLOCK, columns // BLOCK)
        scale = (grid[0], 1, grid[1], 1) if kind == "block4" else (*experts, *grid)
    elif kind.endswith("row"):
        scale = draw(st.sampled_from([(*experts, rows), (*experts, rows, 1)]))
    else:
        scale = draw(st.sampled_from([experts, (*experts, 1)]))
    name = "block" if kind == "block4" else kind
    return name + (f" {BLOCK}x{BLOCK}" if "block" in kind else ""), (*experts, rows, columns), scale


@given(pairs(), st.data(), st.sampled_from(["keep", "per_channel", "dequantize"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_cut_of_any_weight(pair, data, how):
    granularity, shape, scale_shape = pair
    dim = data.draw(st.integers(0, len(shape) - 1))
    start, stop = sorted(data.draw(st.lists(st.integers(0, shape[dim]), min_size=2, max_size=2, unique=True)))
    tensors = {
        "m.weight": random_codes(shape, 1),
        "m.weight_scale": block_scale(2, scale_shape),
        "bias": torch.rand(shape[dim] + 1),
    }
    slices = {"m.weight": (dim, start, stop), "bias": (0, start, stop)}
    options = {"keep": {}, "per_channel": {"layout": how}, "dequantize": {"dequantize": ["m"]}}[how]
    with tempfile.TemporaryDirectory() as temporary:
        file = save(Path(temporary) / "model.safetensors", tensors)
        through_block = "block" in granularity and how == "keep" and dim >= len(shape) - 2
        if through_block and start % BLOCK and start // BLOCK != (stop - 1) // BLOCK:
            with pytest.raises(OptionError, match=r"m\.weight \[.*runs through its scales' blocks of 16.*per_channel"):
                load_state_dict(file, slices=slices)
            return
        part = load_state_dict(file, slices=slices, threads=data.draw(st.sampled_from([1, 3])), **options)
        whole = load_state_dict(file, always=True, **options)
    assert list(part) == list(whole)
    assert same_bytes(part["bias"], tensors["bias"][start:stop])
    assert same_bytes(part["m.weight"], cut(whole["m.weight"], dim, start, stop))
    wide = expanded(tensors["m.weight_scale"].double().numpy(), shape, granularity)
    inside = tuple(slice(start, stop) if d == dim else slice(None) for d in range(len(shape)))
    if how == "keep":
        assert same_bytes(part["m.weight"], halved(cut(tensors["m.weight"], dim, start, stop)))
        got = expanded(part["m.weight_scale"].double().numpy(), tuple(part["m.weight"].shape), granularity)
        np.testing.assert_array_equal(got, 2 * wide[inside])
    elif how == "dequantize":
        assert "m.weight_scale" not in part
        product = e4m3fn(tensors["m.weight"])[inside].astype(np.float32) * wide[inside].astype(np.float32)
        assert blob(part["m.weight"]) == product.astype(ml_dtypes.bfloat16).tobytes()
    else:  # [.., rows, 1]: columns have it all
        scale = whole["m.weight_scale"]
        rows = scale if dim == len(shape) - 1 else scale.narrow(dim, start, stop - start)
        assert same_bytes(part["m.weight_scale"], rows.contiguous())


def boxes(shape: tuple[int, ...]) -> st.SearchStrategy:
    """Bounds in every dimension of a shape; none empty."""
    ends = [st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True).map(sorted).map(tuple) for n in shape]
    return st.tuples(*ends)


@given(st.sampled_from(["keep", "per_channel", "dequantize", "floats"]), st.booleans(), st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_box_of_a_weight_and_any_other_of_its_scale(how, stacked, data):
    """As torch.distributed.checkpoint asks: bounds in all dimensions at once, the scale apart from its weight."""
    shape = (3, 40, 50) if stacked else (40, 50)
    grid = (*shape[:-2], -(-40 // BLOCK), -(-50 // BLOCK))
    tensors = {"m.weight": random_codes(shape, 1), "m.weight_scale_inv": block_scale(2, grid)}
    options = {"per_channel": {"layout": how}, "dequantize": {"dequantize": ["m"]}}.get(how, {})
    with tempfile.TemporaryDirectory() as temporary:
        file = save(Path(temporary) / "model.safetensors", tensors)
        (Path(temporary) / "config.json").write_text(
            '{"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}'
        )
        whole = load_state_dict(file, always=True, **(options if how != "floats" else {"dequantize": ["m"]}))
        checkpoint = open_checkpoint(file)
        recipe = recipe_for(checkpoint, Options(**options))
        dtype = torch.bfloat16 if how == "floats" else None
        wanted = {name: Wanted(data.draw(boxes(whole[name].shape)), dtype) for name in whole}
        wanted = data.draw(st.sampled_from([wanted, *({name: w} for name, w in wanted.items())]))
        loaded = Regions(checkpoint, recipe, ALL, Options(threads=2)).load(wanted)
    assert list(loaded.tensors) == list(wanted)
    for name, w in wanted.items():
        expected = whole[name]
        for dim, bounds in enumerate(w.region):
            expected = cut(expected, dim, *bounds)
        assert same_bytes(loaded.tensors[name], expected), name


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("stored", [(3, 1, 20), (3, 20, 1)], ids=["columns", "columns stored as rows"])
@pytest.mark.parametrize("how", ["keep", "per_channel", "dequantize"])
def test_stacks_that_lie_in_by_out(tmp_path, dim, stored, how):
    """Llama 4: [experts, in, out] with one scale an output column, which FBGEMM stores as [experts, out, 1]."""
    name, scale = "layer.experts.gate_up_proj", torch.rand(stored)
    weight = random_codes((3, 12, 20), 1)
    file = save(tmp_path / "model.safetensors", {name: weight, f"{name}_scale": scale})
    options = {"keep": {}, "per_channel": {"layout": how}, "dequantize": {"dequantize": ["*"]}}[how]
    start, stop = (1, 2) if dim == 0 else (3, 11)
    part = load_state_dict(file, slices={name: (dim, start, stop)}, **options)
    wide = np.broadcast_to(scale.numpy().reshape(3, 1, 20), weight.shape)
    inside = tuple(slice(start, stop) if d == dim else slice(None) for d in range(3))
    if how == "dequantize":
        product = e4m3fn(weight)[inside].astype(np.float32) * wide[inside]
        assert blob(part[name]) == product.astype(ml_dtypes.bfloat16).tobytes()
        return
    assert same_bytes(part[name], halved(cut(weight, dim, start, stop)))
    got = part[f"{name}_scale"]
    if how == "per_channel":
        assert got.shape[1] == 1
    got = got.numpy().reshape(got.shape[0], 1, -1)
    np.testing.assert_array_equal(np.broadcast_to(got, part[name].shape), 2 * wide[inside])


def test_a_stack_of_square_matrices(tmp_path):
    """Nobody knows which way [experts, n] lies, unless a layout that says so is asked for."""
    tensors = {"e.weight": random_codes((3, 16, 16), 1), "e.weight_scale": torch.rand(3, 16)}
    file = save(tmp_path / "model.safetensors", tensors)
    whole = load_state_dict(file, slices={})
    assert all(same_bytes(whole[n], t) for n, t in load_state_dict(file, always=True).items())
    with pytest.raises(OptionError, match=r"e\.weight \[3, 16, 16\]: which part .*is not known; layout="):
        load_state_dict(file, slices={"e.weight": (1, 0, 8)})
    part = load_state_dict(file, slices={"e.weight": (1, 0, 8)}, layout="per_channel")
    assert torch.equal(part["e.weight_scale"], 2 * tensors["e.weight_scale"][:, :8, None])


@given(st.lists(st.integers(1, 9), min_size=0, max_size=5), st.data())
@settings(max_examples=60, deadline=None)
def test_any_cut_of_any_other_tensor(shape, data):
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.int8, torch.int64]))
    tensor = torch.arange(math.prod(shape)).view(shape).to(dtype)
    slices = {}
    if shape:
        dim = data.draw(st.integers(0, len(shape) - 1))
        start, stop = sorted(data.draw(st.lists(st.integers(0, shape[dim]), min_size=2, max_size=2, unique=True)))
        slices = {"x": (dim, start, stop)}
    with tempfile.TemporaryDirectory() as temporary:
        file = save(Path(temporary) / "model.safetensors", {"x": tensor, "y": tensor.clone()})
        part = load_state_dict(file, slices=slices)
    assert same_bytes(part["x"], cut(tensor, *slices["x"]) if slices else tensor)
    assert same_bytes(part["y"], tensor)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints_put_together_again(name, dim):
    """The parts of three ranks, of uneven length, are the whole load laid out per channel."""
    path, ranks = shared(name), 3
    scales = plan_checkpoint(path).by_scale
    whole = load_state_dict(path, always=True, layout="per_channel")

    def bounds(length: int, rank: int) -> tuple[int, int]:
        return length * rank // ranks, length * (rank + 1) // ranks

    parts = [
        load_state_dict(
            path,
            layout="per_channel",
            slices=lambda _, shape, r=rank: (
                (dim, *bounds(shape[dim], r)) if len(shape) > dim and shape[dim] >= ranks else None
            ),
        )
        for rank in range(ranks)
    ]
    for key, tensor in whole.items():
        pieces = [part[key] for part in parts]
        weight = whole[scales[key][0].weight] if key in scales else tensor
        cuts = weight.dim() > dim and weight.shape[dim] >= ranks and tensor.dim() > dim and tensor.shape[dim] > 1
        if cuts:
            assert blob(torch.cat([p.view(torch.uint8) if p.element_size() == 1 else p for p in pieces], dim)) == blob(
                tensor
            ), key
        else:
            assert all(same_bytes(piece, tensor) for piece in pieces), key


@pytest.mark.parametrize("dim", [0, 1])
def test_other_formats(tmp_path, dim):
    """Codes of another FP8 dtype, MX groups with scales of two dtypes, 8-bit tensors that are nobody's weight."""
    tensors = {
        "f.weight": random_codes((32, 64), 1).view(torch.float8_e4m3fnuz),
        "x.weight": random_codes((32, 64), 2),
        "x.weight_scale": torch.randint(110, 125, (32, 2), dtype=torch.uint8),
        "y.weight": random_codes((32, 64), 3),
        "y.weight_scale": torch.randint(110, 125, (32, 2), dtype=torch.uint8).view(E8M0),
        "packed": torch.randint(0, 256, (32, 64), dtype=torch.uint8),
        "wide": random_codes((32, 64), 4).view(torch.float8_e5m2),
    }
    tensors["f.weight"].view(torch.uint8)[tensors["f.weight"].view(torch.uint8) == 0x80] = 1
    tensors = {name: tensor for name, tensor in tensors.items() if can_save(tensor.dtype)}
    file = save(tmp_path / "model.safetensors", tensors)
    whole = load_state_dict(file, always=True)
    part = load_state_dict(file, slices={"*": (dim, 0, 32)} if dim else {"*": (0, 7, 20)})
    for name, tensor in part.items():
        start, stop = (0, 32) if dim else (7, 20)
        if name.endswith("_scale"):  # of 32 columns each
            start, stop = (0, 1) if dim else (7, 20)
        assert same_bytes(tensor, cut(whole[name], dim, start, stop)), name


# -- the verdict ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """One weight that fits, one that does not, an activation scale."""
    tensors = {
        "a.weight": random_codes((64, 32), 1),
        "a.weight_scale": torch.rand(64, 1),
        "a.input_scale": torch.rand(1),
        "b.weight": random_codes((64, 32), 2, top=0x77),
        "b.weight_scale": torch.rand(1),
        "bias": torch.rand(64),
    }
    return save(tmp_path / "model.safetensors", tensors)


def test_every_weight_is_rescaled_unless_a_verdict_is_given(mixed):
    slices = {"*.weight": (0, 16, 32)}
    always, measured = load_state_dict(mixed, always=True), load_state_dict(mixed)
    by_all = load_state_dict(mixed, slices=slices)
    verdict = pickle.loads(pickle.dumps(scan_checkpoint(mixed).verdict))  # as one rank sends it to the others
    by_verdict = load_state_dict(mixed, slices=slices, verdict=verdict)
    for got, whole in ((by_all, always), (by_verdict, measured)):
        for name, tensor in got.items():
            rows = name == "a.weight_scale" or name.endswith(".weight")
            assert same_bytes(tensor, cut(whole[name], 0, 16, 32) if rows else whole[name]), name
    assert not same_bytes(by_all["b.weight"], by_verdict["b.weight"])
    assert all(same_bytes(t, measured[n]) for n, t in load_state_dict(mixed, verdict=verdict).items())


def test_a_verdict_is_a_verdict(mixed):
    with pytest.raises(OptionError, match=r"verdict=True: expected a Verdict"):
        load_state_dict(mixed, verdict=True)


def test_report(mixed):
    loaded = load_checkpoint(mixed, slices={"*.weight": (0, 0, 16), "bias": (0, 0, 16)})
    assert {w.name: (w.numel, w.rescaled) for w in loaded.report.weights} == {
        "a.weight": (16 * 32, True),
        "b.weight": (16 * 32, True),
    }
    assert loaded.report.weights[0].counts.above == int((raw(random_codes((64, 32), 1))[:16] & 0x7F > 0x77).sum())
    assert loaded.report.nbytes == 2 * 16 * 32 + 16 * 4 + 16 * 4 + 2 * 4


# -- how it is asked for -------------------------------------------------------------------------------------------


def test_names_count_before_patterns_and_patterns_in_order(mixed):
    got = load_state_dict(mixed, slices={"*": (0, 0, 8), "b.*": (0, 0, 4), "a.weight": None, "a.input_scale": None})
    assert got["a.weight"].shape == (64, 32)
    assert got["a.weight_scale"].shape == (64, 1)
    assert got["b.weight"].shape == (8, 32)
    assert got["bias"].shape == (8,)


def test_a_function_is_asked_for_all_but_scales_of_weights(mixed):
    asked = {}
    load_state_dict(mixed, slices=lambda name, shape: asked.update({name: shape}))
    assert asked == {"a.weight": (64, 32), "a.input_scale": (1,), "b.weight": (64, 32), "bias": (64,)}


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({"bias": (0, -1, 3)}, r"bias \[64\]: \(0, -1, 3\): -1:3 of dimension 0 does not lie within 0:64"),
        ({"bias": (0, 0, 65)}, r"bias \[64\]: .*0:65 of dimension 0 does not lie within 0:64"),
        ({"bias": (0, 9, 3)}, r"bias \[64\]: .*does not lie within 0:64"),
        ({"bias": (0, 3, 3)}, r"bias \[64\]: .*3:3 of dimension 0 is empty"),
        ({"bias": (1, 0, 3)}, r"bias \[64\]: .*dimension 1 is not one of its 1"),
        ({"bias": (-1, 0, 3)}, r"bias \[64\]: .*dimension -1 is not one of its 1"),
        ({"bias": (0, 0, 3, 2)}, r"bias \[64\]: .*three whole numbers; there are no steps"),
        ({"bias": slice(0, 3)}, r"bias \[64\]: slice\(0, 3, None\): expected \(dim, start, stop\)"),
        ({"bias": (0, 0.0, 3.0)}, r"bias \[64\]: .*three whole numbers"),
        ({"bias": 7}, r"bias \[64\]: 7: expected"),
        (lambda name, shape: "abc", r"a\.weight \[64, 32\]: 'abc': expected"),
        ({"bais": (0, 0, 3)}, r"'bais': no tensor of that name, and none that it matches"),
        ({3: (0, 0, 3)}, r"3: no tensor of that name"),
        ({"*_scale_inv": (0, 0, 3)}, r"'\*_scale_inv': no tensor"),
        ({"a.weight_scale": (0, 0, 3)}, r"a\.weight_scale \[64, 1\]: is the scale of a\.weight, and is cut with it"),
        (["bias"], r"slices=\['bias'\]: expected a mapping"),
    ],
    ids=str,
)
def test_hostile_slices(mixed, slices, message):
    with pytest.raises(OptionError, match=message):
        load_state_dict(mixed, slices=slices)


def test_all_problems_at_once(mixed):
    with pytest.raises(OptionError, match=r"3 problems:\n(.|\n)*bais(.|\n)*bias(.|\n)*a\.weight"):
        load_state_dict(mixed, slices={"bais": None, "a.weight": (2, 0, 1), "bias": (0, 0, 0)})


def test_an_error_of_the_function_is_its_own(mixed):
    def slices(name: str, shape: tuple[int, ...]) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        load_state_dict(mixed, slices=slices)


def test_slices_are_for_checkpoints_on_disk():
    with pytest.raises(OptionError, match="unknown option 'slices'"):
        rescale_state_dict({}, slices={})


def test_a_scale_of_several_weights(tmp_path):
    """fused experts of one scale: cut alike or not at all."""
    tensors = {"e.w1.weight": random_codes((8, 4), 1), "e.w1.weight_scale": torch.rand(8, 1)}
    plan = plan_checkpoint(save(tmp_path / "model.safetensors", tensors))
    twin = plan.tensors["e.w1.weight"]._replace(name="e.w3.weight")
    pair = plan.pairs[0]
    plan = replace(
        plan, tensors={**plan.tensors, "e.w3.weight": twin}, pairs=(pair, pair._replace(weight="e.w3.weight"))
    )
    recipe = make_recipe(plan, Options().what)
    both = regions(recipe, {"*.weight": (0, 0, 4)})
    assert both["e.w1.weight_scale"] == ((0, 4), (0, 1))
    with pytest.raises(OptionError, match=r"is the scale of e\.w1\.weight, e\.w3\.weight; cut them alike"):
        regions(recipe, {"e.w1.weight": (0, 0, 4)})


def test_weights_that_come_out_in_another_shape_are_refused(mixed):
    recipe = make_recipe(plan_checkpoint(mixed), Options().what)
    fused = recipe.steps["a.weight"]._replace(out="fused", shape=(2, 64, 32))
    recipe = replace(recipe, steps={**recipe.steps, "a.weight": fused})
    with pytest.raises(OptionError, match=r"a\.weight \[64, 32\] -> fused \[2, 64, 32\]"):
        Regions(open_checkpoint(mixed), recipe, ALL, Options())


# -- what may be wrong, and where it lies --------------------------------------------------------------------------


def test_what_is_not_needed_may_be_broken_and_what_is_may_not(tmp_path):
    tensors = {
        "a.weight": codes([[1, 2], [0x7F, 4]]),
        "a.weight_scale": torch.tensor([[1.0], [float("nan")]]),
        "u.weight": codes([[0x40], [0x7E]]),
    }
    file = save(tmp_path / "model.safetensors", tensors)
    assert blob(load_state_dict(file, slices={"*.weight": (0, 0, 1)})["a.weight"]) == b"\x00\x01"
    with pytest.raises(ScaleError, match=r"a\.weight_scale: 1 of 1 scale values are not finite"):
        load_state_dict(file, slices={"*.weight": (0, 1, 2)})
    tensors["a.weight_scale"] = torch.ones(1)
    file = save(tmp_path / "model.safetensors", tensors)
    with pytest.raises(WeightError, match=r"a\.weight: 1 NaN codes"):
        load_state_dict(file, slices={"a.weight": (0, 1, 2), "u.weight": (0, 0, 1)})
    with pytest.raises(WeightError, match=r"no scale to make up for(.|\n)*u\.weight: 1 codes above 240"):
        load_state_dict(file, slices={"a.weight": (0, 0, 1), "u.weight": (0, 1, 2)})


def test_bad_block_scales_are_found_before_the_weights_are_read(tmp_path):
    tensors = {"a.weight": random_codes((256, 256)), "a.weight_scale_inv": torch.tensor([[1.0, 1.0], [-1.0, 1.0]])}
    file = save(tmp_path / "model.safetensors", tensors)
    assert load_state_dict(file, slices={"a.weight": (0, 0, 100)}, layout="per_channel")
    with pytest.raises(ScaleError, match=r"a\.weight_scale_inv: 1 of 2"):
        load_state_dict(file, slices={"a.weight": (0, 128, 200)}, layout="per_channel")


def test_pairs_across_shards(tmp_path):
    tensors = {"a.weight": random_codes((8, 4)), "a.weight_scale": torch.rand(8, 1)}
    one, two = save_shards(tmp_path, *({name: t} for name, t in tensors.items()))
    slices = {"a.weight": (0, 2, 5)}
    both = load_state_dict(tmp_path, slices=slices)
    assert same_bytes(load_state_dict(one, slices=slices)["a.weight"], both["a.weight"])
    assert same_bytes(load_state_dict(two, slices=slices)["a.weight_scale"], both["a.weight_scale"])
    assert torch.equal(both["a.weight_scale"], 2 * tensors["a.weight_scale"][2:5])
    with pytest.raises(CheckpointError, match="load the directory instead of one shard"):
        load_state_dict(one, slices=slices, dequantize=["a"])


def test_bin_files(tmp_path):
    tensors = {"a.weight": random_codes((8, 6)), "a.weight_scale": torch.rand(8, 1), "b": torch.rand(4, 6).t()}
    torch.save({**tensors, "step": 3}, tmp_path / "pytorch_model.bin")
    got = load_state_dict(tmp_path, slices={"a.weight": (1, 2, 5), "b": (0, 1, 4)})
    assert got.pop("step") == 3
    assert same_bytes(got["a.weight"], halved(cut(tensors["a.weight"], 1, 2, 5)))
    assert torch.equal(got["a.weight_scale"], 2 * tensors["a.weight_scale"])
    assert torch.equal(got["b"], tensors["b"][1:4])


def test_inside_a_default_device(mixed):
    expected = load_state_dict(mixed, slices={"*.weight": (1, 3, 9)}, dequantize=["a"])
    with torch.device("meta"):
        got = load_state_dict(mixed, slices={"*.weight": (1, 3, 9)}, dequantize=["a"])
    assert all(same_bytes(tensor, expected[name]) for name, tensor in got.items())


# -- how much is read, kept and held -------------------------------------------------------------------------------

ROWS, COLUMNS, TP = 1024, 2048, 4


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
    """One weight of each kind, 2 MiB each."""
    tensors = {
        "row.weight": random_codes((ROWS, COLUMNS), 1),
        "row.weight_scale": torch.rand(ROWS, 1),
        "block.weight": random_codes((ROWS, COLUMNS), 2),
        "block.weight_scale_inv": block_scale(3, (ROWS // 128, COLUMNS // 128)),
        "stack.weight": random_codes((4, ROWS // 4, COLUMNS), 4),
        "stack.weight_scale": torch.rand(4, ROWS // 4, 1),
        "plain.weight": torch.rand(ROWS, COLUMNS // 4),
    }
    return save(tmp_path_factory.mktemp("matrices") / "model.safetensors", tensors)


@pytest.fixture
def bytes_read(monkeypatch):
    """[bytes of tensors that preadv gave]: headers do not count."""
    total = [0]
    preadv = os.preadv

    def counted(handle, buffers, offset):
        got = preadv(handle, buffers, offset)
        begin = 8 + int.from_bytes(os.pread(handle, 8, 0), "little")
        total[0] += max(0, got - max(0, begin - offset))
        return got

    monkeypatch.setattr(os, "preadv", counted)
    return total


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layout", ["keep", "per_channel"])
def test_bytes_read_and_kept(matrices, bytes_read, dim, layout):
    plan = plan_checkpoint(matrices)
    weights = sum(info.nbytes for name, info in plan.tensors.items() if name not in plan.by_scale)

    def slices(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
        at = dim if len(shape) == 2 else dim + 1
        return at, shape[at] // TP, 2 * shape[at] // TP

    part = load_state_dict(matrices, slices=slices, layout=layout)
    scales = sum(t.numel() * t.element_size() for name, t in part.items() if name in plan.by_scale)
    kept = sum(t.numel() * t.element_size() for t in part.values())
    assert kept == weights // TP + scales
    assert scales <= sum(t.shape[0] * t.shape[1] * 4 for t in part.values())
    if dim == 0:
        assert bytes_read[0] <= weights // TP + 4 * 3 * ROWS
    else:
        assert bytes_read[0] <= weights + 4 * 3 * ROWS
    # nothing else is held on to
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in part.values())


def test_experts_of_one_rank(matrices, bytes_read):
    part = load_state_dict(matrices, slices={"stack.weight": (0, 1, 2), "[!s]*.weight": (0, 0, 128)})
    assert part["stack.weight"].shape == (1, ROWS // 4, COLUMNS)
    assert part["stack.weight_scale"].shape == (1, ROWS // 4, 1)
    assert bytes_read[0] <= ROWS // 4 * (COLUMNS + 4) + 128 * (2 * COLUMNS + COLUMNS + 4) + 128


def test_wide_gaps_are_not_read(tmp_path, bytes_read):
    file = save(tmp_path / "model.safetensors", {"x": torch.arange(4 * (1 << 17), dtype=torch.int32).view(4, 1 << 17)})
    part = load_state_dict(file, slices={"x": (1, 5, 105)})["x"]
    assert part.tolist() == [[(row << 17) + k for k in range(5, 105)] for row in range(4)]
    assert bytes_read[0] == 4 * 100 * 4


@pytest.mark.parametrize("options", [{}, {"layout": "per_channel"}], ids=str)
def test_peak_memory_is_that_of_the_parts(tmp_path, options):
    """64 MiB of weight, an eighth of its columns: 8 MiB kept, a piece a thread and little else beside them."""
    if options and kernel.active == "torch":
        pytest.skip("without the native module requantizing takes some 40 bytes a weight of a piece")
    weight = torch.zeros(1 << 13, 1 << 13, dtype=torch.uint8).view(torch.float8_e4m3fn)
    file = save(tmp_path / "model.safetensors", {"a.weight": weight, "a.weight_scale_inv": torch.ones(64, 64)})
    del weight
    load_state_dict(file, slices={"a.weight": (1, 0, 128)}, threads=2, **options)
    slices = {"a.weight": (1, 0, 1 << 10)}
    assert peak_of(lambda: load_state_dict(file, slices=slices, threads=2, **options)) < (8 + 12) * MIB
