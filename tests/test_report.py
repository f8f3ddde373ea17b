"""What a load says of itself."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file as original
from support import TINY, codes, raw, save, shared

from neuron_fp8_loader import kernel, load_checkpoint
from neuron_fp8_loader.errors import listing
from neuron_fp8_loader.host.units import size


@pytest.fixture
def loaded(tmp_path):
    tensors = {
        "a.weight": codes([[0x7E, 0x01, 0x03], [0x78, 0xF9, 0x10]]),  # three above 240, two odd subnormals
        "a.weight_scale": torch.tensor(1.0),
        "b.weight": codes([[0x01, 0x77]]),  # fits, so nothing is rounded
        "b.weight_scale": torch.tensor(1.0),
        "a.input_scale": torch.tensor(0.5),
        "c.weight": codes([[0x08]]),  # no scale
    }
    return load_checkpoint(save(tmp_path / "m.safetensors", tensors), unscaled="dequantize", threads=3)


def test_what_is_requantized_is_counted_as_a_bound():
    report = load_checkpoint(shared("hf_fp8_block"), layout="per_channel").report
    codes = sum(weight.numel for weight in report.weights)
    assert report.rounded == codes
    assert f"at most {codes} rounded" in report.summary()


def test_counts(loaded):
    report = loaded.report
    by_name = {w.name: w for w in report.weights}
    assert by_name["a.weight"].counts == kernel.Counts(max=0x7E, above=3, lossy=2, nan=0)
    assert by_name["b.weight"].counts == kernel.Counts(max=0x77, above=0, lossy=1, nan=0)
    assert [w.name for w in report.rescaled] == ["a.weight"]
    assert report.counts == kernel.Counts(0x7E, 3, 3, 0)
    assert report.rounded == 2
    assert report.activation_scales == 1
    assert report.dequantized == ["c.weight"]
    assert report.tensors == 6
    assert report.nbytes == 6 + 4 + 2 + 4 + 4 + 1
    assert (report.method, report.kernel, report.threads) == ("half", kernel.active, 3)
    assert report.seconds > 0


def test_summary_is_one_line(loaded):
    text = loaded.report.summary()
    assert "\n" not in text
    for part in (
        "6 tensors",
        "1 of 3 FP8 weights rescaled (half)",
        "3 of 9 codes were above 240",
        "2 rounded",
        "0 NaN",
        "1 activation scales rescaled",
        "weights dequantized",
        kernel.active,
    ):
        assert part in text


def test_json(loaded):
    data = json.loads(json.dumps(loaded.report.to_dict()))
    weights = {w["name"]: w for w in data["weights"]}
    expected = {"name": "a.weight", "numel": 6, "rescaled": True, "max": 0x7E, "above": 3, "lossy": 2, "nan": 0}
    assert weights["a.weight"] == expected
    assert data["gb_per_s"] > 0
    plan = json.loads(json.dumps(loaded.plan.to_dict()))
    assert plan["unscaled"] == ["c.weight"]
    assert [p["scale_shape"] for p in plan["pairs"]] == [[], []]


def test_the_tiny_checkpoint_counted_by_numpy():
    report = load_checkpoint(TINY).report
    for weight in report.weights:
        tensor = original(TINY / "model.safetensors")[weight.name]
        magnitude = raw(tensor) & 0x7F
        assert weight.numel == tensor.numel()
        assert weight.counts.max == magnitude.max()
        assert weight.counts.above == np.count_nonzero(magnitude > 0x77)
        assert weight.counts.lossy == np.count_nonzero((magnitude < 0x10) & (magnitude & 1))
    assert len(report.weights) == 14


def test_the_summary_is_logged(caplog, tmp_path):
    path = save(tmp_path / "m.safetensors", {"a": torch.ones(1)})
    with caplog.at_level(logging.INFO, "neuron_fp8_loader"):
        load_checkpoint(path)
    assert "1 tensors" in caplog.text


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (1.62e6, "1.62 MB"), (7e13, "70 TB")]
)
def test_sizes(nbytes, text):
    assert size(nbytes) == text


def test_long_lists_are_cut():
    text = listing("problem", [f"p{i}" for i in range(25)])
    assert text.startswith("25 problems:\n  - p0\n")
    assert text.endswith("- p19\n  ... and 5 more")
    assert listing("problem", ["only"]) == "1 problem:\n  - only"
