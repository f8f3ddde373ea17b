"""State dicts in memory: the caller's tensors, and tensors that share memory."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file as original
from support import TINY, codes, frozen, halved, random_codes, same_bytes, unchanged

from neuron_fp8_loader import load_state_dict, rescale_state_dict
from neuron_fp8_loader.errors import Fp8LoaderError, OptionError, PlanError, ScaleError, WeightError

BOTH = pytest.mark.parametrize("inplace", [False, True])


def state(**extra) -> dict:
    return {
        "a.weight": random_codes((16, 8), 1),
        "a.weight_scale": torch.rand(16, 1),
        "fits.weight": random_codes((16, 8), 2, top=0x77),
        "fits.weight_scale": torch.rand(16, 1),
        "norm": torch.rand(7),
        **extra,
    }


@BOTH
@pytest.mark.parametrize("options", [{}, {"method": "ratio"}, {"always": True}, {"threads": 1}], ids=str)
def test_the_same_as_reading_the_file(inplace, options):
    expected = load_state_dict(TINY, **options)
    after = rescale_state_dict(original(TINY / "model.safetensors"), inplace=inplace, **options)
    assert list(after) == list(expected)
    assert all(same_bytes(after[name], expected[name]) for name in expected)


def test_not_in_place_the_caller_is_untouched():
    given = state()
    before = frozen(given)
    after = rescale_state_dict(given)
    unchanged(given, before)
    assert after is not given
    assert same_bytes(after["a.weight"], halved(before["a.weight"]))
    assert torch.equal(after["a.weight_scale"], before["a.weight_scale"] * 2)
    for name in ("fits.weight", "fits.weight_scale", "norm"):
        assert after[name] is given[name]
    assert after["a.weight"].data_ptr() != given["a.weight"].data_ptr()


def test_in_place_the_tensors_stay_the_same_objects():
    given = state()
    before, objects = frozen(given), dict(given)
    assert rescale_state_dict(given, inplace=True) is given
    assert all(given[name] is tensor for name, tensor in objects.items())
    assert same_bytes(given["a.weight"], halved(before["a.weight"]))
    assert torch.equal(given["a.weight_scale"], before["a.weight_scale"] * 2)
    assert same_bytes(given["fits.weight"], before["fits.weight"])
    again = frozen(given)
    rescale_state_dict(given, inplace=True)
    unchanged(given, again)


@BOTH
def test_other_values_pass(inplace):
    values = {"epoch": 3, "name": "x", "nested": {"a": torch.ones(1)}, "none": None, "list": [1]}
    given = state(**values)
    after = rescale_state_dict(given, inplace=inplace)
    assert list(after) == list(given)
    for name, value in values.items():
        assert after[name] is value


@BOTH
def test_parameters(inplace):
    given = state()
    given["a.weight_scale"] = torch.nn.Parameter(given["a.weight_scale"])
    given["a.weight"] = torch.nn.Parameter(given["a.weight"], requires_grad=False)
    before = frozen(given)
    after = rescale_state_dict(given, inplace=inplace)
    assert same_bytes(after["a.weight"], halved(before["a.weight"]))
    assert torch.equal(after["a.weight_scale"].detach(), before["a.weight_scale"] * 2)
    if inplace:
        assert isinstance(after["a.weight_scale"], torch.nn.Parameter)
    else:
        unchanged(given, before)


# -- refusals ---------------------------------------------------------------------------------------------------

BAD = [
    ({"n.weight": codes([0x7F]), "n.weight_scale": torch.ones(1)}, WeightError, "n.weight: 1 NaN codes"),
    ({"u.weight": codes([0x78])}, WeightError, "u.weight: 1 codes above 240"),
    ({"s.weight": codes([1]), "s.weight_scale": torch.tensor([float("inf")])}, ScaleError, "s.weight_scale: 1 of 1"),
    (
        {"h.weight": codes([0x7E]), "h.weight_scale": torch.tensor([65504.0], dtype=torch.float16)},
        ScaleError,
        "h.weight_scale: 1 of 1 values overflow",
    ),
    (
        {"e.weight": codes([0x7E]), "e.weight_scale": torch.tensor([254], dtype=torch.uint8)},
        ScaleError,
        "e.weight_scale: 1 of 1 e8m0 scale bytes are 254",
    ),
    (
        {"t.weight": codes([1]), "t.weight_scale": torch.ones(1), "t.scale": torch.ones(1)},
        PlanError,
        "t.weight: has 2",
    ),
    ({"m.weight": codes([1]).to("meta"), "m.weight_scale": torch.ones(1)}, WeightError, "m.weight: is on meta"),
    ({"m.weight": codes([1]), "m.weight_scale": torch.ones(1).to("meta")}, WeightError, "m.weight_scale: is on meta"),
    ({"a.input_scale": torch.ones(1).to("meta")}, WeightError, "a.input_scale: is on meta"),
]


@BOTH
@pytest.mark.parametrize(("extra", "error", "text"), BAD, ids=[text for *_, text in BAD])
def test_an_error_leaves_everything_untouched(inplace, extra, error, text):
    given = state(**extra)
    before = frozen({n: t for n, t in given.items() if t.device.type == "cpu"})
    with pytest.raises(error) as caught:
        rescale_state_dict(given, inplace=inplace)
    assert text in str(caught.value)
    assert "state dict" in str(caught.value)
    unchanged({n: given[n] for n in before}, before)


def test_a_mapping_that_cannot_be_changed():
    given = state()
    before = frozen(given)
    with pytest.raises(OptionError, match="inplace=True: a mappingproxy cannot be changed"):
        rescale_state_dict(MappingProxyType(given), inplace=True)
    unchanged(given, before)
    assert same_bytes(rescale_state_dict(MappingProxyType(given))["a.weight"], halved(before["a.weight"]))


@BOTH
def test_tensors_of_no_concern_may_be_anywhere(inplace):
    """Sparse, on a device, or a subclass without FP8: they pass as the objects they are."""
    others = {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, 3, device="meta"),
        "wrapped": Wrapped(torch.ones(2)),
    }
    given = state(**others)
    expected = halved(given["a.weight"])
    after = rescale_state_dict(given, inplace=inplace)
    assert same_bytes(after["a.weight"], expected)
    assert all(after[name] is tensor for name, tensor in others.items())


class Wrapped(torch.Tensor):
    """A tensor made of another, as torchao and DTensor make them."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.bfloat16)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(str(func))


@BOTH
@pytest.mark.parametrize("depth", [1, 2])
def test_a_subclass_with_fp8_inside_is_refused(inplace, depth):
    tensor = codes([0x7E])
    for _ in range(depth):
        tensor = Wrapped(tensor)
    given = state()
    before = frozen(given)
    given["w"] = tensor
    with pytest.raises(WeightError, match="w: is a Wrapped with FP8 inside; flatten it"):
        rescale_state_dict(given, inplace=inplace)
    unchanged({n: given[n] for n in before}, before)


# -- other formats ----------------------------------------------------------------------------------------------


@BOTH
def test_fnuz_and_dequantized_weights_are_replaced(inplace):
    finite = np.array([b for b in range(256) if b != 0x80], dtype=np.uint8)
    fnuz = torch.from_numpy(finite).view(torch.float8_e4m3fnuz)
    given = state(**{"f.weight": fnuz, "g.weight": fnuz, "u.weight": codes([0x7E, 1])})
    before = frozen(given)
    after = rescale_state_dict(given, inplace=inplace, unscaled="dequantize")
    assert list(after) == list(before)
    assert after["f.weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(after["f.weight"].float(), fnuz.float().to(torch.float8_e4m3fn).float())
    assert after["f.weight"].data_ptr() == after["g.weight"].data_ptr()
    assert after["u.weight"].dtype == torch.bfloat16
    assert after["u.weight"].tolist() == [448, 2**-9]
    assert same_bytes(fnuz, before["f.weight"])
    if not inplace:
        unchanged(given, before)


def test_nothing_in_nothing_out():
    assert rescale_state_dict({}) == {}
    assert issubclass(WeightError, Fp8LoaderError)


def test_inside_a_default_device():
    given = state(**{"b.weight": random_codes((12, 8), 3).t(), "b.weight_scale": torch.ones(1).expand(8, 1)})
    expected = rescale_state_dict(given)
    with torch.device("meta"):
        after = rescale_state_dict(given)
    assert all(same_bytes(after[name], expected[name]) for name in expected)
