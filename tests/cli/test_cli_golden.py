"""The JSON of the commands, and the output that the documentation shows, as they were when last looked at.

The golden files hold each thing once: weights and scales of all layers and experts as one family, with their number.
What is left out (the numbers of each weight, histograms) is held here against numpy's own reading of the bytes.

To write them anew after a change that is meant, and then look at the difference:

    NEURON_FP8_UPDATE_GOLDEN=1 python -m pytest tests/cli/test_cli_golden.py
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.cli.helpers import KEEP, UPDATE, run, run_json, steady
from tests.support import REAL, ROOT, SHARED, TINY, raw, shared

GOLDEN = Path(__file__).parent / "golden"
DOCS = (ROOT / "docs" / "cli.md", ROOT / "README.md")
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


def families(values: list[Any]) -> list[Any]:
    """Entries that differ in the numbers of layers and experts alone, as one, with their number."""
    found = Counter(re.sub(r"\d+(?=\.)", "*", v if isinstance(v, str) else json.dumps(v)) for v in values)
    return [f"{number} x {text}" for text, number in found.items()]


COUNTED = ("codes", "as_inf", "as_nan", "nan", "rescaled")  # of each pair; test_numbers_of_each_weight has them
PREDICTED = ("predicted_sqnr_db", "least_sqnr_db")  # test_cli_stacks has them


def condensed(data: dict[str, Any]) -> dict[str, Any]:
    """What is stable and worth reading."""
    data = dict(data)
    for key in ("unscaled", "fnuz", "activation_scales", "untouched_fp8", "unquantized"):
        if key in data:
            data[key] = families(data[key])
    if "pairs" in data:
        data["pairs"] = families(
            [" ".join(str(v) for k, v in p.items() if k not in (*COUNTED, *PREDICTED)) for p in data["pairs"]]
        )
    if data.get("load"):
        data["load"] = {k: v if v is None or k not in PREDICTED else round(v) for k, v in data["load"].items()}
    if data.get("codes"):
        data["codes"] = {k: v for k, v in data["codes"].items() if not k.startswith("histogram")}
    if "weights" in data:
        data["weights"] = [data["weights"][0], f"and {len(data['weights']) - 1} more"]
    return data


def readable(data: dict[str, Any]) -> str:
    """JSON with a line for each key, and for each entry of a list."""

    def shown(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return json.dumps(value)
        return "[\n" + ",\n".join(f"  {json.dumps(v)}" for v in value) + "\n ]"

    return "{\n" + ",\n".join(f" {json.dumps(k)}: {shown(v)}" for k, v in data.items()) + "\n}\n"


def check(name: str, data: dict[str, Any], parent: Path) -> None:
    """Compare with the golden file, the checkpoint's directory written as /models."""
    text = readable(rounded(condensed(data))).replace(str(parent.resolve()), "/models")
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


@pytest.mark.parametrize("name", REAL)
def test_golden_of_real_checkpoints(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no shared checkpoint {name}; the cut ones have other numbers")
    monkeypatch.chdir(SHARED)
    data = run_json("inspect", name)
    data["config"] = run_json("config", name)["neuron_config"]
    check(f"inspect-{name}", data, SHARED)


@pytest.mark.parametrize("name", REAL)
def test_numbers_of_each_weight(name: str) -> None:
    data, found = run_json("inspect", shared(name), *KEEP), {}
    histogram = np.zeros(128, dtype=np.int64)
    for file in shared(name).glob("*.safetensors"):
        found |= load_file(file)
    for pair in data["pairs"]:
        weight, scale = found[pair["weight"]], found[pair["scale"]]
        assert (pair["shape"], pair["scale_shape"]) == (list(weight.shape), list(scale.shape))
        assert pair["scale_dtype"] == str(scale.dtype).removeprefix("torch.")
        counts = np.bincount(raw(weight).ravel() & 0x7F, minlength=128)
        histogram += counts
        above = counts[0x78:].sum()
        expected = (counts.sum(), counts[0x78], counts[0x79:0x7F].sum(), counts[0x7F], bool(above))
        assert tuple(pair[key] for key in COUNTED) == expected, pair["weight"]
    assert data["codes"]["histogram"] == histogram.tolist() or data["fnuz"] or data["unscaled"]


# -- documentation -------------------------------------------------------------------------------------------------

_BLOCK = re.compile(r"```console\n\$ (neuron-fp8 [^\n]+)\n(.*?)```", re.S)
_OF_ONE_MACHINE = ("neuron-fp8 doctor",)  # shown as it once was


@pytest.mark.parametrize("doc", [doc for doc in DOCS if doc.is_file()], ids=lambda doc: doc.name)
def test_the_output_shown_in_the_documentation(doc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every command of the page in its order: the README's in the root, the others' in examples."""
    text = doc.read_text()
    for place in (tmp_path, tmp_path / "examples"):
        place.mkdir(exist_ok=True)
        (place / "tiny-llama-fp8").symlink_to(TINY)
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
