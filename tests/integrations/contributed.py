"""Models contributed to NxD Inference, imported from a checkout: their modules call themselves ``src``."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

MODELS = {  # family: (directory, module, application class)
    "deepseek_v3": ("DeepSeek-V3", "modeling_deepseek", "NeuronDeepseekV3ForCausalLM"),
    "glm_moe_dsa": ("GLM-5.2", "modeling_glm5", "NeuronGLM5ForCausalLM"),
    "qwen3_5_moe": ("Qwen3.5-35B-A3B", "modeling_qwen35", "NeuronQwen35ForCausalLM"),
    "mixtral_contrib": ("Mixtral-8x7B-Instruct-v0.1", "modeling_mixtral", "NeuronMixtralForCausalLM"),
    "minimax_m2": ("MINIMAX_SRC", "modeling_minimax_m2", "NeuronMiniMaxM2ForCausalLM"),  # of a fork: see ``there``
}


def there(family: str) -> bool:
    """Is its source here? MINIMAX_SRC names the folder of the port that holds modeling_minimax_m2.py."""
    return family != "minimax_m2" or bool(os.environ.get("MINIMAX_SRC"))


@functools.cache
def application(family: str) -> type:
    """The application class of a contributed model, read from the checkout that NXDI_SRC names.

    Its config is made as the model's README makes it: from the numbers in config.json, which transformers need not
    know, and for GLM with ``quantized`` as given, which it would switch on.
    """
    if "src" not in sys.modules:
        package = types.ModuleType("src")
        root = Path(os.environ["NXDI_SRC"]) / "contrib" / "models"
        package.__path__ = [
            os.environ[name] if name.endswith("_SRC") else str(root / name / "src")
            for family, (name, _, _) in MODELS.items()
            if there(family)
        ]
        sys.modules["src"] = package
    _, module, name = MODELS[family]
    base = getattr(importlib.import_module(f"src.{module}"), name)

    def config(neuron_config: Any, load_config: Any, **numbers: Any) -> Any:
        quantized = neuron_config.quantized
        made = base.get_config_cls()(neuron_config, **numbers)
        made.neuron_config.quantized = quantized
        return made

    def neuron_config_cls() -> Any:
        from neuronx_distributed_inference.models.config import MoENeuronConfig

        own = base.get_config_cls().get_neuron_config_cls()
        return own if issubclass(own, MoENeuronConfig) else MoENeuronConfig

    config.get_neuron_config_cls = neuron_config_cls  # type: ignore[attr-defined]
    body = {"get_config_cls": classmethod(lambda cls: config), "__module__": base.__module__}
    return type(base.__name__, (base,), body)
