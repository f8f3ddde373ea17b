"""The JSON of the commands, and the output that the documentation shows, as they were when last looked at.

To write them anew after a change that is meant, and then look at the difference:

    NEURON_FP8_UPDATE_GOLDEN=1 python -m pytest tests/cli/test_cli_golden.py
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import UPDATE, run, run_json, steady
from tests.support import ROOT, SHARED, TINY

GOLDEN = Path(__file__).parent / "golden"
DOCS = (ROOT / "docs" / "cli.md", ROOT / "README.md")
REAL = sorted(file.stem.removeprefix("inspect-") for file in GOLDEN.glob("inspect-*.json"))
COMMANDS = {
    "inspect": ("inspect", "CKPT"),
    "inspect-headers": ("inspect", "CKPT", "--headers-only"),
    "config": ("config", "CKPT", "--tp", "8"),
    "verify": ("verify", "CKPT"),
    "export": ("export", "CKPT", "OUT"),
}


def rounded(value: Any) -> Any:
    """Sums of floats differ in their last digits with the order of the threads."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def check(name: str, data: dict[str, Any], parent: Path) -> None:
    """Compare with the golden file, the checkpoint's directory written as /models."""
    text = json.dumps(rounded(data), indent=1).replace(str(parent.resolve()), "/models") + "\n"
    file = GOLDEN / f"{name}.json"
    if UPDATE:
        file.write_text(text)
    assert json.loads(text) == json.loads(file.read_text()), f"{file} (see the head of this test file)"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_golden(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TINY.parent)
    args = [{"CKPT": TINY.name, "OUT": tmp_path / "out"}.get(arg, arg) for arg in COMMANDS[name]]
    data = run_json(*args)
    if "out" in data:
        data["out"] = "out"
    check(name, data, TINY.parent)


@pytest.mark.parametrize(
    "name", REAL if not UPDATE else sorted(p.name for p in SHARED.glob("*") if p.is_dir() and p.name != "_base")
)
def test_golden_of_real_checkpoints(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no shared checkpoint {name}")
    monkeypatch.chdir(SHARED)
    data = run_json("inspect", name)
    data["config"] = run_json("config", name)["neuron_config"]
    check(f"inspect-{name}", data, SHARED)


# -- documentation -------------------------------------------------------------------------------------------------

_BLOCK = re.compile(r"```console\n\$ (neuron-fp8 [^\n]+)\n(.*?)```", re.S)
_OF_ONE_MACHINE = ("neuron-fp8 doctor",)  # shown as it once was


@pytest.mark.parametrize("doc", [doc for doc in DOCS if doc.is_file()], ids=lambda doc: doc.name)
def test_the_output_shown_in_the_documentation(doc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command of the page in its order, in a directory that holds the example."""
    text = doc.read_text()
    (tmp_path / "tiny-llama-fp8").symlink_to(TINY)
    monkeypatch.chdir(tmp_path)
    shown = _BLOCK.findall(text)
    if doc.name == "cli.md":
        assert {command.split()[1] for command, _ in shown} == {"inspect", "config", "verify", "export", "doctor"}
    for command, output in shown:
        if command in _OF_ONE_MACHINE or "tiny-llama-fp8" not in command:
            continue
        real = run(*shlex.split(command)[1:]).output
        # the page shows the example at the place where it would be
        real = real.replace(str(TINY.resolve()), "/models/tiny-llama-fp8").replace(str(tmp_path), "/models")
        if UPDATE:
            text = text.replace(f"$ {command}\n{output}```", f"$ {command}\n{real}```")
        else:
            assert steady(real) == steady(output), command
    if UPDATE:
        doc.write_text(text)
