"""Is this machine set up for FP8 on Neuron? Looks, imports no Neuron package, changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob
from importlib import metadata
from platform import python_version

import torch

from ..codes import kernel
from ..codes.device import PLATFORM_ENV, needs_rescale, platform
from ..errors import OptionError
from ..integrations import vllm_neuron
from ..integrations.vllm_neuron import flag as vllm_neuron_flag
from ..options import THREADS_ENV, Options
from . import device
from .settings import ENVIRONMENT
from .stack import Stack, installed, module_is_there, sdk

OK, NOTE, PROBLEM = "ok", "note", "problem"

NEURON_INDEX = "https://pip.repos.neuron.amazonaws.com"
"""Where the real Neuron packages are (AWS Neuron documentation, "Setup Guide")."""

# distribution -> the module that the real one installs
NEURON_PACKAGES = {
    "neuronx-distributed": "neuronx_distributed",
    "neuronx-distributed-inference": "neuronx_distributed_inference",
    "torch-neuronx": "torch_neuronx",
    "neuronx-cc": "neuronxcc",
    "nki": "nki",
    "vllm-neuron": "vllm_neuron",
    "libneuronxla": "libneuronxla",
}

_MIN_TORCH = (2, 5)


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        topic: ``"platform"``, ``"stack"``, ``"packages"``, ``"environment"``, ``"vllm"``, ``"kernel"``,
            ``"threads"`` or ``"device"``.
        level: ``"ok"``, ``"note"`` (good to know) or ``"problem"`` (FP8 will not work, or not well).
        text: what was found.
        todo: what to do about it, "" if nothing.
    """

    topic: str
    level: str
    text: str
    todo: str = ""


def examine(*, run: bool = False) -> list[Finding]:
    """Look at everything; with ``run``, compile and run a layer on the device, too (some seconds)."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _platform,
        _stack,
        _packages,
        _environment,
        _vllm,
        _kernel,
        _threads,
    )
    return [finding for check in (*checks, *([_device] if run else [])) for finding in check()]


def _platform() -> Iterator[Finding]:
    target, devices = platform(), len(glob("/dev/neuron[0-9]*"))
    seen = f"{devices} Neuron device{'' if devices == 1 else 's'}"
    if os.environ.get(PLATFORM_ENV):
        seen += f"; {PLATFORM_ENV} is set"
    if target is None:
        text = f"cannot be told ({seen}); fp8_rescale acts, as on trn1, inf2 and trn2"
        yield Finding("platform", NOTE, text, f"on a machine that compiles for another: export {PLATFORM_ENV}=trn2")
    elif needs_rescale(target):
        yield Finding("platform", OK, f"{target} ({seen}): reads FP8 up to 240, so GPU checkpoints need fp8_rescale")
    else:
        text = f"{target} ({seen}): reads e4m3fn up to 448 as it is; fp8_rescale does nothing here, and need not"
        yield Finding("platform", OK, text)


def _installed() -> Stack:
    there = {module: module_is_there(module) for module in NEURON_PACKAGES.values()}
    return installed(there, _version("vllm") is not None)


def _stack() -> Iterator[Finding]:
    stack, target = _installed(), platform()
    runs = stack.nxdi or stack.plugin or stack.torch_neuronx
    if stack.plugin and not stack.nxdi and target in ("trn1", "inf2"):
        text = f"the vLLM Neuron plugin without NxD Inference does not run on {target}"
        yield Finding("stack", PROBLEM, text, "on trn1 and inf2: vLLM on NxD Inference, of Neuron SDK 2.31 or older")
    else:
        yield Finding("stack", OK if runs else NOTE, stack.describe())
    real = {name: _version(name) if module_is_there(module) else None for name, module in NEURON_PACKAGES.items()}
    found = sdk(real)
    if found and found[0]:
        yield Finding("stack", OK, f"Neuron SDK {found[0]}, by {found[1]}")
    elif found:
        yield Finding("stack", NOTE, f"Neuron SDK not known, by {found[1]}: none of 2.25 to 2.33 had it")


def _device() -> Iterator[Finding]:
    gone = device.missing()
    if gone:
        yield Finding("device", PROBLEM, *gone)
        return
    try:
        seen = device.read_codes(device.neuron)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield Finding(
            "device", PROBLEM, f"the smallest FP8 layer does not run: {first}", "see docs/troubleshooting.md"
        )
        return
    target = platform()
    if not seen.right:
        yield Finding("device", PROBLEM, seen.describe(), "please open an issue with this output")
    elif (seen.above == "256") == needs_rescale(target):
        text = f"{seen.describe()}; unexpected on {target or 'a platform that cannot be told'}"
        yield Finding("device", PROBLEM, text, "please open an issue with this output")
    elif seen.subnormals == "flushed":
        yield Finding("device", NOTE, f"{seen.describe()}; halved weights below 2^-5 (of 448) become 0")
    else:
        yield Finding("device", OK, seen.describe())


def _packages() -> Iterator[Finding]:
    versions = {name: _version(name) for name in NEURON_PACKAGES}
    for name, version in versions.items():
        module = NEURON_PACKAGES[name]
        if version is None:
            continue
        if module_is_there(module):
            yield Finding("packages", OK, f"{name} {version}")
        else:
            yield Finding(
                "packages",
                PROBLEM,
                f"{name} {version} is a placeholder from the public index: it has no module {module}",
                f"pip uninstall {name}, then pip install {name} --extra-index-url={NEURON_INDEX}",
            )
    if all(version is None for version in versions.values()):
        text = "no Neuron package is installed; inspect, verify and export work without"
        yield Finding("packages", NOTE, text, f"to run models: pip install from {NEURON_INDEX}")
    ours = f"neuron-fp8-loader {_version('neuron-fp8-loader') or 'not installed, only on the path'}"
    yield Finding("packages", OK, f"{ours}; Python {python_version()}, safetensors {_version('safetensors')}")
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    ok = found >= _MIN_TORCH
    yield Finding(
        "packages", OK if ok else PROBLEM, f"torch {torch.__version__}", "" if ok else "pip install 'torch>=2.5'"
    )


def _environment() -> Iterator[Finding]:
    stack = _installed()
    if stack.plugin and not stack.nxdi:
        return  # it reads neither
    for name, wanted in ENVIRONMENT.items():
        value = os.environ.get(name)
        if value == wanted:
            yield Finding("environment", OK, f"{name}={value}")
        elif value is None:
            text = f"{name} is not set; fp8_rescale sets it in NxD Inference, nothing else does"
            yield Finding("environment", NOTE, text, f"export {name}={wanted}")
        else:
            text = f"{name}={value}: FP8 needs {wanted}"
            yield Finding("environment", PROBLEM, text, f"export {name}={wanted}")


def _vllm() -> Iterator[Finding]:
    version = _version("vllm")
    hooks = [e for e in metadata.entry_points(group="vllm.general_plugins") if e.value.startswith("neuron_fp8_loader")]
    allowed = os.environ.get("VLLM_PLUGINS")
    if not hooks:
        yield Finding(
            "vllm",
            PROBLEM if version else NOTE,
            "the hook is not registered: neuron-fp8-loader is not installed, only on the path",
            "in vLLM's environment: pip install . in a clone of this package, or its wheel",
        )
    elif allowed is not None and hooks[0].name not in allowed.split(","):
        yield Finding(
            "vllm",
            PROBLEM,
            f"VLLM_PLUGINS={allowed} leaves out the hook",
            f"export VLLM_PLUGINS={','.join(part for part in (allowed, hooks[0].name) if part)}, or unset it",
        )
    elif version is None:
        yield Finding("vllm", OK, "not installed; its plugin hook is registered")
    else:
        yield Finding("vllm", OK, f"vllm {version}: {_hooked(_installed())}")
    yield from _vllm_neuron(version)


def _hooked(stack: Stack) -> str:
    if stack.nxdi:
        return "the hook into NxD Inference is enabled in every process of it"
    if stack.plugin:
        return "our plugin is loaded in every process of it; it acts on what the vLLM Neuron plugin reads"
    return "our plugin is loaded in every process of it, and finds neither NxD Inference nor the vLLM Neuron plugin"


def _vllm_neuron(vllm: str | None) -> Iterator[Finding]:
    """The plugin without NxD Inference: is it that one, and what is the flag?"""
    if not vllm_neuron.is_installed():
        return
    text = "vllm-neuron reads checkpoints by itself, without NxD Inference: --quantization neuron_fp8 is its flag"
    yield Finding("vllm", OK if vllm else NOTE, text, "" if vllm else "pip install vllm, of the version that it names")
    try:
        options = vllm_neuron_flag.options()
    except OptionError as error:
        yield Finding("vllm", PROBLEM, str(error), f"export {vllm_neuron_flag.ENV}=1, or unset it")
        return
    if options is not None:
        on = "every FP8 checkpoint is read by neuron_fp8_loader"
        yield Finding("vllm", OK, f"{vllm_neuron_flag.ENV} is set: {on}, with the flag or without")
    if not vllm_neuron_flag.guarded():
        text = f"{vllm_neuron_flag.GUARD_ENV} is off: without the flag, some FP8 checkpoints load without their scales"
        yield Finding("vllm", NOTE, text, f"unset {vllm_neuron_flag.GUARD_ENV}")


def _kernel() -> Iterator[Finding]:
    paths = kernel.paths()
    if kernel.active not in paths:
        yield Finding(
            "kernel", PROBLEM, f"{kernel.ENV}={kernel.active}: no such path here", f"unset it, or one of {paths}"
        )
    elif kernel.active != "torch":
        forced = f", forced by {kernel.ENV}" if os.environ.get(kernel.ENV) else ""
        yield Finding("kernel", OK, f"{kernel.active}{forced}; here there are {', '.join(paths)}")
    elif len(paths) > 1:
        yield Finding("kernel", NOTE, f"torch, forced by {kernel.ENV}; {paths[0]} is faster", f"unset {kernel.ENV}")
    else:
        text = "torch: the native kernel was not built; same bytes, but slower"
        yield Finding(
            "kernel",
            NOTE,
            text,
            "install gcc, then in a clone of this package: pip install --force-reinstall --no-deps .",
        )


def _threads() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        threads = Options().thread_count()
    except OptionError as error:
        yield Finding("threads", PROBLEM, str(error), f"unset {THREADS_ENV}")
        return
    source = f"from {THREADS_ENV}" if os.environ.get(THREADS_ENV, "").strip() else f"for {cores} usable cores"
    yield Finding("threads", OK, f"{threads}, {source}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
