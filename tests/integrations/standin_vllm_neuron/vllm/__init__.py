"""A stand-in of vLLM: plugins, configs, gates, and LLM, which loads every rank in this process."""

from types import SimpleNamespace


class SamplingParams:
    def __init__(self, max_tokens=16):
        self.max_tokens = max_tokens


class LLM:
    loaded: list = []  # noqa: RUF012

    def __init__(self, model, quantization=None, tensor_parallel_size=1, **kwargs):
        from vllm.config import create_engine_config

        self.config = create_engine_config(model, quantization=quantization)
        from vllm_neuron.vllm.worker.neuron_worker import NeuronWorker

        ranks = range(tensor_parallel_size)
        LLM.loaded = [NeuronWorker(self.config, rank, tensor_parallel_size).load_model().model for rank in ranks]

    def generate(self, prompts, sampling_params):
        return [SimpleNamespace(prompt=p, outputs=[SimpleNamespace(text=" (a stand-in)")]) for p in prompts]
