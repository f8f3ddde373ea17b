"""Names come from strangers: nothing in them acts on a terminal, a log, a page or rich's markup."""

from __future__ import annotations

import json
import logging
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from neuron_fp8_loader import errors, load_state_dict, plan_checkpoint, rescale_state_dict
from neuron_fp8_loader.cli import console, main
from neuron_fp8_loader.errors import PlanError, printable
from tests.cli.helpers import codes, run, run_json

HOSTILE = {
    "escape": "\x1b]0;owned\x07\x1b[2Jm",
    "markup": "[/]m[link=http://x.test]y[/link][bold]",
    "closing": "m[/bold]\\[red]",
    "emoji": ":smile:m:bomb:",
    "newline": "m\n  - all is well\nneuron-fp8: fine",
    "carriage return": "m\rfine",
    "right to left": "m\u202egpj.exe",
    "eight-bit escape": "m\x9b31m",
    "line separator": "m\u2028x",
}
ACTING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]")
"""What must not come out; newlines are looked at apart."""


def checkpoint(tmp_path: Path, name: str, scale: bool = True) -> Path:
    path = tmp_path / "c" / "model.safetensors"
    path.parent.mkdir(exist_ok=True)
    tensors = {f"{name}.weight": codes(0x7E, 0x7F if not scale else 0x10, shape=(16, 16))}
    save_file({**tensors, **({f"{name}.weight_scale": torch.ones(1)} if scale else {})}, path)
    return path


@pytest.mark.parametrize("kind", list(HOSTILE))
@pytest.mark.parametrize("command", ["inspect", "verify", "config", "export"])
def test_nothing_acts_on_the_terminal(tmp_path: Path, kind: str, command: str) -> None:
    name = HOSTILE[kind]
    extra = [tmp_path / "out"] if command == "export" else []
    for scale in True, False:
        result = run(command, checkpoint(tmp_path, name, scale).parent, *extra)
        assert result.exit_code in (0, 1, 2)
        assert not ACTING.search(result.stdout + result.stderr)
        assert "\n  - all is well\nneuron-fp8: fine" not in result.stdout + result.stderr
        if command == "inspect":
            assert printable(name) in result.stdout


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_on_a_terminal_with_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from rich.console import Console

    made = Console(force_terminal=True, highlight=False, width=200, color_system="standard")
    monkeypatch.setattr(import_module("neuron_fp8_loader.cli.inspect"), "console", lambda: made)
    with made.capture() as captured:
        CliRunner().invoke(main, ["inspect", str(checkpoint(tmp_path, HOSTILE[kind]))], catch_exceptions=False)
    shown = re.sub(r"\x1b\[[\d;]*m", "", captured.get())  # rich's own colours
    assert printable(HOSTILE[kind]) in shown
    assert not ACTING.search(shown)


def test_json_has_the_names_themselves(tmp_path: Path) -> None:
    for name in HOSTILE.values():
        data = run_json("inspect", checkpoint(tmp_path, name))
        assert data["pairs"][0]["weight"] == f"{name}.weight"


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_errors_and_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    caplog.set_level(logging.INFO, "neuron_fp8_loader")
    name = HOSTILE[kind]
    path = checkpoint(tmp_path, name, scale=False)
    (path.parent / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": f"x{name}"}}))
    found = []
    for call in (
        lambda: load_state_dict(path),
        lambda: rescale_state_dict({f"{name}.weight": codes(0x7F, shape=(2, 2))}),
        lambda: load_state_dict(tmp_path / name.replace("\n", " ")),  # whose own path it is knows its lines
        lambda: load_state_dict(path, dequantize=[f"{name}*.q"]),
        lambda: load_state_dict(path, method=name),  # type: ignore[arg-type]
    ):
        with pytest.raises(errors.Fp8LoaderError) as caught:
            call()
        found.append(str(caught.value))
    load_state_dict(path, nan="keep", unscaled="keep")
    for text in [*found, *(record.getMessage() for record in caplog.records)]:
        assert not ACTING.search(text)
        assert "\n  - all is well\n" not in text
    assert printable(name) in found[0]


def test_problems_of_a_plan_are_printable_too(tmp_path: Path) -> None:
    name = HOSTILE["escape"]
    tensors = {f"{name}.weight": codes(0x7E, shape=(2, 2))}
    save_file(
        {**tensors, f"{name}.weight_scale": torch.ones(1), f"{name}.weight_scale_inv": torch.ones(1)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(PlanError) as caught:
        plan_checkpoint(tmp_path)
    assert not ACTING.search("".join(caught.value.problems))


def test_a_name_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    """File names are bytes; those that are not UTF-8 come as lone surrogates, which no stream takes. safetensors takes
    no such path, so neither do we, and the error can be printed."""
    path = tmp_path / "caf\udce9"
    checkpoint(tmp_path, "m").parent.rename(path)
    for command in ("inspect", "verify", "config"):
        result = run(command, path)
        assert result.exit_code == 2
        assert "caf\\udce9" in result.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0", "model.layers.0"),
        ("模型 é", "模型 é"),
        ("a\x1b[0m\tb", "a\\x1b[0m\\tb"),
        ("a\nb", "a\\nb"),
        ("\u202e\udcff\U000e0041", "\\u202e\\udcff\\U000e0041"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert shown.isprintable()
    assert printable("a\nb\x00", keep="\n") == "a\nb\\x00"


def test_a_plot_is_not_left_by_a_name(tmp_path: Path) -> None:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    name = "model.layers.0.</script><script>alert(1)</script><!--"
    page, plain = tmp_path / "x.html", tmp_path / "plain.html"
    run("inspect", checkpoint(tmp_path, name), "--plot", page)
    run("inspect", checkpoint(tmp_path, "model.layers.0.m"), "--plot", plain)
    text, without = page.read_text(), plain.read_text()
    assert "alert(1)" in text
    for tag in ("<script", "</script", "<!--"):
        assert text.lower().count(tag) == without.lower().count(tag)


# -- options as they were given ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ('nan="keep" lets them through', "--nan keep lets them through"),
        ("activation_scales='keep'", "--activation-scales keep"),
        ("dequantize='*.x y': matches", "--dequantize '*.x y': matches"),
        ('my.nan="keep" and xnan="keep"', 'my.nan="keep" and xnan="keep"'),
    ],
)
def test_as_given(text: str, given: str) -> None:
    assert console.as_given(text) == given


def test_the_command_line_names_its_own_options(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "m", scale=False)
    inspected, exported = run("inspect", path), run("export", path, tmp_path / "out")
    for text in (inspected.stdout, exported.stderr, run("inspect", path, "--json").stdout):
        assert "--nan keep" in text
        assert "--unscaled dequantize" in text
        assert 'nan="keep"' not in text.replace("\\", "")
    with pytest.raises(errors.WeightError, match='nan="keep"'):
        load_state_dict(path)
