"""Rows are told by all their bytes, of which no more are read than it takes."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from neuron_fp8_loader import WeightError
from neuron_fp8_loader.integrations import rows as reading
from neuron_fp8_loader.integrations.row_scales import Rows
from neuron_fp8_loader.integrations.rows import sample_of
from tests.support import random_codes

FP8 = torch.float8_e4m3fn
WIDE = 256
SIZES = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 64, "gate_proj": 128}
FUSED = ("q_proj", "k_proj", "v_proj")
Tensors = dict[str, torch.Tensor]


def given(layers: int = 1, wide: int = WIDE) -> Tensors:
    tensors = {}
    for layer in range(layers):
        for n, (name, rows) in enumerate(SIZES.items()):
            tensors[f"layers.{layer}.{name}.weight"] = random_codes((rows, wide), 10 * layer + n, top=0x77)
            tensors[f"layers.{layer}.{name}.scale"] = torch.arange(1.0, rows + 1).unsqueeze(1) * (n + 1)
    return tensors


def sampled(width: int) -> torch.Tensor:
    """bool [width]: the columns that a sample holds."""
    return sample_of(torch.eye(width, dtype=torch.uint8)).bool().any(dim=1)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def fuse(state: Tensors) -> None:
    for layer in {name.split(".")[1] for name in state}:
        at = f"layers.{layer}"
        state[f"{at}.Wqkv.weight"] = torch.cat([raw(state.pop(f"{at}.{name}.weight")) for name in FUSED]).view(FP8)
        for name in FUSED:
            del state[f"{at}.{name}.scale"]


def converted(tensors: Tensors, convert: Callable[[Tensors], None] = fuse) -> Tensors:
    rows, result = Rows.of(tensors), dict(tensors)
    convert(result)
    rows.attach(result, "ckpt")
    return result


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How many rows were read of the tensor at an address."""
    found: Counter[int] = Counter()
    parts = reading._parts

    def counted(weight: torch.Tensor, rows: Sequence[int]) -> Iterator[Any]:
        found[weight.data_ptr()] += len(rows)
        yield from parts(weight, rows)

    monkeypatch.setattr(reading, "_parts", counted)
    return found


@pytest.mark.parametrize("layers", [1, 2])
def test_each_row_that_is_asked_for_is_read_once_and_once_where_it_was(read: Counter[int], layers: int) -> None:
    tensors = given(layers)
    converted(tensors)
    assert read.total() == layers * 2 * sum(SIZES[name] for name in FUSED)
    for layer in range(layers):
        for name, rows in SIZES.items():
            assert read[tensors[f"layers.{layer}.{name}.weight"].data_ptr()] == (rows if name in FUSED else 0)


def test_other_rows_of_a_weight_are_not_read(read: Counter[int]) -> None:
    tensors = given()
    q_proj = raw(tensors["layers.0.q_proj.weight"])
    q_proj[20] = q_proj[3]
    q_proj[20, -1] ^= 1
    assert torch.equal(sample_of(q_proj)[20], sample_of(q_proj)[3])
    q_proj[21:23] = 0
    down_proj = torch.zeros(4, 2 * WIDE, dtype=torch.uint8)
    down_proj[:, sampled(2 * WIDE)] = sample_of(q_proj)[:4]  # of another width
    tensors |= {"layers.0.down_proj.weight": down_proj.view(FP8), "layers.0.down_proj.scale": torch.full((4, 1), 9.0)}

    def cut(state: Tensors) -> None:
        rows = raw(state.pop("layers.0.q_proj.weight"))[:8]
        state["layers.0.query.weight"] = torch.nn.functional.pad(rows, (0, 0, 0, 4)).view(FP8)

    result = converted(tensors, cut)
    assert result["layers.0.query.scale"].flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 1, 1, 1, 1]
    assert read[q_proj.data_ptr()] == 9  # row 20 may be row 3
    assert read[down_proj.data_ptr()] == 0
    assert read[result["layers.0.query.weight"].data_ptr()] == 8 + 4  # the last to see that they are zeros


def test_rows_that_are_nowhere_are_not_read(read: Counter[int]) -> None:
    def quantize_anew(state: Tensors) -> None:
        state["layers.0.o_proj.weight"] = random_codes((64, WIDE), 99)

    tensors = given()
    assert torch.equal(converted(tensors, quantize_anew)["layers.0.o_proj.scale"], tensors["layers.0.o_proj.scale"])
    assert read.total() == 0


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_memory_is_a_part_of_a_weight(monkeypatch: pytest.MonkeyPatch, zeros: bool, turned: bool) -> None:
    chunk = 2**16
    monkeypatch.setattr(reading, "_CHUNK", chunk)
    tensors = given(wide=2**14)
    if zeros:
        raw(tensors["layers.0.q_proj.weight"])[:] = 0
    rows, result = Rows.of(tensors), dict(tensors)
    fuse(result)
    weight = result["layers.0.Wqkv.weight"]
    if turned:
        result["layers.0.Wqkv.weight"] = weight = raw(weight).t().contiguous().t().view(FP8)
    tracemalloc.start()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        before = tracemalloc.get_traced_memory()[0]
        rows.attach(result, "ckpt")
        peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    largest = max(event.cpu_memory_usage for event in profile.function_events)
    assert 0 < largest < 2 * chunk < weight.nbytes // 4  # a chunk, and the numbers of its rows
    assert 0 < peak < weight.nbytes // 8


@pytest.mark.parametrize("width", [100, WIDE])
@pytest.mark.parametrize("code", [0, 0x80, 7])
def test_rows_that_differ_where_no_sample_is(width: int, code: int) -> None:
    """In one bit of one column."""
    hidden = (~sampled(width)).nonzero().flatten()
    weight = torch.full((len(hidden), width), code, dtype=torch.uint8)
    weight[torch.arange(len(hidden)), hidden] ^= 1
    scale = torch.rand(len(hidden), 1)
    order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))

    def permute(state: Tensors) -> None:
        state["layers.0.query.weight"] = raw(state.pop("layers.0.q_proj.weight"))[order].view(FP8)

    tensors = {"layers.0.q_proj.weight": weight.view(FP8), "layers.0.q_proj.scale": scale}
    assert torch.equal(converted(tensors, permute)["layers.0.query.scale"], scale[order])
    weight[5] = weight[40]
    with pytest.raises(WeightError, match=r"may be row 5 of \S+q_proj or row 40 of \S+q_proj, which have different"):
        converted(tensors, permute)


def test_many_equal_rows_are_read_once_and_keep_their_scale(read: Counter[int]) -> None:
    tensors = given()
    for name in FUSED:
        raw(tensors[f"layers.0.{name}.weight"])[:] = 7
        tensors[f"layers.0.{name}.scale"][:] = 3e-30
    assert torch.equal(converted(tensors)["layers.0.Wqkv.scale"], torch.full((64, 1), 3e-30))
    assert read.total() == 2 * 64
    tensors["layers.0.v_proj.scale"][15] = 3e30
    with pytest.raises(WeightError, match=r"row 0 may be row 0 of \S+q_proj or row 15 of \S+v_proj, which have"):
        converted(tensors)


@pytest.mark.parametrize("width", [1, 5, 8, 24, 32, 100, 256, 2056])
def test_a_sample_is_the_same_however_a_weight_lies(width: int) -> None:
    raw = torch.randint(0, 256, (7, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    weight = raw.view(torch.float8_e4m3fn)
    odd = torch.zeros(7 * width + 3, dtype=torch.uint8)[3:].view(7, width).copy_(raw).view(torch.float8_e4m3fn)
    wide = torch.zeros(7, width + 9, dtype=torch.uint8)[:, :width].copy_(raw).view(torch.float8_e4m3fn)
    turned = raw.t().contiguous().t().view(torch.float8_e4m3fn)
    sample = sample_of(weight)
    for other in (odd, wide, turned):
        assert torch.equal(sample_of(other), sample)
    assert sample.shape[1] <= min(width, 5 * 8)
    before = sample.clone()
    raw[:, 0] ^= 1
    assert torch.equal(sample, before)  # a copy
    assert (sample_of(weight) != sample).any(dim=1).all()
