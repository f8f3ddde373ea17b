"""The plugin that vLLM loads in each of its processes (entry point group ``vllm.general_plugins``)."""

from __future__ import annotations

import importlib.util
import logging

log = logging.getLogger("neuron_fp8_loader")


def register() -> None:
    """Enable the hooks for what is installed: NxD Inference, the vLLM Neuron plugin without it. Never raises.

    Imports nothing of them.
    """
    try:
        if importlib.util.find_spec("neuronx_distributed_inference") is not None:
            from .nxdi import enable

            enable()
    except Exception:
        log.exception("neuron_fp8_loader is not enabled in this vLLM process; fp8_rescale will be ignored")
    try:
        from . import vllm_neuron

        if vllm_neuron.is_installed():
            vllm_neuron.enable()
    except Exception:
        log.exception("neuron_fp8_loader is not enabled in this vLLM process; the vLLM Neuron plugin stays as it is")
