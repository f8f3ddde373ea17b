import torch
from libtorch_neuronx_lite.compile.platform import get_platform_target
from vllm.config import set_current_vllm_config
from vllm.registry import ModelRegistry

from vllm_neuron import parallel

UNSAFE_FLAG = "--experimental-unsafe-fp8e4m3fn-as-fp8e4m3"


class NeuronModelRunner:
    def __init__(self, vllm_config, rank, world_size):
        self.vllm_config, self.device = vllm_config, torch.device("cpu")
        self.neuron_config = dict(vllm_config.additional_config.get("neuron_config", {}))
        parallel.rank, parallel.world_size = rank, world_size

    @property
    def compiler_args(self):
        fp8 = (
            self.vllm_config.cache_config.cache_dtype in ("fp8", "fp8_e4m3")
            or self.vllm_config.model_config.quantization == "modelopt"
            or self.neuron_config.get("quantization") == "fp8"
        )
        return [UNSAFE_FLAG] if fp8 and get_platform_target() not in ("trn3", "trn3pre") else []

    def load_model(self):
        model_config = self.vllm_config.model_config
        model_cls, _ = ModelRegistry.resolve_model_cls(model_config.architecture)
        with set_current_vllm_config(self.vllm_config):
            with torch.device("meta"):
                self.model = model_cls.from_configs(model_config.hf_config, self.neuron_config)
            self.model.load_weights(model_config.model, self.device, self.vllm_config.load_config.download_dir)
        self.model = self.model.to(self.device)
