"""Which of Neuron's stacks is installed, from which SDK, and what of this package acts on it. Imports none of them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..integrations import vllm_neuron

# distribution -> its first numbers -> the SDK that shipped it by AWS Neuron's "Release Content" pages.
# neuronx-distributed 0.19 came with two of them, and is no evidence.
_SHIPPED = {
    "neuronx-cc": {(2, n): f"2.{n + 5}" for n in range(20, 28)},
    "vllm-neuron": {(0, 21): "2.31", (0, 24): "2.32", (0, 29): "2.33"},
    "neuronx-distributed": {(0, 14): "2.25", (0, 15): "2.26", (0, 16): "2.27", (0, 17): "2.28", (0, 18): "2.29"},
}


@dataclass(frozen=True)
class Stack:
    """What runs models here.

    Attributes:
        nxdi: is NxD Inference there?
        plugin: is the vLLM Neuron plugin there that reads checkpoints by itself, without NxD Inference?
        vllm: is vLLM there?
        torch_neuronx: is torch-neuronx, or NxD Core, there?
    """

    nxdi: bool
    plugin: bool
    vllm: bool
    torch_neuronx: bool

    def describe(self) -> str:
        """What it is, and what of this package acts on it, in a sentence."""
        on_nxdi = "fp8_rescale in NeuronConfig, after neuron_fp8_loader.enable()"
        if self.nxdi and self.plugin:
            return (
                f"NxD Inference ({on_nxdi}), and beside it the vLLM Neuron plugin without NxD Inference "
                "(--quantization neuron_fp8)"
            )
        if self.plugin:
            return "the vLLM Neuron plugin without NxD Inference: --quantization neuron_fp8; fp8_rescale is not for it"
        if self.nxdi and self.vllm:
            return "vLLM on NxD Inference: fp8_rescale in override_neuron_config"
        if self.nxdi:
            return f"NxD Inference: {on_nxdi}"
        if self.torch_neuronx:
            return "torch-neuronx without NxD Inference: wrap_checkpoint_loader, rescale_on_load and load_state_dict"
        return "none; load_state_dict, inspect, verify and export work without"


def installed(there: Mapping[str, bool], vllm: bool) -> Stack:
    """The stack, from the modules that are there (``{"neuronx_distributed_inference": True, ...}``)."""
    return Stack(
        nxdi=there.get("neuronx_distributed_inference", False),
        plugin=vllm_neuron.is_installed(),
        vllm=vllm,
        torch_neuronx=there.get("torch_neuronx", False) or there.get("neuronx_distributed", False),
    )


def sdk(versions: Mapping[str, str | None]) -> tuple[str | None, str] | None:
    """(SDK, by which package), ``("2.29", "neuronx-cc 2.24.5133.0")``; the SDK is None where the version is not known.

    None where none of these packages is there.
    """
    unknown = None
    for name, shipped in _SHIPPED.items():
        version = versions.get(name)
        numbers = re.match(r"(\d+)\.(\d+)", version or "")
        if not numbers:
            continue
        found = shipped.get((int(numbers[1]), int(numbers[2])))
        if found:
            return found, f"{name} {version}"
        unknown = unknown or (None, f"{name} {version}")
    return unknown


def module_is_there(module: str) -> bool:
    """Would it be found? Nothing is imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
