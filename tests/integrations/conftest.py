"""The stand-in of NxD Inference, imported afresh for every test, on a platform that is trn2 unless a test says so."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import neuron_fp8_loader
from neuron_fp8_loader.codes.device import PLATFORM_ENV
from neuron_fp8_loader.integrations import vllm_neuron
from neuron_fp8_loader.integrations.neuron_config import ENVIRONMENT
from neuron_fp8_loader.integrations.vllm_neuron.flag import ENV, GUARD_ENV
from tests.integrations import vllm_neuron_standin

PACKAGE = "neuronx_distributed_inference"
STANDIN = Path(__file__).parent / "standin"


class Standin:
    """Its modules, imported when first asked for."""

    @property
    def config(self) -> SimpleNamespace:
        return importlib.import_module(f"{PACKAGE}.models.config")  # type: ignore[return-value]

    @property
    def checkpoint(self) -> SimpleNamespace:
        return importlib.import_module(f"{PACKAGE}.modules.checkpoint")  # type: ignore[return-value]

    @property
    def application(self) -> SimpleNamespace:
        return importlib.import_module(f"{PACKAGE}.models.application_base")  # type: ignore[return-value]


def forget() -> None:
    for name in [name for name in sys.modules if name == PACKAGE or name.startswith(PACKAGE + ".")]:
        del sys.modules[name]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the test does
        monkeypatch.delenv(name)
    monkeypatch.setenv(PLATFORM_ENV, "trn2")


@pytest.fixture
def nxdi(monkeypatch: pytest.MonkeyPatch, environment: None) -> Iterator[Standin]:
    """The stand-in, importable and not imported yet; the hook is not enabled."""
    forget()
    monkeypatch.syspath_prepend(str(STANDIN))
    yield Standin()
    neuron_fp8_loader.disable()
    forget()


@pytest.fixture
def enabled(nxdi: Standin) -> Standin:
    """The stand-in with the hook enabled."""
    neuron_fp8_loader.enable()
    return nxdi


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[vllm_neuron_standin.Plugin]:
    """The stand-in of the vLLM Neuron plugin on a trn2, importable and not imported yet; the flag is off."""
    monkeypatch.setenv(PLATFORM_ENV, "trn2")
    for name in (ENV, GUARD_ENV):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever the test does
        monkeypatch.delenv(name)
    vllm_neuron.disable()
    vllm_neuron_standin.forget()
    monkeypatch.syspath_prepend(str(vllm_neuron_standin.STANDIN))
    yield vllm_neuron_standin.Plugin()
    vllm_neuron.disable()
    vllm_neuron_standin.forget()
