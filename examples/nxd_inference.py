"""A Llama in FP8 with NxD Inference, straight from a GPU's checkpoint. Needs a trn1, inf2 or trn2 host.

python examples/nxd_inference.py CHECKPOINT COMPILED_MODEL [TP_DEGREE]
"""

from __future__ import annotations

import sys
from typing import Any

import neuron_fp8_loader

neuron_fp8_loader.enable()  # before or after NxD Inference is imported


def build(checkpoint: str, **more: Any) -> Any:
    """The application, with nothing of the checkpoint read yet but its headers."""
    from neuronx_distributed_inference.models.llama.modeling_llama import LlamaInferenceConfig, NeuronLlamaForCausalLM
    from neuronx_distributed_inference.utils.hf_adapter import load_pretrained_config

    settings = {
        "batch_size": 1,
        "seq_len": 128,
        "torch_dtype": "bfloat16",
        "quantized": True,
        "quantized_checkpoints_path": checkpoint,
        "quantization_dtype": "f8e4m3",
        "quantization_type": "per_channel_symmetric",
        "fp8_rescale": True,  # modules_to_not_convert is filled in from the checkpoint
        **more,
    }
    neuron_config = LlamaInferenceConfig.get_neuron_config_cls()(**settings)
    config = LlamaInferenceConfig(neuron_config, load_config=load_pretrained_config(checkpoint))
    return NeuronLlamaForCausalLM(checkpoint, config)


def main(checkpoint: str, compiled: str, tp_degree: str = "2") -> None:
    model = build(checkpoint, tp_degree=int(tp_degree))
    model.compile(compiled)
    model.load(compiled)

    from neuronx_distributed_inference.utils.hf_adapter import HuggingFaceGenerationAdapter
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="right")
    prompt = tokenizer(["The capital of France is"], return_tensors="pt")
    tokens = HuggingFaceGenerationAdapter(model).generate(**prompt, max_length=64)
    print(tokenizer.batch_decode(tokens, skip_special_tokens=True)[0])


if __name__ == "__main__":
    if len(sys.argv) <= 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
