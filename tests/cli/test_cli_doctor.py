"""``neuron-fp8 doctor``: each finding under the conditions that bring it about."""

from __future__ import annotations

import os
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch
from rich.console import Console

from neuron_fp8_loader import kernel
from neuron_fp8_loader.cli.doctor import _folded
from neuron_fp8_loader.tools import device, doctor, stack
from neuron_fp8_loader.tools.doctor import NEURON_PACKAGES, Finding
from tests.cli.helpers import run, run_json
from tests.support import ieee_e4m3


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


PLUGIN = ("vllm-neuron", "0.24.0.1.1.0", "vllm_neuron/__init__.py", "vllm_neuron/utils/checkpoints.py")
ON_NXDI = ("vllm-neuron", "0.5.3", "vllm_neuron/__init__.py")
NXDI = ("neuronx-distributed-inference", "0.9.17334", "neuronx_distributed_inference/__init__.py")
CC = ("neuronx-cc", "2.24.5133.0", "neuronxcc/__init__.py")
TORCH_NEURONX = ("torch-neuronx", "2.9.0.2.13.1", "torch_neuronx/__init__.py")
VLLM = ("vllm", "0.24.0", "vllm/__init__.py")


@pytest.mark.parametrize(
    ("packages", "starts", "sdk", "hook"),
    [
        ((), "none;", None, None),
        ((TORCH_NEURONX,), "torch-neuronx without", None, None),
        ((NXDI, CC), "NxD Inference: fp8_rescale in NeuronConfig", "2.29, by neuronx-cc 2.24.5133.0", None),
        ((NXDI, ON_NXDI, VLLM, CC), "vLLM on NxD Inference", "2.29, by neuronx-cc 2.24.5133.0", "into NxD Inference"),
        ((PLUGIN, VLLM), "the vLLM Neuron plugin without NxD", "2.32, by vllm-neuron", "the vLLM Neuron plugin reads"),
        ((PLUGIN, VLLM, NXDI), "NxD Inference (fp8_rescale", "2.32, by vllm-neuron", "into NxD Inference"),
        ((VLLM,), "none;", None, "finds neither"),
        ((("neuronx-cc", "3.1.2", "neuronxcc/__init__.py"),), "none;", "not known, by neuronx-cc 3.1.2", None),
    ],
)
def test_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: tuple[tuple[str, ...], ...], starts: str,
    sdk: str | None, hook: str | None,
) -> None:  # fmt: skip
    for name in [name for name in sys.modules if name.split(".")[0] in (*NEURON_PACKAGES.values(), "vllm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")  # else torch_neuronx is asked
    for package in packages:
        distribution(tmp_path, *package)
    monkeypatch.syspath_prepend(str(tmp_path))
    what, *more = (f["text"] for f in found("stack"))
    assert what.startswith(starts)
    assert [text.removeprefix("Neuron SDK ").startswith(sdk) for text in more] == [True] if sdk else not more
    if hook:
        (text,) = [f["text"] for f in found("vllm") if f["text"].startswith("vllm 0.24.0: ")]
        assert hook in text
        assert ("NxD Inference is enabled" in text) == (NXDI in packages)
    assert bool(found("environment")) == (PLUGIN not in packages or NXDI in packages)


def test_the_plugin_without_nxd_inference_is_not_for_trn1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "vllm_neuron" in sys.modules:
        pytest.skip("vllm_neuron is imported here")
    distribution(tmp_path, *PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "inf2")
    assert found("stack")[0]["level"] == "problem"


def test_a_placeholder_tells_no_sdk() -> None:
    assert stack.sdk({"neuronx-cc": None, "vllm-neuron": None}) is None
    assert stack.sdk({"neuronx-cc": "9.9", "neuronx-distributed": "0.16.25997"}) == (
        "2.27", "neuronx-distributed 0.16.25997"
    )  # fmt: skip


# -- doctor --device, on devices that are not there ---------------------------------------------------------------


def reads(how: str) -> device.Run:
    """A device that reads FP8 as ``how`` says; IEEE e4m3 by ml_dtypes."""

    def run(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight = module.get_buffer("weight")
        values = weight.float() if how == "e4m3fn" else torch.from_numpy(ieee_e4m3(weight)).float()
        if how == "flushes":
            values[values.abs() < 2**-6] = 0
        elif how == "off by one":
            values = torch.from_numpy(ieee_e4m3((weight.view(torch.uint8) & 0xFE).view(weight.dtype))).float()
        elif how == "bits":
            values = weight.view(torch.uint8).float()
        elif how == "refuses" and not values.isfinite().all():
            raise RuntimeError("Failed to execute the model status=1003 message=Numerical Error")
        return (x.float()[:, :1] * values[:, 0]).to(x.dtype)

    return run


@pytest.mark.parametrize(
    ("how", "target", "level", "text"),
    [
        ("ieee", "trn2", "ok", "subnormals kept; code 0x78 read as inf; values up to 240 right: IEEE e4m3"),
        ("flushes", "trn1", "note", "subnormals flushed; code 0x78 read as inf; values up to 240 right"),
        ("refuses", "inf2", "ok", "subnormals kept; code 0x78 refused by the runtime; values up to 240 right"),
        ("e4m3fn", "trn3", "ok", "code 0x78 read as 256; values up to 240 right: e4m3fn, nothing to rescale"),
        ("e4m3fn", "trn2", "problem", "unexpected on trn2"),
        ("ieee", "trn3", "problem", "unexpected on trn3"),
        ("off by one", "trn2", "problem", "values up to 240 WRONG for 112 of 224 codes"),
        ("bits", "trn2", "problem", "subnormals wrong"),
    ],
)
def test_device(monkeypatch: pytest.MonkeyPatch, how: str, target: str, level: str, text: str) -> None:
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", target)
    monkeypatch.setattr(device, "missing", lambda: None)
    monkeypatch.setattr(device, "neuron", reads(how))
    result = run("doctor", "--device")
    (line,) = [line for line in result.stdout.splitlines() if line.split()[1] == "device"]
    assert line.startswith(level)
    assert text in line
    assert (result.exit_code == 1) == (level == "problem")


def test_a_device_that_does_not_compile_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("[NCC_EVRF051] Data type F8E4M3FN is not supported\nand more")

    monkeypatch.setattr(device, "missing", lambda: None)
    monkeypatch.setattr(device, "neuron", fails)
    assert run("doctor", "--device").exit_code == 1
    findings = run_json("doctor", "--device", code=1)["findings"]
    assert findings[-1]["text"].endswith("does not run: [NCC_EVRF051] Data type F8E4M3FN is not supported")


def test_without_a_device() -> None:
    if device.missing() is None:
        pytest.skip("there is one")
    result = run("doctor", "--device")
    assert result.exit_code == 1
    assert "no Neuron device: there is no /dev/neuron0, so nothing was run" in result.stdout
    assert "device" not in {f["topic"] for f in run_json("doctor")["findings"]}


def test_the_layer_is_what_torch_computes() -> None:
    """On a device that reads as torch's CPU does; the layer that is compiled, not a stand-in for it."""
    assert device.read_codes(lambda module, x: module(x)) == device.Reading("kept", 0, "256")


@pytest.mark.parametrize("native", [False, True])
def test_how_the_device_is_called(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    calls: list[dict[str, object]] = []

    def trace(module: torch.nn.Module, inputs: tuple[torch.Tensor], **options: object) -> object:
        calls.append(options)
        return module

    fake = types.ModuleType("torch_neuronx")
    if native:
        monkeypatch.setattr(torch, "compile", lambda module, **options: calls.append(options) or module)
        monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
        monkeypatch.setattr(torch.Tensor, "to", _to(torch.Tensor.to))
        monkeypatch.setenv("NEURON_CC_FLAGS", "--mine")
        monkeypatch.setenv("TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION", "0")
    else:
        fake.trace = trace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_neuronx", fake)
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
    assert device.read_codes(device.neuron).subnormals == "kept"
    if native:
        assert [call["backend"] for call in calls] == ["neuron", "neuron"]
        assert os.environ["NEURON_CC_FLAGS"].startswith("--mine ")
        assert os.environ["NEURON_CC_FLAGS"].count(device.FP8_ARGS) == 1
    else:
        assert all(device.FP8_ARGS in str(call["compiler_args"]) for call in calls)
        monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn3")
        device.read_codes(device.neuron)
        assert device.FP8_ARGS not in str(calls[-1]["compiler_args"])


def _to(real):
    return lambda self, *a, **k: self if a == ("neuron",) else real(self, *a, **k)


def test_on_a_terminal_a_long_finding_goes_on_below_itself() -> None:
    narrow = Console(width=60, force_terminal=True, no_color=True)
    with narrow.capture() as captured:
        narrow.print(_folded(Finding("kernel", "note", "word [bold] " * 20, "")))
    first, *more = captured.get().splitlines()
    assert first.startswith("note     kernel       word [bold] ")
    assert len(more) > 3
    assert all(line.startswith(" " * 22 + "word") or line.startswith(" " * 22 + "[bold]") for line in more)
