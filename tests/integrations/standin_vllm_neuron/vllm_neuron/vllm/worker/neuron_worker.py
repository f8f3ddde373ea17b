from vllm.plugins import load_general_plugins
from vllm.registry import ModelRegistry


class NeuronWorker:
    """One a rank; here all of them live in this process."""

    def __init__(self, vllm_config, rank=0, world_size=1):
        load_general_plugins()
        from vllm_neuron.model.registry import get_models

        for arch, cls in get_models():
            ModelRegistry.register_model(arch, cls)
        self.vllm_config, self.rank, self.world_size = vllm_config, rank, world_size

    def load_model(self):
        from vllm_neuron.vllm.worker.neuron_model_runner import NeuronModelRunner

        runner = NeuronModelRunner(self.vllm_config, self.rank, self.world_size)
        runner.load_model()
        return runner
