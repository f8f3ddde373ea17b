"""Python's share of a load, and the benchmark that needs sources which are not ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import many, nxdi, nxdi_experts, share, threads
from benchmarks.contenders import OURS, REFERENCE
from benchmarks.made import make
from neuron_fp8_loader import plan_checkpoint
from neuron_fp8_loader.checkpoint import open_checkpoint, runs
from neuron_fp8_loader.codes import kernel
from neuron_fp8_loader.host.parallel import PIECE


@pytest.mark.skipif(not kernel.reads_natively(), reason="no native reader")
def test_a_long_run_is_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python does grows with the runs: sixteen pieces each, once there are enough of them."""
    calls: list[int] = []

    def counted(*arguments: object) -> tuple[int, int]:
        calls.append(1)
        return share.free_read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(runs, "read_segments", counted)
    checkpoint = open_checkpoint(make(tmp_path / "c", 64 * PIECE).directory)
    assert share.share(checkpoint, 1, 1) > 0
    assert len(calls) <= 64 // 16 + 1
    assert [runs.run_length(n * PIECE, 4, PIECE) // PIECE for n in (1, 16, 64, 1 << 20)] == [1, 1, 4, 16]


def test_many_tensors_beside_safetensors(tmp_path: Path) -> None:
    done = CliRunner().invoke(many.main, ["--tensors=9", "--shards=2", "--repeats=1", f"--out={tmp_path}"])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "many.json").read_text())
    assert set(found["results"]) == {REFERENCE, OURS}


def test_threads_and_the_projection(tmp_path: Path) -> None:
    """Two threads and a tiny checkpoint: the figures mean nothing, the arithmetic does."""
    done = CliRunner().invoke(threads.main, ["--size=64KiB", "--repeats=1", "--thread-counts=2", f"--out={tmp_path}"])
    assert done.exit_code == 0, f"{done.output}\n{done.exception}"
    found = json.loads((tmp_path / "threads.json").read_text())["results"]
    assert set(found["threads"]) == set(found["share"]) == {"2"}
    assert found["projection"]["cap"] == pytest.approx(2**20 / found["share"]["2"] / 1e3)
    assert threads.projection(0.5, 10**9, 2.0) == {"one": 2.0, "asked": 64.0, "cap": 2**20 / 2e3}


@pytest.mark.parametrize("options", [[], ["--model", "qwen3_moe"]])
def test_without_the_sources_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    for name in nxdi.NEEDED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nxdi, "experts", pytest.fail)
    done = CliRunner().invoke(nxdi.main, options)
    assert done.exit_code == 0
    assert "NXD_SRC" in nxdi.missing()
    assert "NXDI_SRC" in nxdi.missing()


def test_experts_beside_a_plain_load(tmp_path: Path) -> None:
    """What needs no sources: a whole model, whose experts come out as the checkpoint has them."""
    made = nxdi_experts.make_model(tmp_path / "c", layers=2, experts=3, inner=128, hidden=256)
    assert {pair.granularity.kind for pair in plan_checkpoint(made.directory).pairs} == {"row"}
    found = nxdi_experts.compare(made, "", 1, (nxdi_experts.PLAIN, nxdi_experts.FUSED))
    assert all(len(r["cpu_s"]) == len(r["peak_over_size"]) == 1 for r in found.values())
    assert (nxdi_experts.span([2.0, 1.25], 1), nxdi_experts.span([0.5], 2)) == ("1.2-2.0", "0.50")


def test_the_line_for_the_readme() -> None:
    entry = {"median_s": 1.5, "cpu_s": 0.75}
    results = {"shard_checkpoint": {nxdi.ON: entry, nxdi.OFF: entry | {"cpu_s": 0.5}}}
    text = nxdi.line(results, 2**30)
    assert "1.0 GiB" in text
    assert "1.50 s against 1.50 s" in text
    assert "CPU 1.50 x" in text
