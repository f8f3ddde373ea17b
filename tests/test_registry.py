"""The registry of conventions: one's own rules, rules that beat others, and the registry in print."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from convention_rows import made
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_bytes_kept, assert_pair_kept, bf16_bits, to_bf16
from safetensors.torch import save_file
from support import ROOT, TINY

from neuron_fp8_loader import OptionError, Plan, PlanError, conventions, load_checkpoint, plan_checkpoint
from neuron_fp8_loader.integrations.keys import nxd_names

MINE = conventions.Convention("mine", "{}.w_fp8", "{}.w_mult", "our trainer")


@pytest.fixture
def mine() -> Iterator[None]:
    conventions.register(MINE)
    yield
    conventions.unregister("mine")


def some(**shapes: str) -> dict[str, torch.Tensor]:
    return made({name.replace("__", "."): text for name, text in shapes.items()})


def plan_of(tensors: dict[str, torch.Tensor], directory: Path) -> Plan:
    save_file(tensors, directory / "model.safetensors")
    return plan_checkpoint(directory)


def test_a_convention_of_ones_own(tmp_path: Path, mine: None) -> None:
    before = some(a__w_fp8="fp8 8 8", a__w_mult="f32 8 1")
    (pair,) = plan_of(before, tmp_path).pairs
    assert (pair.weight, pair.scale, pair.convention, str(pair.granularity)) == ("a.w_fp8", "a.w_mult", "mine", "row")
    assert_pair_kept(before, load_checkpoint(tmp_path).state_dict, "a.w_fp8", "a.w_mult", "row")
    assert conventions.conventions()[0] == MINE
    assert "our trainer" in conventions.table()
    conventions.register(MINE)  # again: nothing happens
    assert conventions.conventions().count(MINE) == 1


def test_a_convention_of_ones_own_holds_for_packed_weights_too(tmp_path: Path, mine: None) -> None:
    """NVFP4 under one's own names: its e4m3fn scale is no weight."""
    before = some(a__w_fp8="u8 16 32", a__w_mult="fp8 16 4", b__w_fp8="fp8 8 8", b__w_mult="f32")
    plan = plan_of(before, tmp_path)
    assert [p.weight for p in plan.pairs] == ["b.w_fp8"]
    assert plan.untouched_fp8 == ("a.w_mult",)
    assert_bytes_kept(before, load_checkpoint(tmp_path).state_dict, {"a.w_fp8", "a.w_mult"})


def test_unregistered_again(tmp_path: Path) -> None:
    conventions.register(MINE)
    conventions.unregister("mine")
    assert plan_of(some(a__w_fp8="fp8 8 8", a__w_mult="f32 8 1"), tmp_path).unscaled == ("a.w_fp8",)


def test_two_candidates_are_an_error_that_names_both(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(some(a__weight="fp8 8 8", a__weight_scale="f32", a__scale="f32 8"), tmp_path)
    for word in ("a.weight: ", "a.weight_scale (weight_scale)", "a.scale (scale)", "beats"):
        assert word in str(caught.value)


def test_a_rule_says_which_of_two_counts(tmp_path: Path) -> None:
    conventions.register(conventions.Convention("ours", "{}.weight", "{}.mult", "our trainer", beats=("scale",)))
    try:
        before = some(a__weight="fp8 8 8", a__mult="f32", a__scale="f32 8")
        assert [p.scale for p in plan_of(before, tmp_path).pairs] == ["a.mult"]
        assert_bytes_kept(before, load_checkpoint(tmp_path).state_dict, {"a.scale"})
    finally:
        conventions.unregister("ours")


def test_a_rule_of_ones_own_is_named_where_a_published_one_fits_too(tmp_path: Path) -> None:
    conventions.register(conventions.Convention("ours", "{}.weight", "{}.weight_scale"))
    try:
        (pair,) = plan_of(some(a__weight="fp8 8 8", a__weight_scale="f32"), tmp_path).pairs
        assert pair.convention == "ours"
    finally:
        conventions.unregister("ours")


@pytest.mark.parametrize(
    ("convention", "message"),
    [
        (("scale", "{}.w", "{}.s"), "'scale' is registered already"),
        (
            ("x", "{}.w", "{}.s", "", ("scales", "scale")),
            "beats 'scales', which is not known; there are weight_scale,",
        ),
        (("x", "w", "{}.s"), "'w' must hold exactly one {}"),
        (("x", "{}.w", "{}.{}.s"), "must hold exactly one {}"),
        (("x", "{}.w", "{}.w"), "weight and scale are both"),
    ],
)
def test_a_convention_that_cannot_be(convention: tuple[str, ...], message: str) -> None:
    known = conventions.conventions()
    with pytest.raises(OptionError) as caught:
        conventions.register(conventions.Convention(*convention))  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert conventions.conventions() == known


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(OptionError, match=r"no convention 'wight_scale'; there are weight_scale, weight_scale_inv, "):
        conventions.unregister("wight_scale")


@pytest.mark.parametrize(
    ("weight", "scale", "rule"),
    [
        ("a.weight", "a.weight._scale", "quanto_weight"),
        ("a.up_proj", "a.up_proj_scales", "fused_scales"),
        ("a.up_proj", "a.up_proj.weight_scale", "fused_dot_weight_scale"),
    ],
)
def test_rules_that_no_row_needs(weight: str, scale: str, rule: str, tmp_path: Path) -> None:
    before = made({weight: "fp8 8 8", scale: "f32 8 1"})
    (pair,) = plan_of(before, tmp_path).pairs
    assert (pair.weight, pair.scale, pair.convention) == (weight, scale, rule)


@pytest.mark.parametrize("rule", conventions.conventions(), ids=lambda rule: rule.name)
def test_rules_go_both_ways(rule: conventions.Convention) -> None:
    weight = rule.weight.format("model.layers.0.q_proj")
    scale = rule.scale.format("model.layers.0.q_proj")
    assert rule.scale_of(weight) == scale
    assert rule.weight_of(scale) == weight
    assert rule.scale_of(rule.weight.format("")) is None  # a module must have a name
    assert conventions.Candidates({scale}).of(weight)[0][1] == scale


ODD = (
    conventions.Convention("front", "w.{}", "s.{}"),
    conventions.Convention("middle", "w_{}.q", "{}.of.w", beats=("front",)),
)
PIECES = ["a", "w", "s", ".", "_", "weight", "scale", "_inv", "s.", "w.", ".of.w", "_data", ".weight", "weight_scale"]


@given(names=st.lists(st.lists(st.sampled_from(PIECES), max_size=5).map("".join), max_size=25))
def test_the_rules_one_by_one_find_the_same(names: list[str]) -> None:
    """What names end in only rules out; each rule's own word, in order, is the oracle."""
    for rule in ODD:
        conventions.register(rule)
    try:
        there = dict.fromkeys(names)
        candidates = conventions.Candidates(there.keys())
        for name in names:
            found: dict[str, conventions.Convention] = {}
            for rule in conventions.conventions():
                if rule.scale_of(name) in there:
                    found.setdefault(str(rule.scale_of(name)), rule)
            beaten = {other for rule in found.values() for other in rule.beats}
            assert candidates.of(name) == [(r, s) for s, r in found.items() if r.name not in beaten]
    finally:
        for rule in ODD:
            conventions.unregister(rule.name)


def test_the_registry_prints() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "neuron_fp8_loader.conventions"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.rstrip("\n") == conventions.table()
    assert run.stderr == ""
    for rule in conventions.conventions():
        assert rule.name in run.stdout
        assert rule.producers in run.stdout


CLI = "from neuron_fp8_loader.cli import main; main({})"


def test_a_reader_that_has_gone_is_no_error() -> None:
    """As ``| head -1``: what is not read is not missed, now or when the process ends."""
    programs = ("-m", "neuron_fp8_loader.conventions"), ("-c", CLI.format(["inspect", str(TINY)]))
    started = []
    for program, unbuffered in itertools.product(programs, ("", "1")):  # side by side: mostly they import
        reading, writing = os.pipe()
        os.close(reading)
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        with os.fdopen(writing, "wb") as gone:
            started.append(
                subprocess.Popen(
                    [sys.executable, *program],
                    stdout=gone,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                    env=environment,
                )
            )
    assert [process.communicate()[1] for process in started] == [""] * 4


def test_the_documentation_is_in_step() -> None:
    page = (ROOT / "docs" / "conventions.md").read_text(encoding="utf-8")
    assert conventions.table() in page, "paste the output of `python -m neuron_fp8_loader.conventions` into the page"


def test_a_convention_of_ones_own_is_laid_out_dequantized_and_named(tmp_path: Path, mine: None) -> None:
    """Options and names go by the module that the rule tells, whatever the ending of the weight's name."""
    before = some(m__0__w_fp8="fp8 8 8", m__0__w_mult="f32 8", m__1__w_fp8="fp8 8 8", m__1__w_mult="f32 8")
    save_file(before, tmp_path / "model.safetensors")
    after = load_checkpoint(tmp_path, layout="per_channel", dequantize=["m.1"]).state_dict
    assert after["m.0.w_fp8"].dtype == torch.float8_e4m3fn
    assert after["m.0.w_mult"].shape == (8, 1)
    assert "m.1.w_mult" not in after
    exact = before["m.1.w_fp8"].double() * before["m.1.w_mult"].double()[:, None]
    assert np.array_equal(bf16_bits(after["m.1.w_fp8"]), to_bf16(exact.numpy()))
    names = {
        "m.0.w_fp8": "m.0.weight",
        "m.0.w_mult": "m.0.scale",
        "m.1.w_fp8": "m.1.weight",
        "m.1.w_mult": "m.1.scale",
    }
    assert nxd_names(plan_checkpoint(tmp_path)) == names
