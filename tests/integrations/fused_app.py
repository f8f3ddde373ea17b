"""Fused speculation on the real NxD Inference. Importing this enables nothing, as real_disable.py needs it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

ON: dict[str, Any] = {"fp8_rescale": True, "modules_to_not_convert": None}


def fused(tmp_path: Path, **over: Any) -> tuple[Any, dict[str, Any]]:
    """An application with draft and target, made as inference_demo.py makes it, and their tensors by prefix.

    The draft's MLP is bfloat16.
    """
    import harness as H
    from neuronx_distributed_inference.models.config import FusedSpecNeuronConfig, OnDeviceSamplingConfig
    from neuronx_distributed_inference.models.llama.modeling_llama import NeuronLlamaForCausalLM, NeuronLlamaModel
    from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config

    originals = {
        "draft_model.": H.make_tiny_checkpoint(tmp_path / "draft", seed=1, bf16_linears=("mlp",)),
        "target_model.": H.make_tiny_checkpoint(tmp_path / "target", seed=2),
    }
    spec = {
        "enable_fused_speculation": True,
        "speculation_length": 3,
        "on_device_sampling_config": OnDeviceSamplingConfig(),
    }
    config = H.build_config(tmp_path / "target", **{**spec, **ON, **over})
    draft_neuron_config = copy.deepcopy(config.neuron_config)
    draft_neuron_config.speculation_length = 0
    draft_neuron_config.enable_fused_speculation = False
    draft_config = type(config)(draft_neuron_config, load_config=load_pretrained_config(str(tmp_path / "draft")))
    config.fused_spec_config = FusedSpecNeuronConfig(
        NeuronLlamaModel, draft_config=draft_config, draft_model_path=str(tmp_path / "draft")
    )

    class App(NeuronLlamaForCausalLM):  # type: ignore[misc]
        """NxD Inference leaves the prefix of the last load on the class."""

    return App(str(tmp_path / "target"), config), originals
