import importlib
import json
import logging
import os


def plain(value):
    """As NxD Inference writes a config: classes by name, objects by their attributes, all else as it is."""
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    if type(value) is list:
        return [plain(item) for item in value]
    if isinstance(value, type):
        return {"__module__": value.__module__, "__name__": value.__name__}
    if hasattr(value, "__dict__"):
        return {key: plain(item) for key, item in vars(value).items()}
    return value


class NeuronConfig:
    def __init__(self, **kwargs) -> None:
        self.tp_degree = kwargs.pop("tp_degree", 1)
        self.quantized = kwargs.pop("quantized", False)
        self.quantized_checkpoints_path = kwargs.pop("quantized_checkpoints_path", None)
        self.quantization_type = kwargs.pop("quantization_type", "per_tensor_symmetric")
        self.quantization_dtype = kwargs.pop("quantization_dtype", "int8")
        self.quantization_block_axis = kwargs.pop("quantization_block_axis", None)
        self.quantization_block_size = kwargs.pop("quantization_block_size", None)
        self.modules_to_not_convert = kwargs.pop("modules_to_not_convert", None)
        self.enable_fused_speculation = kwargs.pop("enable_fused_speculation", False)
        self.quantized_mlp_kernel_enabled = kwargs.pop("quantized_mlp_kernel_enabled", False)
        self.activation_quantization_type = kwargs.pop("activation_quantization_type", None)
        self.qkv_kernel_enabled = kwargs.pop("qkv_kernel_enabled", False)
        self.save_sharded_checkpoint = kwargs.pop("save_sharded_checkpoint", False)
        if self.quantized and self.qkv_kernel_enabled:
            assert self.modules_to_not_convert, "Could not find modules_to_not_convert for quantized model."
        if kwargs:
            logging.warning("NeuronConfig init: Unexpected keyword arguments: %s", kwargs)

    def is_mlp_quantized(self):
        return self.quantized_mlp_kernel_enabled or self.activation_quantization_type


class MultimodalVisionNeuronConfig(NeuronConfig):
    def __init__(self, **kwargs) -> None:
        self.skip_vision = kwargs.pop("skip_vision", False)
        super().__init__(**kwargs)


class MoENeuronConfig(NeuronConfig):
    def __init__(self, capacity_factor=None, glu_mlp=True, **kwargs) -> None:
        self.hybrid_sharding_config = kwargs.pop("hybrid_sharding_config", None)
        self.capacity_factor = capacity_factor
        self.glu_mlp = glu_mlp
        super().__init__(**kwargs)


class InferenceConfig:
    def __init__(self, neuron_config, fused_spec_config=None, load_config=None, metadata=None, **kwargs):
        self.neuron_config = neuron_config
        self.fused_spec_config = fused_spec_config
        if load_config is not None:
            load_config(self)
        self.metadata = metadata
        for key, value in kwargs.items():
            setattr(self, key, value)

    def save(self, model_path):
        os.makedirs(model_path, exist_ok=True)
        with open(os.path.join(model_path, "neuron_config.json"), "w", encoding="utf-8") as file:
            json.dump(plain(self), file, indent=2, sort_keys=True)

    @classmethod
    def load(cls, model_path, **kwargs):
        with open(os.path.join(model_path, "neuron_config.json"), encoding="utf-8") as file:
            values = {**json.load(file), **kwargs}
        values["neuron_config"] = cls.get_neuron_config_cls()(**values["neuron_config"])
        fused = values.get("fused_spec_config")
        if fused:
            draft = fused["draft_config"]
            draft["neuron_config"] = cls.get_neuron_config_cls()(**draft["neuron_config"])
            fused["draft_config"] = cls(**draft)
            worker = fused["worker_cls"]
            fused["worker_cls"] = getattr(importlib.import_module(worker["__module__"]), worker["__name__"])
            values["fused_spec_config"] = FusedSpecNeuronConfig(**fused)
        return cls(**values)

    @classmethod
    def get_neuron_config_cls(cls):
        return NeuronConfig


class FusedSpecNeuronConfig:
    def __init__(self, worker_cls, draft_config=None, draft_model_path=None, draft_model_cls=None) -> None:
        self.worker_cls = worker_cls
        self.draft_model_cls = draft_model_cls
        self.draft_config = draft_config
        self.draft_model_path = draft_model_path
