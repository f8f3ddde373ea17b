"""Tensors that share memory, and layouts other than contiguous: changed once, and sharing afterwards."""

from __future__ import annotations

import pytest
import torch
from support import codes, frozen, halved, random_codes, same_bytes, unchanged

from neuron_fp8_loader import rescale_state_dict
from neuron_fp8_loader.errors import WeightError

BOTH = pytest.mark.parametrize("inplace", [False, True])


@BOTH
def test_tied_weights_are_rescaled_once_and_share_afterwards(inplace):
    weight, scale = random_codes((8, 8), 1), torch.rand(8, 1)
    expected = halved(weight)
    given = {"a.weight": weight, "a.weight_scale": scale, "b.weight": weight, "b.weight_scale": scale.clone()}
    before = frozen(given)
    after = rescale_state_dict(given, inplace=inplace)
    for name in "ab":
        assert same_bytes(after[f"{name}.weight"], expected)
        assert torch.equal(after[f"{name}.weight_scale"], before[f"{name}.weight_scale"] * 2)
    assert after["a.weight"].data_ptr() == after["b.weight"].data_ptr()
    if not inplace:
        unchanged(given, before)


@BOTH
def test_a_shared_scale_is_doubled_once(inplace):
    """One of its weights fits: they are decided together all the same."""
    scale = torch.rand(8, 1)
    given = {"a.weight": random_codes((8, 8), 1), "b.weight": random_codes((8, 8), 2, top=0x77)}
    given |= {"a.weight_scale": scale, "b.weight_scale": scale.view(8, 1)}
    before = frozen(given)
    after = rescale_state_dict(given, inplace=inplace)
    for name in "ab":
        assert torch.equal(after[f"{name}.weight_scale"], before["a.weight_scale"] * 2)
        assert same_bytes(after[f"{name}.weight"], halved(before[f"{name}.weight"]))
    assert after["a.weight_scale"].data_ptr() == after["b.weight_scale"].data_ptr()


@BOTH
@pytest.mark.parametrize("hot", [0, 1, 2])
def test_views_of_one_buffer(inplace, hot):
    """q, k and v as rows of one tensor: apart they are decided apart, and stay where they were."""
    buffer = random_codes((12, 8), 1, top=0x77)
    buffer.view(torch.uint8)[4 * hot, 3] = 0x7E
    parts = {name: buffer[4 * i : 4 * i + 4] for i, name in enumerate("qkv")}
    given = {f"{n}.weight": part for n, part in parts.items()} | {f"{n}.weight_scale": torch.rand(4, 1) for n in parts}
    before = frozen(given)
    after = rescale_state_dict(given, inplace=inplace)
    for i, name in enumerate("qkv"):
        expected = halved(before[f"{name}.weight"]) if i == hot else before[f"{name}.weight"]
        assert same_bytes(after[f"{name}.weight"], expected)
        assert torch.equal(after[f"{name}.weight_scale"], before[f"{name}.weight_scale"] * (2 if i == hot else 1))
    assert len({after[f"{n}.weight"].untyped_storage().data_ptr() for n in parts}) == 1
    if not inplace:
        unchanged(given, before)


@BOTH
@pytest.mark.parametrize(
    "cut",
    [
        lambda b: (b[:8], b[4:]),  # overlapping rows
        lambda b: (b[:, ::2], b[:, 1::2]),  # interleaved columns
        lambda b: (b[:, :3], b[:, 3:]),  # columns
        lambda b: (b.t(), b),  # the same, transposed
        lambda b: (b, b[2:3]),  # one inside the other
        lambda b: (b[::2], b[1:2].expand(5, 8)),
    ],
)
def test_overlapping_views_are_changed_once(inplace, cut):
    buffer = random_codes((12, 8), 3)
    expected_whole = halved(buffer)
    one, other = cut(buffer)
    want_one, want_other = cut(expected_whole)
    given = {"a.weight": one, "a.weight_scale": torch.rand(1), "b.weight": other, "b.weight_scale": torch.rand(1)}
    before = frozen(given)
    after = rescale_state_dict(given, inplace=inplace)
    assert same_bytes(after["a.weight"], want_one)
    assert same_bytes(after["b.weight"], want_other)
    assert after["a.weight"].stride() == one.stride()
    assert after["a.weight"].untyped_storage().data_ptr() == after["b.weight"].untyped_storage().data_ptr()
    assert torch.equal(after["b.weight_scale"], before["b.weight_scale"] * 2)
    if not inplace:
        unchanged(given, before)


@BOTH
def test_one_array_wrapped_twice(inplace):
    """Two storages over the same memory, of different lengths."""
    array = random_codes((64,), 5).view(torch.uint8).numpy()
    whole, tail = (torch.from_numpy(a).view(torch.float8_e4m3fn) for a in (array, array[32:]))
    tensors = {"a.weight": whole, "a.weight_scale": torch.ones(1), "b.weight": tail, "b.weight_scale": torch.ones(1)}
    before = frozen(tensors)
    with pytest.raises(WeightError, match=r"share memory[\s\S]*a\.weight, b\.weight"):
        rescale_state_dict(tensors, inplace=inplace)
    unchanged(tensors, before)
    same = {**tensors, "b.weight": torch.from_numpy(array).view(torch.float8_e4m3fn)}
    expected = halved(before["a.weight"])
    after = rescale_state_dict(same, inplace=inplace)
    assert same_bytes(after["a.weight"], expected)
    assert same_bytes(after["b.weight"], expected)


@BOTH
def test_one_array_wrapped_twice_in_parts_that_are_apart(inplace):
    """Two storages that begin at the same address."""
    array = random_codes((64,), 5).view(torch.uint8).numpy()
    head, tail = torch.from_numpy(array[:16]), torch.from_numpy(array)[32:]
    given = {"a.weight": head.view(torch.float8_e4m3fn), "b.weight": tail.view(torch.float8_e4m3fn)}
    given |= {"a.weight_scale": torch.ones(1), "b.weight_scale": torch.ones(1)}
    before = frozen(given)
    after = rescale_state_dict(given, inplace=inplace)
    for name in ("a.weight", "b.weight"):
        assert same_bytes(after[name], halved(before[name]))


@BOTH
@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.t(),
        lambda w: w[:, ::2],
        lambda w: w[3:, 2:5],
        lambda w: w[1:2].expand(5, 8),
        lambda w: w.view(4, 3, 8).permute(2, 0, 1),
        lambda w: w[5],
        lambda w: w[5, 5],
        lambda w: w[:0],
    ],
)
def test_layouts(inplace, view):
    """Non-contiguous, expanded, zero-dimensional and empty weights; bytes between the rows stay as they are."""
    buffer = random_codes((12, 8), 7)
    buffer.view(torch.uint8)[5, 5] = buffer.view(torch.uint8)[1, 1] = 0x7E
    before, weight = buffer.clone(), view(buffer)
    after = rescale_state_dict({"a.weight": weight, "a.weight_scale": torch.ones(1)}, inplace=inplace)
    assert same_bytes(after["a.weight"], halved(view(before)))
    if not inplace:
        assert same_bytes(buffer, before)
        return
    expected = before.clone()
    if weight.numel():
        shown = torch.zeros(12, 8, dtype=torch.bool)
        view(shown).fill_(True) if 0 not in view(shown).stride() else shown[1:2].fill_(True)
        expected.view(torch.uint8)[shown] = halved(before).view(torch.uint8)[shown]
    assert same_bytes(buffer, expected)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("layout", ["expanded", "strided", "0-dim"])
def test_scale_layouts(inplace, dtype, layout):
    buffer = torch.arange(1, 17).to(dtype).view(8, 2)
    scale = {"expanded": buffer[:1, :1].expand(8, 1), "strided": buffer[:, :1], "0-dim": buffer[0, 1]}[layout]
    before, others = scale.clone(), buffer[:, 1].clone()
    step = (lambda t: t + 1) if dtype == torch.uint8 else (lambda t: t * 2)
    after = rescale_state_dict({"a.weight": codes([[0x7E]] * 8), "a.weight_scale": scale}, inplace=inplace)
    assert after["a.weight_scale"].shape == before.shape
    assert torch.equal(after["a.weight_scale"], step(before))
    if layout != "0-dim":
        assert torch.equal(buffer[:, 1], others)
    if not inplace:
        assert torch.equal(scale, before)


@BOTH
def test_memory_shared_with_something_else_is_refused(inplace):
    weight = random_codes((8, 8), 1)
    for other in (weight.view(torch.uint8), weight.view(torch.uint8)[2:3], weight[1:].view(torch.int8)):
        given = {"a.weight": weight, "a.weight_scale": torch.ones(1), "bytes": other}
        before = frozen(given)
        with pytest.raises(WeightError, match=r"share memory[\s\S]*a\.weight, bytes|bytes, a\.weight"):
            rescale_state_dict(given, inplace=inplace)
        unchanged(given, before)
    flat = torch.zeros(64 + 4, dtype=torch.uint8)
    flat[:64], flat[64:] = weight.view(torch.uint8).view(-1), torch.ones(1).view(torch.uint8)
    given = {"a.weight": flat[:64].view(torch.float8_e4m3fn), "a.weight_scale": flat[64:].view(torch.float32)}
    after = rescale_state_dict(given, inplace=inplace)  # one buffer, but apart
    assert same_bytes(after["a.weight"], halved(weight.view(-1)))
    assert after["a.weight_scale"].item() == 2


def test_an_unscaled_alias_of_a_rescaled_weight_is_refused():
    weight = random_codes((8, 8), 1)
    given = {"a.weight": weight, "a.weight_scale": torch.ones(1), "alias": weight}
    with pytest.raises(WeightError, match=r"no scale[\s\S]*alias"):
        rescale_state_dict(given)
    with pytest.raises(WeightError, match="share memory"):
        rescale_state_dict(given, unscaled="keep")
