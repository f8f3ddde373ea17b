"""The contenders of the load benchmark, and that a wrong answer is found out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import neuron_fp8_loader
from benchmarks import pagecache
from benchmarks.apart import run_apart
from benchmarks.common import WrongAnswer
from benchmarks.contenders import CONTENDERS, LAYOUT, OURS, REFERENCE, ROWS, SCRIPT, Job, wrong
from benchmarks.made import Made, convention_names, expected_tables, make

SIZE = 1 << 16


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path / "checkpoint", SIZE, shards=2)


def test_expected_tables_are_the_formats() -> None:
    tables = expected_tables()
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    good = ~np.isnan(values)
    for name, factor, largest in (("half", 2.0, 224.0), ("ratio", 448 / 240, 240.0)):
        after = tables[name].view(ml_dtypes.float8_e4m3).astype(np.float64)  # as the device reads it
        assert np.isfinite(after[good]).all()
        assert np.abs(after[good]).max() == largest
        assert np.abs(after[good] * factor - values[good]).max() <= 16  # half a step at 448


@pytest.mark.parametrize("scale", ["row", "tensor", "block"])
def test_a_made_checkpoint_holds_what_does_not_fit(tmp_path: Path, scale: str) -> None:
    made = make(tmp_path / "c", 1 << 18, shards=3, scale=scale)
    assert len(made.files) == 3
    plan = neuron_fp8_loader.plan_checkpoint(made.directory)
    assert {(p.weight, p.scale) for p in plan.pairs} == set(made.pairs)
    assert {p.granularity.kind for p in plan.pairs} == {scale}
    for file in made.files:
        for name, tensor in load_file(file).items():
            if tensor.dtype == torch.float8_e4m3fn:
                assert tensor.float().abs().max() == 448, name
    assert made.nbytes == sum(info.nbytes for info in plan.tensors.values())


@pytest.mark.parametrize("convention", convention_names())
def test_every_convention(tmp_path: Path, convention: str) -> None:
    made = make(tmp_path / "c", SIZE, convention=convention)
    for method in ("half", "ratio"):
        assert wrong(made, method, neuron_fp8_loader.load_state_dict(made.directory, method=method)) == []


@pytest.mark.parametrize("name", list(CONTENDERS))
def test_every_contender_gives_what_it_says(made: Made, name: str) -> None:
    contender = CONTENDERS[name]
    if contender.missing:
        pytest.skip(contender.missing)
    if name == LAYOUT:
        made = make(made.directory.parent / "blocks", 1 << 18, scale="block")
    result = contender.run(Job(made, 2, made.directory.parent / "written"))
    assert wrong(made, contender.gives, result) == []
    assert isinstance(result, Path) == (name == SCRIPT)


def test_wrong_answers_are_found_out(made: Made) -> None:
    good = neuron_fp8_loader.load_state_dict(made.directory)
    weight, scale = made.pairs[0]
    assert wrong(made, "half", good) == []
    assert wrong(made, "raw", good)[:2] == [weight, scale]
    flipped = good[weight].clone()
    flipped.view(torch.uint8)[3, 5] ^= 0x80
    assert wrong(made, "half", good | {weight: flipped}) == [weight]
    assert wrong(made, "half", {n: t for n, t in good.items() if n != scale}) == [scale]
    assert wrong(made, "half", good | {"more": flipped}) == ["more"]


def test_wrong_rows_are_found_out(tmp_path: Path) -> None:
    made = make(tmp_path / "c", 1 << 18, scale="block")
    good = neuron_fp8_loader.load_state_dict(made.directory, layout="per_channel")
    weight, scale = made.pairs[0]
    assert wrong(made, ROWS, good) == []
    assert wrong(made, ROWS, neuron_fp8_loader.load_state_dict(made.directory)) == [w for w, _ in made.pairs]
    assert wrong(made, ROWS, good | {scale: good[scale] * 1.1}) == [weight]
    large = good[made.pairs[1][0]].clone()
    large.view(torch.uint8)[3, 5] = 0x78
    assert wrong(made, ROWS, good | {made.pairs[1][0]: large}) == [made.pairs[1][0]]


def test_apart_gives_time_and_memory(made: Made) -> None:
    run = run_apart(OURS, Job(made, 1))
    assert run.seconds > 0
    assert run.peak >= 0
    assert run.written == 0


def test_apart_counts_what_is_written_and_removes_it(made: Made) -> None:
    output = made.directory.parent / "written"
    run = run_apart(SCRIPT, Job(made, None, output))
    assert run.written > made.nbytes
    assert not output.exists()


def test_apart_refuses_a_wrong_answer(made: Made) -> None:
    crc = {variant: dict.fromkeys(sums, 0) for variant, sums in made.crc.items()}
    with pytest.raises(WrongAnswer, match="not what they should be"):
        run_apart(REFERENCE, Job(replace(made, crc=crc)))


def test_apart_reports_a_failure(made: Made) -> None:
    with pytest.raises(WrongAnswer, match="failed"):
        run_apart(REFERENCE, Job(replace(made, files=(made.directory / "absent.safetensors",))))


def test_page_cache(made: Made) -> None:
    before = [file.read_bytes() for file in made.files]
    pagecache.warm(made.files)
    assert pagecache.cached(made.files) in (1.0, None)
    if pagecache.can_drop():
        pagecache.drop(made.files)  # on tmpfs nothing can be dropped, so how much is left is not asserted
        left = pagecache.cached(made.files)
        assert left is None or 0 <= left <= 1
    assert [file.read_bytes() for file in made.files] == before
