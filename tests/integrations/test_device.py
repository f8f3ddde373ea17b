from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from neuron_fp8_loader.codes.device import PLATFORM_ENV, needs_rescale, platform


def torch_neuronx(monkeypatch: pytest.MonkeyPatch, get_platform_target: Any) -> None:
    package, utils = ModuleType("torch_neuronx"), ModuleType("torch_neuronx.utils")
    utils.get_platform_target = get_platform_target  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_neuronx", package)
    monkeypatch.setitem(sys.modules, "torch_neuronx.utils", utils)


def test_the_override_counts_first(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_neuronx(monkeypatch, lambda: "trn1")
    monkeypatch.setenv(PLATFORM_ENV, " Trn3 ")
    assert platform() == "trn3"
    monkeypatch.setenv(PLATFORM_ENV, "")
    assert platform() == "trn1"
    monkeypatch.delenv(PLATFORM_ENV)
    assert platform() == "trn1"


def broken() -> str:
    raise RuntimeError("no device")


@pytest.mark.parametrize("answer", [broken, lambda: None, lambda: "", lambda: 3])
def test_it_cannot_be_told(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    monkeypatch.delenv(PLATFORM_ENV, raising=False)
    torch_neuronx(monkeypatch, answer)
    assert platform() is None


def test_nothing_installed_or_a_placeholder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLATFORM_ENV, raising=False)
    monkeypatch.setitem(sys.modules, "torch_neuronx", None)
    assert platform() is None


def test_who_needs_it() -> None:
    assert [needs_rescale(name) for name in ("trn1", "inf2", "trn2", "trn3", "trn3n", None)] == [
        True, True, True, False, False, True,
    ]  # fmt: skip
