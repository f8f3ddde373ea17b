"""The contenders of the experts benchmark, and that a wrong answer is found out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.experts import LOADER, OURS, PLAIN, SCRIPT, compare, contenders, make, worst

SIZE = 3 * 128 * 256 * 6


@pytest.mark.parametrize(("scale", "layout"), [("row", "per_channel"), ("block", "keep"), ("block", "per_channel")])
def test_every_contender_gives_the_same_model(tmp_path: Path, scale: str, layout: str) -> None:
    made = make(tmp_path / "c", SIZE, scale, experts=3, inner=128, hidden=256)
    assert (made.layers, made.experts) == (2, 3)
    for name, run in contenders(layout).items():
        result = run(made, tmp_path)
        if name not in (PLAIN, LOADER):
            exact = name != SCRIPT and (layout == "keep" or scale == "row")
            assert worst(made, result) > (100 if exact else 20), name
            assert len(result) == 8


def test_a_wrong_answer_is_found_out(tmp_path: Path) -> None:
    made = make(tmp_path / "c", SIZE, "row", experts=3, inner=128, hidden=256)
    right = contenders("per_channel")[OURS](made, tmp_path)
    for name, tensor in right.items():
        swapped = tensor.view(torch.uint8).flip(0).view(tensor.dtype)
        assert not worst(made, {**right, name: swapped}) > 20, name


def test_each_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    made = make(tmp_path / "c", SIZE, "block", experts=3, inner=128, hidden=256)
    found = compare(made, "per_channel", [PLAIN, OURS], 1)
    assert found[PLAIN]["times_plain"] == 1
    assert found[OURS]["median_s"] > 0
    assert found[OURS]["sqnr_db"] > 20
