"""The last look at a state dict."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuron_fp8_loader import Options, WeightError
from neuron_fp8_loader.integrations.check import check_ready

FP8 = torch.float8_e4m3fn


def codes(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(FP8)


@given(st.integers(0, 255), st.integers(0, 99), st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]))
def test_every_code_wherever_it_lies(code: int, place: int, kind: str) -> None:
    weight = torch.full((100,), 0x77, dtype=torch.uint8)
    weight[place] = code
    weight = weight.view(10, 10)
    if kind == "transposed":
        weight = weight.T
    elif kind == "sliced":
        weight = torch.cat([weight, torch.full((10, 3), 0x7E, dtype=torch.uint8)], 1)[:, :10]
    elif kind == "expanded":
        weight = weight.reshape(1, 10, 10).expand(2, 10, 10)
    state_dict = {"x.weight": weight.view(FP8)}
    if code & 0x7F > 0x77:
        with pytest.raises(WeightError, match=r"x\.weight"):
            check_ready(state_dict, "here", Options())
    else:
        check_ready(state_dict, "here", Options())


def test_large_weights_are_looked_at_whole() -> None:
    weight = torch.zeros(3 << 20, dtype=torch.uint8)
    weight[-1] = 0x78
    with pytest.raises(WeightError, match=r"here: .*\n  - a: 1 codes above 240"):
        check_ready({"a": weight.view(FP8)}, "here", Options())


def test_all_of_them_are_named() -> None:
    with pytest.raises(WeightError, match="2 float8_e4m3fn weights") as error:
        check_ready({"a": codes(0x7E, 0x78), "b": codes(0x77), "c": codes(0xFF)}, "here", Options())
    assert "a: 2 codes above 240" in str(error.value)
    assert "c: 1 NaN codes" in str(error.value)


def test_nan_is_let_through_where_asked_and_only_nan() -> None:
    check_ready({"a": codes(0x7F, 0xFF)}, "here", Options(nan="keep"))
    with pytest.raises(WeightError, match="a: 1 codes above 240"):
        check_ready({"a": codes(0x7F, 0x7E)}, "here", Options(nan="keep"))


def test_what_is_no_weight_passes() -> None:
    large = torch.full((4, 4), 448.0).to(FP8)
    packed = torch.zeros(4, 8, dtype=torch.uint8)
    passes = {
        "a.weight": packed,
        "a.scale": large,  # NVFP4
        "b.weight_packed": packed,
        "b.weight_scale": large,
        "scaled_fp8": codes(0x7E, 0x7E),
        "meta.weight": torch.empty(4, 4, dtype=FP8, device="meta"),
        "plain": torch.full((4,), 1e6),
        "empty": torch.empty(0, dtype=FP8),
        "number": 3,
    }
    check_ready(passes, "here", Options())
    for name in ("c.scale", "c.weight", "a.scale_of_its_own"):
        with pytest.raises(WeightError):
            check_ready({**passes, name: large}, "here", Options())
