"""The plugin: found by its entry point, free where NxD Inference is absent, harmless where it fails."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from neuron_fp8_loader.integrations import nxdi as hook
from neuron_fp8_loader.integrations.vllm import register
from tests.integrations.conftest import PACKAGE, STANDIN, Standin
from tests.support import ROOT


def test_the_entry_point_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split('[project.entry-points."vllm.general_plugins"]\n')[1].split("\n\n")[0]
    name, _, target = section.partition(" = ")
    assert name == "neuron_fp8_loader"
    module, _, function = target.strip().strip('"').partition(":")
    assert getattr(importlib.import_module(module), function) is register


def test_register_enables_without_importing(nxdi: Standin) -> None:
    register()
    register()
    assert PACKAGE not in sys.modules
    assert nxdi.config.NeuronConfig(fp8_rescale=True).fp8_rescale is True


def test_nothing_is_done_where_nxdi_is_absent() -> None:
    before = list(sys.meta_path)
    if importlib.util.find_spec(PACKAGE) is not None:
        pytest.skip("NxD Inference is installed")
    register()
    assert sys.meta_path == before


def test_a_failure_is_logged_and_no_more(
    nxdi: Standin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ImportError("half an installation")

    monkeypatch.setattr(hook, "enable", fail)
    register()
    assert "half an installation" in caplog.text
    assert "not enabled in this vLLM process" in caplog.text


def test_a_broken_search_path_is_no_reason_to_stop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> None:
        raise ValueError("__spec__ is None")

    monkeypatch.setattr(importlib.util, "find_spec", fail)
    register()
    assert "__spec__ is None" in caplog.text


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As vLLM does in each worker: load the plugin, call it, import NxD Inference later."""
    code = (
        "import sys\n"
        "from neuron_fp8_loader.integrations.vllm import register\n"
        "register()\n"
        f"assert {PACKAGE!r} not in sys.modules\n"
        f"from {PACKAGE}.models.config import MoENeuronConfig\n"
        "print(MoENeuronConfig(fp8_rescale='ratio').fp8_rescale)\n"
    )
    path = f"{STANDIN}:{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "ratio\n"
