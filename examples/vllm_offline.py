"""A Llama in FP8 with vLLM on Neuron. The installed package is a vLLM plugin: there is nothing to import or call.

python examples/vllm_offline.py CHECKPOINT [TP_DEGREE]
"""

from __future__ import annotations

import sys
from typing import Any


def additional_config(checkpoint: str) -> dict[str, Any]:
    """What ``vllm serve --additional-config`` takes as JSON."""
    return {
        "override_neuron_config": {
            "quantized": True,
            "quantized_checkpoints_path": checkpoint,
            "quantization_dtype": "f8e4m3",
            "quantization_type": "per_channel_symmetric",
            "fp8_rescale": True,
        }
    }


def main(checkpoint: str, tp_degree: str = "2") -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=checkpoint,
        tensor_parallel_size=int(tp_degree),
        max_model_len=128,
        max_num_seqs=1,
        additional_config=additional_config(checkpoint),
    )
    for output in llm.generate(["The capital of France is"], SamplingParams(max_tokens=32)):
        print(output.prompt + output.outputs[0].text)


if __name__ == "__main__":
    if len(sys.argv) <= 1:
        sys.exit(__doc__)
    main(*sys.argv[1:])
