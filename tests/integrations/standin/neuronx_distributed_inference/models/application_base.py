import os

import torch
from safetensors.torch import load_file

from neuronx_distributed_inference.modules.checkpoint import load_state_dict, save_state_dict_safetensors


class NeuronApplicationBase(torch.nn.Module):
    _STATE_DICT_MODEL_PREFIX = "model."
    _NEW_STATE_DICT_MODEL_PREFIX = ""
    _FUSED_PREFIX = ""

    def __init__(self, model_path, config=None, neuron_config=None):
        super().__init__()
        self.model_path = model_path
        self.config = config
        self.neuron_config = config.neuron_config
        self.fused_spec_config = config.fused_spec_config

    def checkpoint_loader_fn(self, mmap=False):
        path = self.neuron_config.quantized_checkpoints_path if self.neuron_config.quantized else self.model_path
        if not self.neuron_config.enable_fused_speculation:
            return self.get_state_dict(path, self.config)
        self.__class__._FUSED_PREFIX = "draft_model"
        state_dict = self.get_state_dict(self.fused_spec_config.draft_model_path, self.fused_spec_config.draft_config)
        self.__class__._FUSED_PREFIX = "target_model"
        state_dict.update(self.get_state_dict(path, self.config))
        return state_dict

    @classmethod
    def get_state_dict(cls, model_name_or_path, config):
        if os.path.isdir(model_name_or_path):
            state_dict = load_state_dict(model_name_or_path)
        elif os.path.isfile(model_name_or_path):
            state_dict = torch.load(model_name_or_path)
        else:
            state_dict = cls.load_hf_model(model_name_or_path).state_dict()
        for name in list(state_dict):
            new = name.removeprefix(cls._STATE_DICT_MODEL_PREFIX)
            if new.endswith(".weight_scale"):
                new = new.replace(".weight_scale", ".scale")
            state_dict[new] = state_dict.pop(name)
        state_dict = cls.convert_hf_to_neuron_state_dict(state_dict, config)
        if cls._FUSED_PREFIX:
            state_dict = {f"{cls._FUSED_PREFIX}.{name}": value for name, value in state_dict.items()}
        return state_dict

    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict, config):
        return state_dict

    @classmethod
    def save_quantized_state_dict(cls, model_path, config):
        state_dict = cls.generate_quantized_state_dict(model_path, config)
        save_state_dict_safetensors(state_dict, config.neuron_config.quantized_checkpoints_path)

    @classmethod
    def generate_quantized_state_dict(cls, model_path, config):
        return {"overwritten": torch.zeros(1)}

    @staticmethod
    def load_hf_model(model_path):
        raise NotImplementedError

    def load_weights(self, compiled_model_path):
        """The pre-sharded weights of all ranks."""
        return [
            load_file(os.path.join(compiled_model_path, f"weights/tp{rank}_sharded_checkpoint.safetensors"))
            for rank in range(self.neuron_config.tp_degree)
        ]
