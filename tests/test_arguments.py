"""Arguments of the wrong kind, for every public function: an error of ours that says what was given, at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support import codes, save

import neuron_fp8_loader as package
from neuron_fp8_loader import (
    OptionError,
    Options,
    conventions,
    load_checkpoint,
    load_file,
    load_state_dict,
    neuron_view,
    plan_checkpoint,
    rescale_on_load,
    rescale_state_dict,
    safe_open,
    wrap_checkpoint_loader,
)
from neuron_fp8_loader.errors import CheckpointError, PlanError
from neuron_fp8_loader.options import OptionKeywords

Call = Callable[[Path, Any], object]

GPU = ("3",) if torch.version.cuda or torch.version.hip else ()
"""A number is a GPU's where torch was built for such, and torch says what is wrong with it."""

WRONG = {
    "None": None, "3": 3, "-1": -1, "text": "x", "empty text": "", "list": [], "list of it": [object()], "dict": {},
    "object": object(), "bytes": b"x", "bool": True, "float": 2.5, "set": set(), "tensor": torch.ones(2), "type": type,
}  # fmt: skip


def pair() -> dict[str, torch.Tensor]:
    return {"m.weight": codes([[0x7E, 0x10]]), "m.weight_scale": torch.ones(1)}


# (function, argument) -> a call with it, and the values of WRONG that are right for it
CALLS: dict[tuple[str, str], tuple[Call, tuple[str, ...]]] = {
    ("load_state_dict", "path"): (lambda file, value: load_state_dict(value), ()),
    ("load_checkpoint", "path"): (lambda file, value: load_checkpoint(value), ()),
    ("load_file", "filename"): (lambda file, value: load_file(value), ()),
    ("plan_checkpoint", "path"): (lambda file, value: plan_checkpoint(value), ()),
    ("plan_checkpoint", "download"): (lambda file, value: plan_checkpoint(file, download=value), ("bool",)),
    ("plan_checkpoint", "headers_only"): (lambda file, value: plan_checkpoint(file, headers_only=value), ("bool",)),
    ("safe_open", "filename"): (lambda file, value: safe_open(value), ()),
    ("load_state_dict", "slices"): (lambda file, value: load_state_dict(file, slices=value), ("None", "dict", "type")),
    ("load_checkpoint", "slices"): (lambda file, value: load_checkpoint(file, slices=value), ("None", "dict", "type")),
    ("load_state_dict", "verdict"): (lambda file, value: load_state_dict(file, verdict=value), ("None",)),
    ("load_checkpoint", "verdict"): (lambda file, value: load_checkpoint(file, verdict=value), ("None",)),
    ("load_file", "device"): (lambda file, value: load_file(file, value), ("None", *GPU)),
    ("load_file", "backend"): (lambda file, value: load_file(file, backend=value), ("text", "empty text")),
    ("safe_open", "framework"): (lambda file, value: safe_open(file, value), ()),
    ("safe_open", "device"): (lambda file, value: safe_open(file, "pt", value), ("None", *GPU)),
    ("safe_open", "backend"): (lambda file, value: safe_open(file, backend=value), ("text", "empty text")),
    ("safe_open.get_tensor", "name"): (lambda file, value: safe_open(file).get_tensor(value), ("text", "empty text")),
    ("safe_open.get_slice", "name"): (lambda file, value: safe_open(file).get_slice(value), ("text", "empty text")),
    ("rescale_state_dict", "state_dict"): (lambda file, value: rescale_state_dict(value), ("dict",)),
    ("rescale_state_dict", "inplace"): (lambda file, value: rescale_state_dict(pair(), inplace=value), ("bool",)),
    ("rescale_on_load", "module"): (lambda file, value: rescale_on_load(value), ()),
    ("wrap_checkpoint_loader", "fn"): (lambda file, value: wrap_checkpoint_loader(value), ("type",)),
    ("wrap_checkpoint_loader", "inplace"): (
        lambda file, value: wrap_checkpoint_loader(pair, inplace=value),
        ("bool",),
    ),
    ("neuron_view", "weight"): (lambda file, value: neuron_view(value), ()),
    ("conventions.register", "convention"): (lambda file, value: conventions.register(value), ()),
    ("conventions.unregister", "name"): (lambda file, value: conventions.unregister(value), ()),
}  # fmt: skip

NO_ARGUMENTS = {"enable", "disable"}
DATA = {"LoadedCheckpoint", "Plan", "Report", "kernel"}
"""What is made by us, not by callers; and the kernel, whose arguments test_kernel and test_native_arguments hold."""

RIGHT_OPTIONS = {
    "always": {"bool"},
    "keep": {"list", "text", "empty text"},
    "dequantize": {"list", "text", "empty text"},
    "threads": {"None", "3"},
    "download": {"bool"},
    "progress": {"None", "bool"},
}


def test_every_public_function_is_here() -> None:
    for name in package.__all__:
        value = getattr(package, name)
        if name in DATA | {"Options", "conventions"} or (isinstance(value, type) and issubclass(value, Exception)):
            continue
        arguments = set(inspect.signature(value).parameters) - {"options"}
        assert arguments == {argument for function, argument in CALLS if function == name}, name
        assert bool(arguments) != (name in NO_ARGUMENTS)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("arguments") / "model.safetensors", pair())


@pytest.mark.parametrize("kind", list(WRONG))
@pytest.mark.parametrize("name", list(CALLS), ids=".".join)
def test_wrong_kinds(file: Path, name: tuple[str, str], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    call, right = CALLS[name]
    if kind in right:
        return
    with pytest.raises((OptionError, CheckpointError)) as error:
        call(file, WRONG[kind])
    text = str(error.value)
    assert (
        name[1] in text
        or name[0].rpartition(".")[2] in text
        or any(s in text for s in ("state dict", "no convention"))
        or kind.endswith("text")
    )
    assert len(text) > 20


@pytest.mark.parametrize("kind", list(WRONG))
@pytest.mark.parametrize("option", list(OptionKeywords.__annotations__))
def test_wrong_options(file: Path, option: str, kind: str) -> None:
    value: Any = {option: WRONG[kind]}
    for call in (
        lambda: Options(**value),
        lambda: load_state_dict(file, **value),
        lambda: load_file(file, **value),
        lambda: safe_open(file, **value),
        lambda: rescale_state_dict(pair(), **value),
        lambda: rescale_on_load(torch.nn.Linear(1, 1), **value),
        lambda: wrap_checkpoint_loader(pair, **value),
    ):
        if kind in RIGHT_OPTIONS.get(option, ()):
            with suppress(PlanError, OptionError):  # patterns that match nothing
                call()
            continue
        with pytest.raises(OptionError, match=option):
            call()


@pytest.mark.parametrize("kind", list(WRONG))
@pytest.mark.parametrize("part", ["name", "weight", "scale", "producers", "beats", "transposed", "scale_transposed"])
def test_conventions(part: str, kind: str) -> None:
    right = {"name": "text", "producers": "text", "transposed": "bool", "scale_transposed": "bool"}
    given = {"name": "mine", "weight": "{}.w", "scale": "{}.s", part: WRONG[kind]}
    if right.get(part, "nothing") in kind:
        conventions.Convention(**given)
        return
    with pytest.raises(OptionError) as error:
        conventions.Convention(**given)
    assert repr(WRONG[kind]) in str(error.value)


@pytest.mark.parametrize("kind", list(WRONG))
def test_what_a_loader_returns(kind: str) -> None:
    if kind == "dict":
        return
    with pytest.raises(OptionError, match="expected a state dict"):
        wrap_checkpoint_loader(lambda: WRONG[kind])()


def test_slices_of_an_open_file(file: Path) -> None:
    part = safe_open(file).get_slice("m.weight")
    for index in ("x", object(), b"x"):
        with pytest.raises((OptionError, IndexError)):
            part[index]
    assert part[0].shape == (2,)
