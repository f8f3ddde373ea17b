"""Directories and files whose names act on a terminal: escaped in every error and log, exact where programs read."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import codes, save, save_shards

from neuron_fp8_loader import (
    load_checkpoint,
    load_file,
    load_state_dict,
    plan_checkpoint,
    rescale_state_dict,
    safe_open,
)
from neuron_fp8_loader.cli import main
from neuron_fp8_loader.cli.console import shell
from neuron_fp8_loader.errors import Fp8LoaderError, ShownPath, printable
from neuron_fp8_loader.tools.export import prepare_export
from neuron_fp8_loader.tools.scan import scan_checkpoint
from neuron_fp8_loader.tools.verify import verify_checkpoint
from tests.cli.helpers import runner

NAMES = {
    "newline": "a\nneuron-fp8: all is well\n  - fine",
    "escape": "a\x1b[31mb\x07",
    "bidi": "a\u202egpj.b",
    "separator": "a\u2028b\x9b31m",
}
PAIR = {"m.weight": codes([[0x7E, 0x10]]), "m.weight_scale": torch.ones(1)}
NAN = {"m.weight": codes([[0x7F, 0x10]]), "m.weight_scale": torch.ones(1)}


@pytest.fixture(params=list(NAMES))
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made: Path = tmp_path / NAMES[request.param]
    made.mkdir()
    return made


def harmless(text: str, directory: Path) -> None:
    assert not any(c != "\n" and not c.isprintable() for c in text), ascii(text)
    assert "\nneuron-fp8: all is well" not in text
    assert printable(directory.name) in text


def empty(directory: Path) -> Path:
    return directory


def gone(directory: Path) -> Path:
    return directory / "model.safetensors"


def cut(directory: Path) -> Path:
    file = save(directory / "model.safetensors", PAIR)
    file.write_bytes(file.read_bytes()[:-3])
    return directory


def nan(directory: Path) -> Path:
    save(directory / "model.safetensors", NAN)
    return directory


def ambiguous(directory: Path) -> Path:
    save(directory / "model.safetensors", {**PAIR, "m.weight_scale_inv": torch.ones(1)})
    return directory


def shard_gone(directory: Path) -> Path:
    save_shards(directory, PAIR, {"x": torch.ones(1)})[1].unlink()
    return directory


def no_index(directory: Path) -> Path:
    save(directory / f"{directory.name}.safetensors", PAIR)
    save(directory / "b.safetensors", PAIR)
    return directory


def a_directory(directory: Path) -> Path:
    (directory / "model.safetensors").mkdir()
    return directory


def no_format(directory: Path) -> Path:
    (directory / f"{directory.name}.gguf").write_bytes(b"GGUF")
    return directory


def bad_index(directory: Path) -> Path:
    save(directory / "model.safetensors", PAIR)
    (directory / "model.safetensors.index.json").write_text("[")
    return directory


def bad_bin(directory: Path) -> Path:
    (directory / "pytorch_model.bin").write_bytes(b"x")
    return directory


BROKEN = [
    empty, gone, cut, nan, ambiguous, shard_gone, no_index, a_directory, no_format, bad_index, bad_bin
]  # fmt: skip


@pytest.mark.parametrize("make", BROKEN)
def test_errors(directory: Path, make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(directory)
    one = path / "model.safetensors" if path.is_dir() else path
    seen = 0
    for call in (
        lambda: load_state_dict(path),
        lambda: load_state_dict(path, slices={"m.weight": (0, 0, 1)}),
        lambda: load_file(one),
        lambda: load_file(path),
        lambda: safe_open(one).get_tensor("m.weight"),
        lambda: safe_open(path),
        lambda: plan_checkpoint(path),
        lambda: scan_checkpoint(path),
        lambda: verify_checkpoint(path),
        lambda: prepare_export(path, tmp_path / "out").run(),
    ):
        try:
            call()  # type: ignore[no-untyped-call]
        except Fp8LoaderError as error:
            harmless(str(error), directory)
            harmless(str(pickle.loads(pickle.dumps(error))), directory)
            seen += 1
    assert seen >= 3


def test_logs(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "neuron_fp8_loader")
    save(directory / "model.safetensors", PAIR)
    (directory / "config.json").write_text("{")
    load_state_dict(directory)
    assert len(caplog.records) >= 2
    for record in caplog.records:
        harmless(record.getMessage(), directory)


@pytest.mark.parametrize("command", ["inspect", "verify", "config", "export"])
@pytest.mark.parametrize("make", [empty, nan, cut])
def test_terminal(directory: Path, tmp_path: Path, command: str, make: Callable[[Path], Path]) -> None:
    path = make(directory)
    extra = [str(directory / "out")] if command == "export" else []
    result = runner().invoke(main, [command, str(path), *extra])
    shown = result.stdout + result.stderr
    assert not any(c != "\n" and not c.isprintable() for c in shown), ascii(shown)
    assert "\nneuron-fp8: all is well" not in shown
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)


def test_programs_get_it_as_it_is(directory: Path) -> None:
    save(directory / "model.safetensors", PAIR)
    result = runner().invoke(main, ["inspect", str(directory), "--json"])
    assert json.loads(result.stdout)["checkpoint"] == str(directory)
    assert plan_checkpoint(directory).to_dict()["source"] == str(directory)
    assert plan_checkpoint(directory).source == str(directory)
    loaded = load_checkpoint(directory)
    assert json.loads(json.dumps(loaded.report.to_dict()))["source"] == str(directory)
    assert all(str(info.file) == str(directory / "model.safetensors") for info in loaded.plan.tensors.values())
    assert set(rescale_state_dict(PAIR)) == set(loaded.state_dict)


def test_a_path_that_is_shown_is_a_path_like_any_other() -> None:
    path = Path("/x/a\nb")
    shown = ShownPath(path)
    assert f"{shown}" == f"{shown / 'c'}"[:-2] == "/x/a\\nb"
    assert f"{shown.parent / 'a'!s}" == "/x/a"
    assert (str(shown), shown, hash(shown)) == (str(path), path, hash(path))
    assert f"{pickle.loads(pickle.dumps(shown))}" == "/x/a\\nb"


@pytest.mark.parametrize("text", [*NAMES.values(), "plain", "a b'c\\n", "\t'\\\n$(x)`y`", "é\u202e"])
def test_words_of_a_shell(text: str) -> None:
    word = shell(text)
    assert word.isprintable()
    said = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True, text=True).stdout
    assert said == text
