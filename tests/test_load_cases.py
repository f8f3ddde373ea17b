"""Checkpoints made to be difficult: options, shards read apart, every dtype, odd shapes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file as original
from support import CODES, can_save, codes, fp8, random_codes, same_bytes, save

from neuron_fp8_loader import load_state_dict
from neuron_fp8_loader.errors import ScaleError, WeightError

ONE = torch.ones(1)


def load(tmp_path, tensors, **options):
    return load_state_dict(save(tmp_path / "model.safetensors", tensors), **options)


# -- options --------------------------------------------------------------------------------------------------


def test_a_weight_that_fits_passes_with_its_scale(tmp_path):
    tensors = {
        "a.weight": random_codes((8, 8), top=0x77),
        "a.weight_scale": torch.rand(8, 1),
        "b.weight": random_codes((8, 8)),
        "b.weight_scale": torch.rand(8, 1),
    }
    after = load(tmp_path, tensors)
    assert same_bytes(after["a.weight"], tensors["a.weight"])
    assert same_bytes(after["a.weight_scale"], tensors["a.weight_scale"])
    assert torch.equal(after["b.weight_scale"], tensors["b.weight_scale"] * 2)


@pytest.mark.parametrize("byte", [0x78, 0x7E, 0xF8, 0xFE])
def test_one_code_above_240_converts_the_weight(tmp_path, byte):
    after = load(tmp_path, {"a.weight": codes([0x77, byte, 1]), "a.weight_scale": ONE})
    assert after["a.weight"].view(torch.uint8).tolist() == [0x6F, byte - 8, 0]
    assert after["a.weight_scale"].item() == 2


def test_nan_is_an_error_that_names_file_tensor_and_count(tmp_path):
    tensors = {"a.weight": codes([0x7F, 0xFF, 1, 0x7E]), "a.weight_scale": ONE, "b.weight": codes([0x7F])}
    file = save(tmp_path / "model.safetensors", tensors)
    with pytest.raises(WeightError) as error:
        load_state_dict(file, unscaled="keep")
    assert f"{file}: a.weight: 2 NaN codes" in str(error.value)
    assert f"{file}: b.weight: 1 NaN codes" in str(error.value)
    after = load_state_dict(file, nan="keep")
    assert after["a.weight"].view(torch.uint8).tolist() == [0x7F, 0xFF, 0, 0x76]
    assert same_bytes(after["b.weight"], tensors["b.weight"])


def test_nan_alone_does_not_convert(tmp_path):
    tensors = {"a.weight": codes([0x7F, 1]), "a.weight_scale": ONE}
    assert same_bytes(load(tmp_path, tensors, nan="keep")["a.weight"], tensors["a.weight"])


def test_unscaled_weights(tmp_path):
    tensors = {"fits.weight": codes([0x77, 1]), "a.weight": codes([0x78, 3]), "b.weight": codes([0xFE, 0x7E])}
    file = save(tmp_path / "model.safetensors", tensors)
    with pytest.raises(WeightError) as error:
        load_state_dict(file)
    text = str(error.value)
    assert f"{file}: a.weight: 1 codes above 240" in text
    assert f"{file}: b.weight: 2 codes above 240" in text
    assert "fits.weight" not in text
    kept = load_state_dict(file, unscaled="keep")
    assert all(same_bytes(kept[name], tensors[name]) for name in tensors)
    exact = load_state_dict(file, unscaled="dequantize")
    for name, tensor in tensors.items():
        assert exact[name].dtype == torch.bfloat16
        assert torch.equal(exact[name].double(), tensor.double())


def test_dequantized_is_exact_for_every_code(tmp_path):
    tensors = {"a.weight": codes([byte for byte in CODES.tolist() if byte & 0x7F != 0x7F])}
    after = load(tmp_path, tensors, unscaled="dequantize")["a.weight"]
    assert torch.equal(after.double(), tensors["a.weight"].double())


def test_unscaled_weights_that_fit_pass(tmp_path):
    tensors = {"a.weight": random_codes((16, 16), top=0x77)}
    assert same_bytes(load(tmp_path, tensors, always=True)["a.weight"], tensors["a.weight"])


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_scale_that_is_not_finite(tmp_path, bad):
    tensors = {"a.weight": codes([1]), "a.weight_scale": torch.tensor([1.0, bad]), "b.weight": codes([0x7E])}
    tensors["b.weight_scale"] = torch.tensor([torch.finfo(torch.float32).max])
    file = save(tmp_path / "model.safetensors", tensors)
    with pytest.raises(ScaleError) as error:
        load_state_dict(file)
    assert f"{file}: a.weight_scale: 1 of 2 scale values are not finite" in str(error.value)
    assert f"{file}: b.weight_scale: 1 of 1 values overflow" in str(error.value)
    tensors["b.weight_scale"] = ONE
    after = load(tmp_path, tensors, nan="keep")
    assert same_bytes(after["a.weight_scale"], tensors["a.weight_scale"])


def test_activation_scales(tmp_path):
    tensors = {"a.weight": codes([0x7E]), "a.weight_scale": ONE, "a.input_scale": torch.tensor([3.0, 4.0])}
    assert load(tmp_path, tensors)["a.input_scale"].tolist() == [6, 8]
    assert load(tmp_path, tensors, activation_scales="keep")["a.input_scale"].tolist() == [3, 4]
    tensors["a.weight"] = codes([0x77])
    assert load(tmp_path, tensors)["a.input_scale"].tolist() == [3, 4]
    assert load(tmp_path, tensors, always=True)["a.input_scale"].tolist() == [6, 8]


def test_fnuz_weights_become_e4m3fn_of_the_same_value(tmp_path):
    if not can_save(torch.float8_e4m3fnuz):
        pytest.skip("this safetensors cannot write float8_e4m3fnuz")
    finite = [byte for byte in CODES.tolist() if byte != 0x80]
    weight = torch.tensor(finite, dtype=torch.uint8).view(torch.float8_e4m3fnuz)
    after = load(tmp_path, {"a.weight": weight, "a.weight_scale": ONE})
    assert after["a.weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(after["a.weight"].float(), weight.float().to(torch.float8_e4m3fn).float())
    assert after["a.weight_scale"].item() == 1
    broken = torch.tensor([0x80], dtype=torch.uint8).view(torch.float8_e4m3fnuz)
    with pytest.raises(WeightError, match=r"a\.weight: 1 NaN codes"):
        load(tmp_path, {"a.weight": broken})


# -- dtypes and shapes ----------------------------------------------------------------------------------------

DTYPES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "bfloat16"),
    *("float32", "float64", "complex64", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


@pytest.mark.parametrize("name", DTYPES)
def test_other_dtypes_pass(tmp_path, name):
    dtype = getattr(torch, name, None)
    if dtype is None:
        pytest.skip(f"this torch has no {name}")
    data = torch.from_numpy(CODES.copy())
    data = data % 2 if name == "bool" else data
    tensors = {
        "w.weight": data.view(dtype),
        "x": data.view(dtype)[:0],
        "b.weight": codes([0x7E]),
        "b.weight_scale": ONE,
    }
    try:
        file = save(tmp_path / "model.safetensors", tensors)
    except (KeyError, ValueError) as error:
        pytest.skip(f"safetensors cannot write {name}: {error}")
    after, reference = load_state_dict(file), original(file)
    assert after["b.weight"].view(torch.uint8).tolist() == [0x76]
    for key in ("w.weight", "x"):
        assert same_bytes(after[key], reference[key])


def test_packed_fp4_passes(tmp_path):
    dtype = getattr(torch, "float4_e2m1fn_x2", None)
    if dtype is None:
        pytest.skip("this torch has no float4_e2m1fn_x2")
    packed = torch.from_numpy(CODES.copy()).view(16, 16).view(dtype)
    try:
        file = save(tmp_path / "model.safetensors", {"a.weight": packed, "z": torch.ones(3)})
    except (KeyError, ValueError) as error:
        pytest.skip(f"safetensors cannot write it: {error}")
    after = load_state_dict(file)
    assert after["a.weight"].shape == packed.shape
    assert torch.equal(after["a.weight"].view(torch.uint8), packed.view(torch.uint8))
    assert torch.equal(after["z"], torch.ones(3))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 3), (2, 3, 4), (2, 1, 3, 1), (1, 1)])
def test_shapes(tmp_path, shape):
    weight = random_codes(shape)
    if weight.numel():
        weight.view(torch.uint8).view(-1)[0] = 0x7E
    tensors = {"a.weight": weight, "a.weight_scale": torch.rand(()), "plain": torch.rand(shape)}
    after = load(tmp_path, tensors)
    assert after["a.weight"].shape == shape
    assert after["a.weight"].stride() == torch.empty(shape).stride()
    assert same_bytes(after["plain"], tensors["plain"])
    expected = fp8(weight.float().numpy() / 2) if weight.numel() else weight
    assert same_bytes(after["a.weight"], expected.view(shape))
    assert (after["a.weight_scale"] / tensors["a.weight_scale"]).item() == (2 if weight.numel() else 1)


def test_very_many_tiny_tensors(tmp_path):
    """More neighbours than one system call takes, of odd lengths."""
    tensors = {f"{i:05d}.weight": random_codes((1 + i % 7,), i) for i in range(3000)}
    tensors |= {name.replace("weight", "weight_scale"): torch.tensor(1.0 + i) for i, name in enumerate(tensors)}
    file = save(tmp_path / "model.safetensors", tensors)
    one, many = load_state_dict(file, threads=1), load_state_dict(file, threads=5)
    for name, tensor in tensors.items():
        assert same_bytes(one[name], many[name])
        if name.endswith("weight"):
            above = bool((tensor.view(torch.uint8) & 0x7F > 0x77).any())
            expected = fp8(tensor.float().numpy() / 2) if above else tensor
            assert same_bytes(one[name], expected)
            scale = name.replace("weight", "weight_scale")
            assert torch.equal(one[scale], tensors[scale] * (2 if above else 1))


def test_the_order_of_empty_tensors_is_always_the_same(tmp_path):
    """safetensors gives them in the order of a hash that is another in every process and every reading."""
    file = save(tmp_path / "model.safetensors", {f"{i}": torch.empty(0) for i in range(20)} | {"last": ONE})
    assert {tuple(load_state_dict(file)) for _ in range(5)} == {tuple(load_state_dict(file))}


def test_an_empty_file(tmp_path):
    assert load(tmp_path, {}) == {}


def test_loads_inside_a_default_device(tmp_path):
    """A builder may call its checkpoint loader inside ``torch.device("meta")``."""
    tensors = {
        "a.weight": random_codes((8, 8)),
        "a.weight_scale": torch.rand(8, 1),
        "b.weight": random_codes((8, 8), top=0x77),
        "e.weight": random_codes((8, 8)),
        "e.weight_scale": torch.full((8,), 100, dtype=torch.uint8),
        "plain": torch.rand(3),
    }
    if can_save(torch.float8_e4m3fnuz):
        tensors["f.weight"] = torch.from_numpy(CODES[:64].copy()).view(torch.float8_e4m3fnuz)
    file = save(tmp_path / "model.safetensors", tensors)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    expected = load_state_dict(file, unscaled="dequantize")
    for path in (file, tmp_path / "pytorch_model.bin"):
        with torch.device("meta"):
            inside = load_state_dict(path, unscaled="dequantize")
        for name, tensor in inside.items():
            assert tensor.device.type == "cpu"
            assert same_bytes(tensor, expected[name])


@pytest.mark.parametrize("top", [0x77, 0x7E])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_activation_scale_that_is_not_finite(tmp_path, bad, top):
    """It would be refused if a weight were converted, and is when none is."""
    tensors = {"a.weight": random_codes((4, 4), top=top), "a.weight_scale": ONE, "a.input_scale": torch.tensor([bad])}
    with pytest.raises(ScaleError, match=r"a\.input_scale: 1 of 1 scale values are not finite"):
        load(tmp_path, tensors)
