"""enable() and disable(): any order, any number of times, nothing heavy, nothing left behind."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import neuron_fp8_loader
from neuron_fp8_loader.integrations.loading import READERS
from neuron_fp8_loader.integrations.patches import Patches
from neuron_fp8_loader.integrations.post_import import PostImport
from tests.integrations.checkpoints import state_dict, write
from tests.integrations.conftest import PACKAGE, Standin
from tests.integrations.snapshot import changed, snapshot


def touched(nxdi: Standin) -> dict[str, Any]:
    """Every name that the hook may touch, with what it is bound to."""
    base = nxdi.application.NeuronApplicationBase
    names = ("get_state_dict", "checkpoint_loader_fn", "save_quantized_state_dict")
    return {
        "config": vars(nxdi.config.NeuronConfig)["__init__"],
        "fused": vars(nxdi.config.FusedSpecNeuronConfig)["__init__"],
        **{name: vars(base)[name] for name in names},
        **{name: getattr(nxdi.checkpoint, name) for name in READERS},
    }


@pytest.mark.parametrize("order", ["before", "after"])
def test_enable_before_or_after_the_import(nxdi: Standin, order: str) -> None:
    if order == "after":
        plain = touched(nxdi)
        neuron_fp8_loader.enable()
        assert all(value is not plain[name] for name, value in touched(nxdi).items())
    else:
        neuron_fp8_loader.enable()
    assert nxdi.config.NeuronConfig(fp8_rescale=True).fp8_rescale is True


def test_disable_puts_back_every_object(nxdi: Standin, tmp_path: Path) -> None:
    """Whatever hangs on the package's modules and classes, not only what is known here to be replaced."""
    touched(nxdi)  # imports them
    importlib.import_module(f"{PACKAGE}.models.model_wrapper")
    plain = snapshot(PACKAGE)
    for _ in range(2):
        neuron_fp8_loader.enable()
        neuron_fp8_loader.enable()
        replaced = changed(plain, snapshot(PACKAGE))
        assert {path.rpartition(".")[2] for path in replaced} >= {*READERS, "convert", "load_module", "__init__"}
        path = write(tmp_path, state_dict())
        config = nxdi.config.InferenceConfig(
            nxdi.config.MoENeuronConfig(
                quantized=True, quantized_checkpoints_path=path, quantization_dtype="f8e4m3", fp8_rescale=True,
                quantization_type="per_channel_symmetric",
            )
        )  # fmt: skip
        assert nxdi.application.NeuronApplicationBase(path, config).checkpoint_loader_fn()
        neuron_fp8_loader.disable()
        assert not changed(plain, snapshot(PACKAGE))
    neuron_fp8_loader.disable()


@pytest.mark.parametrize(
    "change",
    [
        "m.TABLE = dict(m.TABLE)",
        "m.TABLE['key'] = object()",
        "m.TABLE['other'] = 1",
        "m.LIST.append(1)",
        "m.f.__defaults__ = ([1],)",
        "m.f.__code__ = (lambda x=None: x).__code__",
        "m.f.__wrapped__ = m.f",
        "m.f = lambda: None",
        "m.C.of_class = classmethod(lambda cls: 0)",
        "m.C.method = m.f",
        "m.C.more = 1",
        "del m.C.method",
        "del m.f",
    ],
)
def test_a_snapshot_sees_whatever_is_replaced(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    module = ModuleType("looked_at")
    monkeypatch.setitem(sys.modules, "looked_at", module)
    exec(
        "TABLE, LIST = {'key': object()}, []\n"
        "def f(x=[]): pass\n"
        "class C:\n"
        "    def method(self): pass\n"
        "    @classmethod\n"
        "    def of_class(cls): pass\n"
        "C.__module__ = 'looked_at'",
        vars(module),
    )
    before = snapshot("looked_at")
    assert not changed(before, snapshot("looked_at"))
    exec(change, {"m": module})
    assert changed(before, snapshot("looked_at"))


def test_disable_after_a_later_import_leaves_a_module_like_any_other(nxdi: Standin) -> None:
    neuron_fp8_loader.enable()
    config = nxdi.config
    assert type(config.__spec__.loader) is type(importlib.import_module("json").__spec__.loader)
    assert config.__loader__ is config.__spec__.loader
    neuron_fp8_loader.disable()
    assert not hasattr(config.NeuronConfig.__init__, "__wrapped__")


def test_a_module_imported_anew_is_hooked_anew(enabled: Standin) -> None:
    first = enabled.config
    importlib.reload(first)
    assert first.NeuronConfig(fp8_rescale="half").fp8_rescale == "half"


def test_signatures_stay_readable(enabled: Standin) -> None:
    assert enabled.application.NeuronApplicationBase.get_state_dict.__name__ == "get_state_dict"
    assert enabled.checkpoint.load_safetensors.__module__.startswith(PACKAGE)


def test_an_unknown_version_is_hooked_as_far_as_it_goes(
    nxdi: Standin, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(nxdi.checkpoint, "load_diffusers_safetensors")
    neuron_fp8_loader.enable()
    assert "no load_diffusers_safetensors" in caplog.text
    assert nxdi.config.NeuronConfig(fp8_rescale=True).fp8_rescale is True


def test_importing_the_package_imports_nothing_of_neuron_or_vllm() -> None:
    code = (
        "import sys, neuron_fp8_loader as n; n.enable(); n.enable();"
        "roots = {m.split('.')[0] for m in sys.modules};"
        f"heavy = roots & {{{PACKAGE!r}, 'neuronx_distributed', 'torch_neuronx', 'torch_xla', 'vllm', 'rich'}};"
        "assert not heavy, heavy; n.disable()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestPatches:
    class Owner:
        def method(self) -> str:
            return "original"

        @classmethod
        def of_class(cls) -> str:
            return cls.__name__

        @staticmethod
        def static(x: int) -> int:
            return x

    def test_kinds_of_methods_stay_what_they_are(self) -> None:
        class Sub(self.Owner):  # type: ignore[name-defined,misc]
            pass

        def twice(original: Callable[..., Any], *args: Any) -> Any:
            return original(*args) * 2

        patches = Patches()
        for name in ("method", "of_class", "static"):
            assert patches.wrap(self.Owner, name, twice)
        assert (Sub().method(), Sub.of_class(), Sub.static(3)) == ("originaloriginal", "SubSub", 6)
        patches.restore()
        assert (Sub().method(), Sub.of_class(), Sub.static(3)) == ("original", "Sub", 3)

    def test_a_replacement_still_held_calls_the_original_after_restore(self) -> None:
        patches = Patches()
        patches.wrap(self.Owner, "method", lambda original, self: "patched")
        held = self.Owner.method
        assert held(self.Owner()) == "patched"
        patches.restore()
        assert held(self.Owner()) == "original"
        patches.wrap(self.Owner, "method", lambda original, self: "patched anew")
        assert held(self.Owner()) == "original"
        patches.restore()

    def test_what_somebody_else_replaced_since_stays_theirs(self, caplog: pytest.LogCaptureFixture) -> None:
        class Owner(self.Owner):  # type: ignore[name-defined,misc]
            def method(self) -> str:
                return "own"

        patches = Patches()
        patches.wrap(Owner, "method", lambda original, self: "patched")
        ours = Owner.method
        Owner.method = lambda self: "theirs, around " + ours(self)  # type: ignore[method-assign]
        patches.restore()
        assert Owner().method() == "theirs, around own"
        assert "Owner.method" in caplog.text

    def test_a_name_that_is_not_there(self) -> None:
        assert not Patches().wrap(self.Owner, "nothing", lambda original: None)


def test_two_finders_of_the_kind_do_not_call_each_other_for_ever(nxdi: Standin) -> None:
    seen: list[str] = []

    def callback(module: ModuleType) -> None:
        seen.append(module.__name__)

    name = f"{PACKAGE}.models.config"
    finders = [PostImport({name: callback}), PostImport({name: callback})]
    for finder in finders:
        finder.install()
    try:
        assert nxdi.config.NeuronConfig is not None
    finally:
        for finder in finders:
            finder.remove()
            finder.remove()
    assert seen == [name, name]
