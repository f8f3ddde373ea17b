"""The plugin that vLLM loads in each of its processes (entry point group ``vllm.general_plugins``)."""

from __future__ import annotations

import importlib.util
import logging

log = logging.getLogger("neuron_fp8_loader")


def register() -> None:
    """Enable the hook where NxD Inference is installed. Imports nothing of it, and never raises."""
    try:
        if importlib.util.find_spec("neuronx_distributed_inference") is None:
            return
        from .nxdi import enable

        enable()
    except Exception:
        log.exception("neuron_fp8_loader is not enabled in this vLLM process; fp8_rescale will be ignored")
