"""What the benchmarks share: turns, medians, ratios, sizes, and JSON fit to be published."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import click
import pytest

from benchmarks import common


def test_every_contender_runs_once_a_round_and_none_is_always_first() -> None:
    order: list[str] = []
    contenders = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    results = common.interleaved(contenders, 3)
    rounds = [order[i : i + 3] for i in range(0, 9, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert [turn[0] for turn in rounds] == ["a", "b", "c"]
    assert results["a"] == [order.index("a") + 1, 3 + rounds[1].index("a") + 1, 6 + rounds[2].index("a") + 1]


def test_the_ratio_is_taken_round_by_round() -> None:
    # the machine was ten times slower in the second round; both contenders felt it
    found = common.summarize([1.0, 10.0, 1.0], 2_000_000_000, [2.0, 20.0, 2.0])
    assert found["median_s"] == 1.0
    assert (found["min_s"], found["max_s"]) == (1.0, 10.0)
    assert found["gb_per_s"] == 2.0
    assert found["speedup"] == 2.0


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1GiB", 2**30), ("0.5GiB", 2**29), ("256MiB", 2**28), ("64KiB", 65536), ("17", 17)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert common.size_option(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "1GB", "-1MiB", "0", "one"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match="expected a size like"):
        common.size_option(text)


def test_json_names_the_machine_but_not_the_host(tmp_path: Path) -> None:
    path = common.write(tmp_path, "thing", {"size": 1}, {"a": [1.0]})
    text = path.read_text()
    data = json.loads(text)
    assert data["benchmark"] == "thing"
    assert data["results"] == {"a": [1.0]}
    assert data["machine"]["cores"] >= 1
    assert data["machine"]["torch"] in common.machine_line(data["machine"])
    if len(platform.node()) > 3:
        assert platform.node() not in text
    assert str(Path.home()) not in text


def test_a_number_that_json_has_not_is_refused(tmp_path: Path) -> None:
    common.write(tmp_path, "thing", {}, {"a": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        common.write(tmp_path, "thing", {}, {"a": float("nan")})
    assert json.loads((tmp_path / "thing.json").read_text())["results"] == {"a": 1.0}


def test_finite() -> None:
    assert common.finite(1.5) == 1.5
    assert common.finite(float("inf")) is None
    assert common.finite(float("nan")) is None
