"""Broken input of every kind: exit 2 and one clear line. And the installed entry point."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from neuron_fp8_loader import __version__, kernel
from neuron_fp8_loader.cli.console import one_line as to_one_line
from tests.cli.helpers import codes, layer, one_line, run, sharded, single, steady
from tests.support import ROOT, TINY

KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {}


def kind(said: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def register(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        KINDS[make.__name__] = (make, said)
        return make

    return register


@kind("no such file")
def missing(tmp: Path) -> Path:
    return tmp / "nothing"


@kind("no checkpoint here")
def empty_directory(tmp: Path) -> Path:
    return tmp


@kind("expected a directory")
def text_file(tmp: Path) -> Path:
    (tmp / "x.txt").write_text("hello")
    return tmp / "x.txt"


@kind("not a complete safetensors file")
def truncated(tmp: Path) -> Path:
    path = single(tmp / "c", layer(0)) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    return path


@kind("not a complete safetensors file")
def garbage(tmp: Path) -> Path:
    (tmp / "model.safetensors").write_bytes(b"\xff" * 100)
    return tmp


@kind("not a complete safetensors file")
def empty_file(tmp: Path) -> Path:
    (tmp / "model.safetensors").write_bytes(b"")
    return tmp


@kind("missing shard")
def lost_shard(tmp: Path) -> Path:
    path = sharded(tmp / "c", layer(0), layer(1))
    (path / "model-00002-of-00002.safetensors").unlink()
    return path


@kind("not a checkpoint index")
def broken_index(tmp: Path) -> Path:
    path = sharded(tmp / "c", layer(0), layer(1))
    (path / "model.safetensors.index.json").write_text("{")
    return path


@kind("but not in the index")
def contradictory_index(tmp: Path) -> Path:
    path = sharded(tmp / "c", layer(0), layer(1))
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].popitem()
    index.write_text(json.dumps(content))
    return path


@kind("candidates for its scale")
def ambiguous_pair(tmp: Path) -> Path:
    name = "m.weight"
    tensors = {name: codes(0x7E, shape=(2, 2)), f"{name}_scale": torch.ones(1), f"{name}_scale_inv": torch.ones(1)}
    return single(tmp / "c", tensors)


@kind("torch.load(weights_only=True)")
def evil_bin(tmp: Path) -> Path:
    torch.save({"m.weight": Path("x")}, tmp / "pytorch_model.bin")
    return tmp


@kind(".safetensors files and no index")
def two_models(tmp: Path) -> Path:
    for name in ("a", "b"):
        save_file(layer(0), tmp / f"{name}.safetensors")
    return tmp


@pytest.mark.parametrize("command", ["inspect", "config", "verify", "export"])
@pytest.mark.parametrize("name", list(KINDS))
def test_broken_input(tmp_path: Path, command: str, name: str) -> None:
    make, said = KINDS[name]
    place = tmp_path / "in"
    place.mkdir()
    args = [command, make(place), *([tmp_path / "out"] if command == "export" else [])]
    assert said in one_line(run(*args))
    assert not (tmp_path / "out").exists()
    with_json = run(*args, "--json")
    one_line(with_json)
    assert said in json.loads(with_json.stdout)["error"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable(tmp_path: Path) -> None:
    path = single(tmp_path / "c", layer(0)) / "model.safetensors"
    path.chmod(0)
    assert "model.safetensors" in one_line(run("inspect", path))


@pytest.mark.parametrize("args", [("inspect",), ("fix", "x"), ("inspect", "x", "--method", "quarter")])
def test_wrong_use(args: tuple[str, ...]) -> None:
    assert run(*args).exit_code == 2


def test_no_command_shows_what_there_is() -> None:
    result = run()
    assert result.exit_code in (0, 2)  # click 8.1 calls it help, 8.2 wrong use
    assert "doctor" in result.output


def test_plot_of_headers_is_wrong_use(tmp_path: Path) -> None:
    result = run("inspect", TINY, "--headers-only", "--plot", tmp_path / "x.png")
    assert result.exit_code == 2


def test_a_wrong_kernel_or_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_FP8_LOADER_THREADS", "lots")
    assert "expected a whole number" in one_line(run("inspect", TINY))
    monkeypatch.delenv("NEURON_FP8_LOADER_THREADS")
    monkeypatch.setattr(kernel, "active", "sse9")
    assert "no such path here" in one_line(run("verify", TINY))


@pytest.mark.parametrize("module", ["numpy", "ml_dtypes"])
def test_verify_without_its_extra(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    for name in ("arithmetic", "compare", "verify"):
        monkeypatch.delitem(sys.modules, f"neuron_fp8_loader.tools.{name}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    assert f"verify needs {module}: pip install 'neuron-fp8-loader[verify]'" in one_line(run("verify", TINY))


def test_many_problems_on_one_line() -> None:
    items = "".join(f"\n  - problem {n}" for n in range(20))
    text = to_one_line(f"x: 25 problems:{items}\n  ... and 5 more\nDo this.")
    assert text == "x: 25 problems: problem 0; problem 1; problem 2 (and 22 more). Do this."
    assert to_one_line("plain") == "plain"


@pytest.mark.parametrize("command", ["inspect", "config", "verify", "export", "doctor"])
def test_help_has_an_example(command: str) -> None:
    text = run(command, "--help").stdout
    assert re.search(rf"Examples?:\n +neuron-fp8 {command}", text)


# -- the entry point, as installed -------------------------------------------------------------------------------


# processes are slow to start, and what they show does not depend on the kernel's path
once = pytest.mark.skipif(kernel.active != kernel.paths()[0], reason="tested with the fastest kernel path")


def entry_point(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "neuron-fp8"
    if not program.is_file():
        pytest.skip("neuron-fp8 is not installed beside this Python")
    return subprocess.run(
        [program, *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


COMMANDS: list[tuple[tuple[object, ...], int]] = [
    (("inspect", TINY), 0),
    (("config", TINY, "--tp", "2"), 0),
    (("verify", TINY), 0),
    (("export", TINY, "OUT"), 0),
    (("inspect", "nothing-there"), 2),
]


@once
def test_installed_entry_point(tmp_path: Path) -> None:
    first, second = (
        [[tmp_path / n if a == "OUT" else a for a in args] for args, _ in COMMANDS] for n in ("one", "two")
    )
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # mostly they import
        installed = list(threads.map(lambda args: entry_point(*args), first))
    for (_, code), done, args in zip(COMMANDS, installed, second, strict=True):
        here = run(*args)
        assert done.returncode == here.exit_code == code, done.stderr
        assert steady(done.stdout).replace("/one", "/two") == steady(here.stdout)  # plain text: stdout is a pipe
        assert "\x1b" not in done.stdout + done.stderr
        assert done.stderr == here.stderr


@once
def test_installed_doctor_with_a_wrong_kernel() -> None:
    """The import must survive what the doctor is to tell of."""
    done = entry_point("doctor", NEURON_FP8_LOADER_KERNEL="sse9")
    assert done.returncode == 1
    assert "NEURON_FP8_LOADER_KERNEL=sse9: no such path here" in done.stdout


def test_version() -> None:
    assert __version__ in run("--version").stdout


@once
def test_a_reader_that_leaves_is_no_error() -> None:
    program = Path(sys.executable).parent / "neuron-fp8"
    if not program.is_file():
        pytest.skip("neuron-fp8 is not installed beside this Python")
    command = f"'{program}' inspect '{TINY}' --json | head -c 10"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
