"""Real checkpoints in, Neuron-ready state dicts out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file as original
from support import (
    SHARED,
    TINY,
    blob,
    digests,
    e4m3fn,
    expand,
    ieee_e4m3,
    raw,
    same_bytes,
    save,
    scale_values,
    shared,
    sqnr,
)

from neuron_fp8_loader import load_checkpoint, load_file, load_state_dict, plan_checkpoint
from neuron_fp8_loader.errors import ScaleError
from neuron_fp8_loader.plan import Plan

THREE = ("weight_scale", "weight_scale_inv", "scale")
REAL = [
    "tiny",
    "ct_fp8_block",
    "ct_fp8_dynamic",
    "ct_fp8_dynamic_moe",
    "ct_fp8_static",
    "ct_fp8_static_kv",
    "ct_mxfp8",
    "derived_fbgemm",
    "derived_split_shards",
    "hf_fp8_block",
    "modelopt_fp8",
    "modelopt_fp8_kv",
    "modelopt_fp8_pb_wo",
    "quark_fp8_tensor_kv",
]
CONTROLS = ["ct_nvfp4", "ct_int8_w8a8"]


@pytest.fixture(params=REAL)
def real(request):
    return TINY if request.param == "tiny" else shared(request.param)


def on_disk(directory) -> dict[str, torch.Tensor]:
    """Everything in the files, by safetensors' own reader, in the order of the files."""
    return {k: v for f in sorted(directory.glob("*.safetensors")) for k, v in original(f).items()}


def products(plan: Plan, tensors) -> dict[str, np.ndarray]:
    """weight x scale of every pair, float64."""
    return {
        p.weight: e4m3fn(tensors[p.weight]) * expand(scale_values(tensors[p.scale]), tuple(tensors[p.weight].shape))
        for p in plan.pairs
    }


def test_the_list_is_complete():
    """Every shared checkpoint that uses one of the three conventions, and no other, is in the list above."""
    if not SHARED.is_dir():
        pytest.skip("no shared checkpoints")
    for directory in sorted(SHARED.iterdir()):
        if directory.name.startswith("_") or not any(directory.glob("*.safetensors")):
            continue
        used = {pair.convention for pair in plan_checkpoint(directory).pairs}
        assert (directory.name in REAL) == bool(used and used <= set(THREE)), directory.name


def test_fits_the_device_and_keeps_every_value(real):
    hashes, before = digests(real), on_disk(real)
    loaded = load_checkpoint(real)
    after, plan = loaded.state_dict, loaded.plan
    assert plan.pairs
    assert not plan.unscaled
    was, now = products(plan, before), products(plan, after)
    for pair in plan.pairs:
        assert not np.isfinite(ieee_e4m3(before[pair.weight])).all()  # what a device would have read
        assert np.isfinite(ieee_e4m3(after[pair.weight])).all()
        assert np.abs(ieee_e4m3(after[pair.weight])).max() <= 224
        assert sqnr(was[pair.weight], now[pair.weight]) >= 100
        # but for the odd codes below 0x10, exactly the same
        code = raw(before[pair.weight]) & 0x7F
        exact = (code >= 0x10) | (code & 1 == 0)
        np.testing.assert_array_equal(was[pair.weight][exact], now[pair.weight][exact])
    assert digests(real) == hashes


def test_nothing_else_changes(real):
    before, loaded = on_disk(real), load_checkpoint(real)
    after, plan = loaded.state_dict, loaded.plan
    assert list(after) == list(before)
    activation = {a.name for a in plan.activation_scales}
    changed = {p.weight for p in plan.pairs} | {p.scale for p in plan.pairs} | activation
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].shape == tensor.shape
        assert same_bytes(after[name], tensor) == (name not in changed), name
        if name in activation:
            assert torch.equal(after[name], tensor * 2)


def test_ratio_gives_the_recipes_bytes_on_every_weight(real):
    before = on_disk(real)
    plan = plan_checkpoint(real)
    if any(before[p.scale].element_size() == 1 for p in plan.pairs):
        with pytest.raises(ScaleError, match='use method="half"'):
            load_state_dict(real, method="ratio", always=True)
        return
    after = load_state_dict(real, method="ratio", always=True)
    for pair in plan.pairs:
        recipe = (before[pair.weight].bfloat16() / (448.0 / 240.0)).to(torch.float8_e4m3fn)
        assert same_bytes(after[pair.weight], recipe)
        assert same_bytes(after[pair.scale], before[pair.scale] * (448.0 / 240.0))
        if np.abs(e4m3fn(before[pair.weight])).max() == 448:
            assert np.abs(ieee_e4m3(after[pair.weight])).max() == 240
    assert not plan.pairs or any(np.abs(e4m3fn(before[pair.weight])).max() == 448 for pair in plan.pairs)


def test_ratio_converts_without_being_told(real):
    plan = plan_checkpoint(real)
    if any(plan.tensors[p.scale].dtype == "uint8" for p in plan.pairs):
        pytest.skip("e8m0 scales")
    after = load_state_dict(real, method="ratio")
    assert all(np.isfinite(ieee_e4m3(after[p.weight])).all() for p in plan.pairs)


@pytest.mark.parametrize("method", ["half", "ratio"])
def test_loading_is_idempotent(tmp_path, method):
    once = load_state_dict(TINY, method=method)
    again = load_checkpoint(save(tmp_path / "model.safetensors", once), method=method)
    assert again.report.rescaled == []
    for name, tensor in once.items():
        assert same_bytes(again.state_dict[name], tensor)


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("always", [False, True])
def test_controls_come_through_byte_for_byte(name, always):
    before, after = on_disk(shared(name)), load_state_dict(shared(name), always=always)
    assert list(after) == list(before)
    assert all(same_bytes(after[n], before[n]) for n in before)


def test_split_shards_pair_across_files():
    directory = shared("derived_split_shards")
    whole = load_state_dict(directory)
    reference = load_state_dict(shared("hf_fp8_block"))
    for name, tensor in whole.items():
        assert same_bytes(tensor, reference[name])
    parts = [load_file(f) for f in sorted(directory.glob("*.safetensors"))]
    assert sum(len(part) for part in parts) == len(whole)
    for part in parts:
        assert all(same_bytes(tensor, whole[name]) for name, tensor in part.items())


def test_always_converts_what_fits(tmp_path):
    halved = save(tmp_path / "model.safetensors", load_state_dict(TINY))
    twice = load_checkpoint(halved, always=True)
    assert len(twice.report.rescaled) == 14
    for pair in twice.plan.pairs:
        assert np.abs(ieee_e4m3(twice.state_dict[pair.weight])).max() <= 112
        assert torch.equal(twice.state_dict[pair.scale], original(halved)[pair.scale] * 2)


def test_threads_do_not_matter(monkeypatch):
    reference = {name: blob(t) for name, t in load_state_dict(TINY, threads=1).items()}
    for threads in (2, 7):
        assert {name: blob(t) for name, t in load_state_dict(TINY, threads=threads).items()} == reference
    monkeypatch.setenv("NEURON_FP8_LOADER_THREADS", "3")
    loaded = load_checkpoint(TINY)
    assert loaded.report.threads == 3
    assert {name: blob(t) for name, t in loaded.state_dict.items()} == reference


def test_what_is_returned_is_ones_own():
    """Plain CPU tensors with storages of their own, writable, on which nothing else hangs."""
    first, second = load_state_dict(TINY), load_state_dict(TINY)
    assert len({t.untyped_storage().data_ptr() for t in first.values()}) == len(first)
    for name, tensor in first.items():
        assert type(tensor) is torch.Tensor
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        tensor.view(-1).view(torch.uint8).zero_()
        assert same_bytes(second[name], load_state_dict(TINY)[name])
        break


def test_a_progress_bar_changes_nothing(capfd):
    shown = load_state_dict(TINY, progress=True)
    assert capfd.readouterr().out == ""
    assert all(same_bytes(t, shown[name]) for name, t in load_state_dict(TINY, progress=False).items())
    load_state_dict(TINY)  # no terminal here: no bar
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_metadata_comes_along(tmp_path):
    file = save(tmp_path / "model.safetensors", original(TINY / "model.safetensors"), {"format": "pt", "x": "y"})
    assert load_checkpoint(file).metadata == {"format": "pt", "x": "y"}


def test_load_file_takes_a_device_as_the_original_does():
    file = TINY / "model.safetensors"
    expected = load_state_dict(file)
    for loaded in (load_file(file, "cpu"), load_file(str(file), device=torch.device("cpu"))):
        assert list(loaded) == list(expected)
        assert all(same_bytes(loaded[name], tensor) for name, tensor in expected.items())
    assert {t.device.type for t in load_file(file, device="meta").values()} == {"meta"}
