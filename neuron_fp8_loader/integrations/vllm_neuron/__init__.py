"""The vLLM Neuron plugin without NxD Inference (``vllm_neuron`` from 0.21 on): FP8 checkpoints, read right.

Nothing of vLLM or of the plugin is imported here. Names, signatures and the order of calls are those of its sources as
of 0.24.0.1.1.0 (Neuron SDK 2.32); nothing of this has run on a Neuron device.
"""

from .hook import disable, enable, is_installed

__all__ = ["disable", "enable", "is_installed"]
