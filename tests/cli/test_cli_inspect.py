"""``neuron-fp8 inspect``: counts against numpy, exit codes, headers only, plots."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from neuron_fp8_loader import load_checkpoint
from neuron_fp8_loader.tools.plot import module_kind
from neuron_fp8_loader.tools.scan import scan_checkpoint
from tests.cli.helpers import COOL, HOT, KEEP, codes, layer, one_line, run, run_json, sharded, single
from tests.support import TINY, ieee_e4m3, raw, shared

needs_plot = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("altair", "vl_convert"))), reason="the extra 'plot' is not installed"
)


@pytest.mark.parametrize("name", ["tiny", "ct_fp8_static", "hf_fp8_block", "torchao_fp8_wo", "derived_split_shards"])
def test_counts_are_those_that_ml_dtypes_sees(name: str) -> None:
    path = TINY if name == "tiny" else shared(name)
    data = run_json("inspect", path, code=0)
    tensors = {k: v for f in sorted(path.glob("*.safetensors")) for k, v in load_file(f).items()}
    assert {pair["weight"] for pair in data["pairs"]} == {
        k for k, v in tensors.items() if v.dtype == torch.float8_e4m3fn
    }
    for pair in data["pairs"]:
        values = ieee_e4m3(tensors[pair["weight"]])
        assert pair["as_inf"] == np.isinf(values).sum()
        assert pair["as_nan"] == np.isnan(values).sum()  # no NaN codes in these
        assert pair["codes"] == values.size
    magnitudes = np.concatenate([raw(tensors[p["weight"]]).ravel() & 0x7F for p in data["pairs"]])
    assert data["codes"]["histogram"] == np.bincount(magnitudes, minlength=128).tolist()


def test_the_load_announced_is_the_load_done() -> None:
    data, report = run_json("inspect", TINY, code=0), load_checkpoint(TINY).report
    assert data["load"] == {
        "method": "half",
        "rescaled": len(report.rescaled),
        "requantized": 0,
        "dequantized": 0,
        "layout": "per_channel",
        "rounded_codes": report.rounded,
        "predicted_sqnr_db": pytest.approx(137.9, abs=0.5),  # what verify measures, in docs/cli.md
        "least_sqnr_db": pytest.approx(134.4, abs=1.1),
        "refusals": [],
    }
    after = load_checkpoint(TINY).state_dict
    loaded = np.concatenate([raw(after[p["weight"]]).ravel() & 0x7F for p in data["pairs"]])
    assert data["codes"]["histogram_after"] == np.bincount(loaded, minlength=128).tolist()


def test_a_checkpoint_that_fits_is_no_finding(tmp_path: Path) -> None:
    data = run_json("inspect", single(tmp_path / "c", layer(0, hot=False)), code=0)
    assert data["codes"]["weights_that_fit"] == 1
    assert data["load"]["rescaled"] == 0
    assert "nothing: all fits already" in run("inspect", tmp_path / "c").stdout


def test_weights_that_share_a_scale_go_together(tmp_path: Path) -> None:
    tensors = {"a.w1": codes(*HOT, shape=(4, 4)), "a.w1_scale": torch.ones(1), "b.weight": codes(*COOL, shape=(4, 4))}
    data = run_json("inspect", single(tmp_path / "c", tensors | {"b.weight_scale": torch.ones(1)}), *KEEP, code=0)
    assert {p["weight"]: p["rescaled"] for p in data["pairs"]} == {"a.w1": True, "b.weight": False}


def test_what_a_load_refuses_is_told(tmp_path: Path) -> None:
    tensors = layer(0) | {"x.weight": codes(*HOT, shape=(4, 4)), "y.weight": codes(0x7F, 0x10, shape=(4, 4))}
    path = single(tmp_path / "c", tensors | {"y.weight_scale": torch.tensor([float("inf")])})
    data = run_json("inspect", path, code=1)
    assert len(data["load"]["refusals"]) == 3
    assert data["codes"]["nan"] == 8
    text = run("inspect", path).stdout
    for reason in ("y.weight: 8 NaN codes", "x.weight: 8 codes above 240", "not finite"):
        assert reason in text
    kept = run_json("inspect", path, "--nan", "keep", "--unscaled", "dequantize", code=0)
    assert kept["load"]["refusals"] == []


def test_one_shard_of_several_is_no_checkpoint(tmp_path: Path) -> None:
    path = sharded(tmp_path / "c", layer(0), layer(1))
    (path / "model.safetensors.index.json").unlink()
    (path / "model-00002-of-00002.safetensors").unlink()
    assert "1 of 2 shards missing: 00002" in one_line(run("inspect", path))


def test_headers_only_reads_no_weights(tmp_path: Path) -> None:
    """A file whose data was never written: any size takes no longer."""
    header = (
        b'{"m.weight":{"dtype":"F8_E4M3","shape":[65536,131072],"data_offsets":[0,8589934592]},'
        b'"m.weight_scale":{"dtype":"F32","shape":[],"data_offsets":[8589934592,8589934596]}}'
    )
    header += b" " * (-len(header) % 8)
    huge = tmp_path / "huge.safetensors"
    with open(huge, "wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        try:
            handle.truncate(8 + len(header) + 8589934596)
        except OSError:
            pytest.skip("no sparse files here")
    data = run_json("inspect", huge, "--headers-only", code=0)
    assert data["bytes"] == 8589934596
    assert data["codes"] is None
    assert [p["granularity"] for p in data["pairs"]] == ["tensor"]


def test_controls_hold_nothing_to_rescale() -> None:
    for name in ("ct_nvfp4", "ct_int8_w8a8"):
        data = run_json("inspect", shared(name))
        assert data["pairs"] == []
    assert len(run_json("inspect", shared("ct_nvfp4"))["untouched_fp8"]) == 14


def test_a_bin_file_counts_the_same(tmp_path: Path) -> None:
    tensors = load_file(TINY / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert run_json("inspect", tmp_path)["codes"] == run_json("inspect", TINY)["codes"]


def test_fnuz_weights_all_fit(tmp_path: Path) -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(16, 16)
    path = single(tmp_path / "c", {"m.weight": weight.view(torch.float8_e4m3fnuz), "m.weight_scale": torch.ones(1)})
    data = run_json("inspect", path, *KEEP, code=1)  # its one NaN code would stop a load
    assert (data["codes"]["as_inf"], data["codes"]["as_nan"], data["codes"]["nan"]) == (0, 0, 1)


def test_scan_over_shards_of_any_cut(tmp_path: Path) -> None:
    path = sharded(tmp_path / "c", layer(0), layer(1, hot=False), layer(2))
    scan = scan_checkpoint(path, threads=2)
    assert [w.name.split(".")[2] for w in scan.worst()] == ["0", "2"]
    assert len(scan.verdict.groups) == 2


@pytest.mark.parametrize(
    ("weight", "kind"),
    [
        ("model.layers.3.mlp.experts.7.up_proj.weight", ("3", "mlp.experts.*.up_proj")),
        ("layers.0.attention.wq.weight", ("0", "attention.wq")),
        ("model.layers.11.self_attn.q_proj._weight_qdata", ("11", "self_attn.q_proj")),
        ("lm_head.weight", ("-", "lm_head")),
    ],
)
def test_module_kind(weight: str, kind: tuple[str, str]) -> None:
    assert module_kind(weight) == kind


@needs_plot
@pytest.mark.parametrize("suffix", [".png", ".html"])
def test_plot(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"plot{suffix}"
    assert run("inspect", TINY, "--plot", file).exit_code == 0
    content = file.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
    else:
        assert b"self_attn.q_proj" in content
        assert b"https://cdn" not in content  # opens without a network


@needs_plot
def test_nothing_to_plot(tmp_path: Path) -> None:
    path = single(tmp_path / "c", {"norm": torch.ones(3)})
    result = run("inspect", path, "--plot", tmp_path / "x.png")
    assert result.exit_code == 0
    assert "nothing to draw" in result.stdout
    assert not (tmp_path / "x.png").exists()


def test_a_plot_that_cannot_be_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ends in .png or .html" in one_line(run("inspect", TINY, "--plot", tmp_path / "x.pdf"))
    assert "no such directory" in one_line(run("inspect", TINY, "--plot", tmp_path / "no" / "x.png"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'neuron-fp8-loader[plot]'" in one_line(run("inspect", TINY, "--plot", tmp_path / "x.png"))
