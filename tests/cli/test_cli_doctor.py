"""``neuron-fp8 doctor``: each finding under the conditions that bring it about."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from neuron_fp8_loader import kernel
from neuron_fp8_loader.tools import doctor
from neuron_fp8_loader.tools.doctor import NEURON_PACKAGES
from tests.cli.helpers import run, run_json


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "NEURON_PLATFORM_TARGET_OVERRIDE",
        "XLA_HANDLE_SPECIAL_SCALAR",
        "UNSAFE_FP8FNCAST",
        "VLLM_PLUGINS",
        "NEURON_FP8_LOADER_THREADS",
    ):
        monkeypatch.delenv(name, raising=False)


def distribution(path: Path, name: str, version: str, *files: str) -> None:
    """What pip leaves of a package: its files, and metadata that lists them."""
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text("")
    info = path / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def found(topic: str) -> list[dict[str, str]]:
    return [f for f in run_json("doctor")["findings"] if f["topic"] == topic]


@pytest.mark.parametrize(
    ("target", "level", "text"),
    [
        ("trn1", "ok", "need fp8_rescale"),
        ("inf2", "ok", "need fp8_rescale"),
        ("trn2", "ok", "need fp8_rescale"),
        ("trn3", "ok", "need not"),
        ("", "note", "cannot be told"),
    ],
)
def test_platform(monkeypatch: pytest.MonkeyPatch, target: str, level: str, text: str) -> None:
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", target)
    (finding,) = found("platform")
    assert (finding["level"], text in finding["text"]) == (level, True)


@pytest.mark.parametrize("name", ["neuronx-distributed", "torch-neuronx", "neuronx-cc", "nki", "vllm-neuron"])
def test_placeholders_are_told_from_the_real_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module = NEURON_PACKAGES[name]
    if module in sys.modules:
        pytest.skip(f"{module} is imported here")
    placeholder, real = tmp_path / "placeholder", tmp_path / "real"
    distribution(placeholder, name, "0.0.1", f"{name}-placeholder/__init__.py")
    distribution(real, name, "2.29.0", f"{module}/__init__.py")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(placeholder))
        assert run("doctor").exit_code == 1
        (finding,) = [f for f in found("packages") if f["text"].startswith(f"{name} ")]
        assert finding["level"] == "problem"
        assert "placeholder" in finding["text"]
        assert f"pip uninstall {name}" in finding["todo"]
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(real))
        assert {"topic": "packages", "level": "ok", "text": f"{name} 2.29.0", "todo": ""} in found("packages")


@pytest.mark.parametrize("name", ["XLA_HANDLE_SPECIAL_SCALAR", "UNSAFE_FP8FNCAST"])
def test_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for value, level in ((None, "note"), ("1", "ok"), ("0", "problem")):
        if value is not None:
            monkeypatch.setenv(name, value)
        (finding,) = [f for f in found("environment") if f["text"].startswith(name)]
        assert finding["level"] == level
        assert ("export" in finding["todo"]) == (level != "ok")


def test_vllm_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = metadata.EntryPoint(
        "neuron_fp8_loader", "neuron_fp8_loader.integrations.vllm:register", "vllm.general_plugins"
    )
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda group: [hook])
    monkeypatch.setattr(doctor, "_version", lambda name: "0.11.0" if name == "vllm" else None)
    assert found("vllm")[0]["level"] == "ok"
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    (finding,) = found("vllm")
    assert finding["level"] == "problem"
    assert "VLLM_PLUGINS=other,neuron_fp8_loader" in finding["todo"]
    monkeypatch.setenv("VLLM_PLUGINS", "neuron_fp8_loader,other")
    assert found("vllm")[0]["level"] == "ok"
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda group: [])
    assert found("vllm")[0]["level"] == "problem"


def test_kernel_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "active", "sse9")
    assert found("kernel")[0]["level"] == "problem"
    monkeypatch.setattr(kernel, "active", "torch")
    monkeypatch.setattr(kernel, "paths", lambda: ["torch"])
    (finding,) = found("kernel")
    assert finding["level"] == "note"
    assert "gcc" in finding["todo"]
    monkeypatch.setenv("NEURON_FP8_LOADER_THREADS", "many")
    (finding,) = found("threads")
    assert finding["level"] == "problem"
    monkeypatch.setenv("NEURON_FP8_LOADER_THREADS", "3")
    assert found("threads")[0]["text"].startswith("3, from NEURON_FP8_LOADER_THREADS")


def test_text_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNSAFE_FP8FNCAST", "0")
    result = run("doctor")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if "UNSAFE_FP8FNCAST=0" in line)
    assert lines[at].startswith("problem")
    assert lines[at + 1].strip() == "-> export UNSAFE_FP8FNCAST=1"
    assert any(f"torch {torch.__version__}" in line for line in lines)
