"""Shards read apart go together, and .bin files load as safetensors do."""

from __future__ import annotations

import pytest
import torch
from support import random_codes, same_bytes, save, save_shards

from neuron_fp8_loader import load_checkpoint, load_file, load_state_dict
from neuron_fp8_loader.checkpoint.source import SafetensorsSource

ONE = torch.ones(1)


@pytest.mark.parametrize("hot", [0, 1, None])
@pytest.mark.parametrize("ext", [".safetensors", ".bin"])
def test_shards_loaded_one_by_one_go_together(tmp_path, hot, ext):
    """Only the weight of one shard (or none) overflows; scales and activation scales lie elsewhere."""
    tops = [0x7E if hot == i else 0x77 for i in (0, 1)]
    shards = [
        {
            "a.weight": random_codes((16, 16), 1, top=tops[0]),
            "b.weight_scale": torch.rand(16, 1),
            "norm": torch.rand(5),
        },
        {"b.weight": random_codes((16, 16), 2, top=tops[1]), "c.weight": random_codes((4, 4), 3, top=0x77)},
        {"a.weight_scale": torch.rand(16, 1), "c.weight_scale": torch.rand(1), "a.input_scale": torch.rand(1)},
    ]
    if hot is not None:
        shards[hot][f"{'ab'[hot]}.weight"].view(torch.uint8)[-1, -1] = 0x7E
    files = save_shards(tmp_path, *shards, ext=ext)
    whole = load_state_dict(tmp_path)
    assert (whole["a.weight_scale"] / shards[2]["a.weight_scale"]).unique().tolist() == [2.0 if hot == 0 else 1.0]
    assert (whole["b.weight_scale"] / shards[0]["b.weight_scale"]).unique().tolist() == [2.0 if hot == 1 else 1.0]
    assert (whole["a.input_scale"] / shards[2]["a.input_scale"]).item() == (1 if hot is None else 2)
    assert torch.equal(whole["c.weight_scale"], shards[2]["c.weight_scale"])
    for file, tensors in zip(files, shards, strict=True):
        part = load_file(file)
        assert sorted(part) == sorted(tensors)
        assert all(same_bytes(part[name], whole[name]) for name in part)


def test_bin_equals_safetensors(tmp_path):
    tensors = {
        "a.weight": random_codes((32, 16)),
        "a.weight_scale": torch.rand(32, 1).bfloat16(),
        "u.weight": random_codes((4, 4), top=0x77),
        "plain": torch.rand(3, 3),
        "a.input_scale": torch.tensor(0.25),
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    file = save(tmp_path / "one.safetensors", tensors)
    for options in ({}, {"method": "ratio"}, {"always": True}, {"unscaled": "dequantize"}):
        ours, reference = load_state_dict(tmp_path / "pytorch_model.bin", **options), load_state_dict(file, **options)
        assert ours.keys() == reference.keys()
        assert all(same_bytes(ours[name], reference[name]) for name in reference)


def test_tied_weights_in_a_bin_file_share_afterwards(tmp_path):
    weight, scale = random_codes((8, 8)), torch.rand(8, 1)
    tensors = {"a.weight": weight, "a.weight_scale": scale, "b.weight": weight, "b.weight_scale": scale, "n": 3}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    after = load_state_dict(tmp_path)
    assert after["a.weight"].data_ptr() == after["b.weight"].data_ptr()
    assert torch.equal(after["b.weight_scale"], scale * 2)
    assert after["n"] == 3


def test_weights_that_share_a_scale_are_decided_together(tmp_path):
    shared = {
        "x": random_codes((8, 8), top=0x77),
        "x.weight": random_codes((8, 8)),
        "x.weight_scale": torch.rand(8, 1),
    }
    for order in (["x", "x.weight", "x.weight_scale"], ["x.weight_scale", "x.weight", "x"]):
        tensors = {name: shared[name] for name in order}
        loaded = load_checkpoint(save(tmp_path / "model.safetensors", tensors))
        assert len(loaded.plan.groups) == 1
        assert {w.name for w in loaded.report.rescaled} == {"x", "x.weight"}
        even = shared["x"].view(torch.uint8) & 0x7F >= 0x10
        assert torch.equal(loaded.state_dict["x"].float()[even] * 2, shared["x"].float()[even])
    files = save_shards(
        tmp_path, {"x": shared["x"]}, {"x.weight": shared["x.weight"]}, {"x.weight_scale": ONE}, stem="m"
    )
    assert same_bytes(load_file(files[0])["x"], loaded.state_dict["x"])


def test_a_shard_written_anew_is_read_anew(tmp_path):
    """Headers and plans are kept for shards loaded one by one, as long as the files say the same."""
    for i, name in enumerate(("a", "b", "b", "c")):
        dtype = torch.float8_e4m3fn if i != 2 else torch.int8  # of the same size
        first = {f"{name}.weight": torch.full((8,), 256.0).to(dtype) if i != 2 else torch.ones(8, dtype=dtype)}
        files = save_shards(tmp_path, first, {f"{name}.weight_scale": ONE * (i + 1)})
        for _ in range(2):
            assert load_file(files[1])[f"{name}.weight_scale"].item() == (i + 1) * (1 if i == 2 else 2)
            assert list(load_file(files[0])) == [f"{name}.weight"]


def test_whether_anything_overflows_is_looked_for_once(tmp_path, monkeypatch):
    """A checkpoint that fits, a shard at a time: each activation scale hangs on all weights, which are read once."""
    shards = [
        {
            f"{n}.weight": random_codes((64, 64), n, top=0x77),
            f"{n}.weight_scale": ONE.clone(),
            f"{n}.input_scale": ONE.clone(),
        }
        for n in range(8)
    ]
    files, looks = save_shards(tmp_path, *shards), []
    plain = SafetensorsSource.find_overflow
    monkeypatch.setattr(SafetensorsSource, "find_overflow", lambda *a, **k: looks.append(a) or plain(*a, **k))
    for n, file in enumerate(files):
        assert load_file(file)[f"{n}.input_scale"].item() == 1
    assert len(looks) == 1
    shards[3]["3.weight"].view(torch.uint8)[0, 0] = 0x7E  # other files: another fact
    files = save_shards(tmp_path, *shards)
    assert load_file(files[0])["0.input_scale"].item() == 2
