import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

_current = None


def get_current_vllm_config():
    return _current


@contextmanager
def set_current_vllm_config(vllm_config):
    global _current
    _current, before = vllm_config, _current
    try:
        yield
    finally:
        _current = before


def _hf_config(model, overrides):
    """As transformers reads it, with what hf_quant_config.json adds."""
    values = json.loads((Path(model) / "config.json").read_text())
    modelopt = Path(model) / "hf_quant_config.json"
    if "quantization_config" not in values and modelopt.is_file():
        values["quantization_config"] = {"quant_method": "modelopt", **json.loads(modelopt.read_text())}
    values.update(overrides or {})
    if values.get("quantization_config") == {}:
        values["quantization_config"]["quant_method"] = ""
    return SimpleNamespace(**values)


class ModelConfig:
    def __init__(self, model, quantization=None, hf_overrides=None, config_from=None):
        self.model, self.quantization, self.dtype = model, quantization, torch.bfloat16
        self.hf_config = _hf_config(config_from or model, hf_overrides)
        self.hf_text_config = self.hf_config
        self._verify_quantization()

    @property
    def architecture(self):
        return self.hf_config.architectures[0]

    def _verify_quantization(self):
        from vllm.model_executor.layers import quantization as me_quant
        from vllm.platforms import current_platform

        supported = me_quant.QUANTIZATION_METHODS
        quant_cfg = getattr(self.hf_config, "quantization_config", None)
        if quant_cfg is not None:
            quant_method = quant_cfg["quant_method"]
            for name in list(supported):
                method = me_quant.get_quantization_config(name)
                override = method.override_quantization_method(quant_cfg, self.quantization, hf_config=self.hf_config)
                if override is not None:
                    quant_method = self.quantization = override
                    break
            quant_method = quant_method or None
            if self.quantization is None:
                self.quantization = quant_method
            elif self.quantization != quant_method:
                raise ValueError(
                    f"Quantization method specified in the model config ({quant_method}) does not match the "
                    f"quantization method specified in the `quantization` argument ({self.quantization})."
                )
        if self.quantization is not None:
            if self.quantization not in supported:
                raise ValueError(f"Unknown quantization method: {self.quantization}.")
            current_platform.verify_quantization(self.quantization)


class VllmConfig:
    def __init__(self, model_config, additional_config=None, cache_dtype="auto"):
        self.model_config = model_config
        self.additional_config = additional_config or {}
        self.cache_config = SimpleNamespace(cache_dtype=cache_dtype)
        self.load_config = SimpleNamespace(download_dir=None)
        self.quant_config = None
        self.__post_init__()

    def __post_init__(self):
        from vllm.model_executor.layers.quantization import get_quantization_config
        from vllm.platforms import current_platform

        if self.model_config.quantization is not None:
            cls = get_quantization_config(self.model_config.quantization)
            config = getattr(self.model_config.hf_config, "quantization_config", None)
            self.quant_config = cls.from_config(config) if config is not None else cls()
        current_platform.check_and_update_config(self)


def create_engine_config(model, additional_config=None, cache_dtype="auto", **kwargs):
    """EngineArgs.create_engine_config: plugins come first."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return VllmConfig(ModelConfig(model, **kwargs), additional_config, cache_dtype)
