"""The package as its users find it: names, errors, types, and what it does not need."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest
import safetensors.torch
import torch
from support import ROOT, TINY

import neuron_fp8_loader
from neuron_fp8_loader import Fp8LoaderError, Options, errors
from neuron_fp8_loader.errors import OptionError

NAMES = [
    "load_state_dict",
    "load_checkpoint",
    "load_file",
    "safe_open",
    "rescale_state_dict",
    "plan_checkpoint",
    "neuron_view",
    "Fp8LoaderError",
]


@pytest.mark.parametrize("name", NAMES)
def test_public_names(name):
    assert name in neuron_fp8_loader.__all__
    assert getattr(neuron_fp8_loader, name).__doc__


def test_all_is_true():
    for name in neuron_fp8_loader.__all__:
        assert hasattr(neuron_fp8_loader, name)


def test_one_family_of_errors():
    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(found) >= 6
    assert all(issubclass(e, Fp8LoaderError) for e in found)


def test_typed():
    assert (Path(neuron_fp8_loader.__file__).parent / "py.typed").is_file()


IMPORT = """
import sys
import torch
before = set(sys.modules)
torch.set_default_device("meta")
import neuron_fp8_loader as n
[getattr(n, name) for name in n.__all__]  # imported when asked for
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = new & {"numpy", "rich", "click", "transformers", "altair", "ml_dtypes", "vllm",
               "torch_neuronx", "neuronx_distributed", "neuronx_distributed_inference", "torch_xla", "nki"}
assert not heavy, heavy
values = n.neuron_view(torch.tensor([0x38, 0x78], dtype=torch.uint8, device="cpu"))
assert values.tolist() == [1.0, float("inf")], values
"""


def test_import_is_light_and_works_under_a_default_device():
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "third"}, "method='third': expected 'half' or 'ratio'"),
        ({"nan": "ignore"}, "nan='ignore': expected 'error' or 'keep'"),
        ({"unscaled": True}, "unscaled=True: expected 'error' or 'dequantize' or 'keep'"),
        ({"always": "yes"}, "always='yes'"),
        ({"threads": 0}, "threads=0: expected a whole number from 1 up"),
        ({"threads": True}, "threads=True"),
        ({"threads": 1.5}, "threads=1.5"),
        ({"progress": "no"}, "progress='no'"),
        ({"metod": "half"}, "unknown option 'metod'; there are method, always"),
    ],
)
def test_options_are_checked_before_anything_is_read(options, text, tmp_path):
    nowhere = tmp_path / "not there"
    for call in (
        lambda: neuron_fp8_loader.load_state_dict(nowhere, **options),
        lambda: neuron_fp8_loader.load_checkpoint(nowhere, **options),
        lambda: neuron_fp8_loader.rescale_state_dict({"a": torch.ones(1)}, **options),
    ):
        with pytest.raises(OptionError) as error:
            call()
        assert text in str(error.value)
        assert isinstance(error.value, ValueError)


def test_thread_count(monkeypatch):
    monkeypatch.delenv("NEURON_FP8_LOADER_THREADS", raising=False)
    assert 1 <= Options().thread_count() <= 32
    monkeypatch.setenv("NEURON_FP8_LOADER_THREADS", "7")
    assert Options().thread_count() == 7
    assert Options(threads=2).thread_count() == 2
    monkeypatch.setenv("NEURON_FP8_LOADER_THREADS", "")
    assert 1 <= Options().thread_count() <= 32


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "\u00b2"])
def test_a_malformed_thread_variable(monkeypatch, value):
    monkeypatch.setenv("NEURON_FP8_LOADER_THREADS", value)
    with pytest.raises(OptionError, match="NEURON_FP8_LOADER_THREADS="):
        neuron_fp8_loader.rescale_state_dict({"a": torch.ones(1)})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_may_fork_after_the_import():
    """vLLM forks its workers. A torch operation run in parallel at import would leave them a pool without threads."""
    code = (
        "import os, time, torch, neuron_fp8_loader as n\n"
        "[getattr(n, name) for name in n.__all__]\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    torch.ones(1 << 22, dtype=torch.uint8).clone(); os._exit(0)\n"
        "for _ in range(200):\n"
        "    if os.waitpid(pid, os.WNOHANG)[0]: break\n"
        "    time.sleep(0.1)\n"
        "else:\n"
        "    os.kill(pid, 9); raise SystemExit('the child hangs')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- arguments of the wrong kind --------------------------------------------------------------------------------

WRONG = {
    "path": lambda: neuron_fp8_loader.load_state_dict(3),
    "no path": lambda: neuron_fp8_loader.load_checkpoint(None),
    "bytes": lambda: neuron_fp8_loader.load_state_dict(b"model.safetensors"),
    "paths": lambda: neuron_fp8_loader.plan_checkpoint(["a", "b"]),
    "file": lambda: neuron_fp8_loader.load_file({"a": torch.ones(1)}),
    "slices": lambda: neuron_fp8_loader.safe_open(None),
    "device": lambda: neuron_fp8_loader.load_file(TINY / "model.safetensors", device="toaster"),
    "device of slices": lambda: neuron_fp8_loader.safe_open(TINY / "model.safetensors", device=1.5),
    "backend": lambda: neuron_fp8_loader.load_file(TINY / "model.safetensors", backend=None),
    "framework": lambda: neuron_fp8_loader.safe_open(TINY / "model.safetensors", framework=None),
    "state dict": lambda: neuron_fp8_loader.rescale_state_dict("model.safetensors"),
    "inplace": lambda: neuron_fp8_loader.rescale_state_dict({}, inplace="yes"),
    "a mapping that cannot change": lambda: neuron_fp8_loader.rescale_state_dict(MappingProxyType({}), inplace=True),
    "method": lambda: neuron_fp8_loader.rescale_state_dict({}, method=["half"]),
    "dequantize": lambda: neuron_fp8_loader.rescale_state_dict({}, dequantize=3),
    "threads": lambda: neuron_fp8_loader.rescale_state_dict({}, threads="4"),
    "convention": lambda: neuron_fp8_loader.conventions.register("mine"),
    "templates": lambda: neuron_fp8_loader.conventions.Convention("mine", 3, "{}.scale", "us"),
    "name of a convention": lambda: neuron_fp8_loader.conventions.unregister(["mine"]),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_arguments_of_the_wrong_kind(kind):
    with pytest.raises(OptionError) as error:
        WRONG[kind]()
    assert str(error.value)


def test_load_file_and_safe_open_take_what_those_of_safetensors_take():
    """Every argument of the newest release, by its name."""
    ours = inspect.signature(neuron_fp8_loader.load_file).parameters
    for name, theirs in inspect.signature(safetensors.torch.load_file).parameters.items():
        assert ours[name].default == theirs.default
    file = TINY / "model.safetensors"
    mapped = neuron_fp8_loader.load_file(filename=file, device="cpu", backend="mmap")
    read = neuron_fp8_loader.load_file(file, "cpu", backend="pread")
    with neuron_fp8_loader.safe_open(filename=str(file), framework="pt", device="cpu", backend="mmap") as opened:
        assert set(opened.keys()) == set(mapped) == set(read)
        for name in mapped:
            assert torch.equal(opened.get_tensor(name).view(torch.uint8), mapped[name].view(torch.uint8))
            assert torch.equal(read[name].view(torch.uint8), mapped[name].view(torch.uint8))


def test_errors_cross_processes():
    """Data loaders pickle what their workers raise."""
    found = errors.PlanError("here", ["one", "two"])
    again = pickle.loads(pickle.dumps(found))
    assert (str(again), again.source, again.problems) == (str(found), "here", ("one", "two"))
    for kind in (errors.WeightError, errors.HostMemoryError, errors.OptionError):
        assert str(pickle.loads(pickle.dumps(kind("text\x1b")))) == "text\\x1b"


def test_an_attribute_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'load_everything'"):
        neuron_fp8_loader.load_everything  # noqa: B018
    assert set(neuron_fp8_loader.__all__) <= set(dir(neuron_fp8_loader))
    assert neuron_fp8_loader.errors is errors


def test_an_attribute_that_is_taken_away(monkeypatch):
    monkeypatch.delattr(neuron_fp8_loader, "load_file")
    assert not hasattr(neuron_fp8_loader, "load_file")
    monkeypatch.undo()
    assert neuron_fp8_loader.load_file.__name__ == "load_file"
