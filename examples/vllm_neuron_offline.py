"""An FP8 model with vLLM and its Neuron plugin that does without NxD Inference (SDK 2.31 and later, Trn2 and Trn3).

The installed package is a vLLM plugin: there is nothing to import or call, and the flag is one word.

python examples/vllm_neuron_offline.py CHECKPOINT [TP_DEGREE]
"""

from __future__ import annotations

import sys


def main(checkpoint: str, tp_degree: str = "4") -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=checkpoint,
        quantization="neuron_fp8",
        tensor_parallel_size=int(tp_degree),
        max_model_len=2048,
        max_num_seqs=1,
    )
    for output in llm.generate(["The capital of France is"], SamplingParams(max_tokens=32)):
        print(output.prompt + output.outputs[0].text)


if __name__ == "__main__":
    if len(sys.argv) <= 1:
        sys.exit(__doc__)
    main(*sys.argv[1:])
