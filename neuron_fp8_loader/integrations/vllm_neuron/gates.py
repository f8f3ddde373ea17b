"""vLLM's gates: a quantization of our name, and what vLLM and the plugin are shown of the checkpoint's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...checkpoint import open_checkpoint
from ...codes.device import needs_rescale
from ...errors import OptionError, Shown
from ...options import Options
from ...plan import Plan, plan_for
from . import flag
from .design import PRESENTED, Design, declares, design_for
from .flag import QUANTIZATION, log

READER = "vllm_neuron.utils.checkpoints"
"""The module through which the plugin reads every tensor."""


def quantization_config(base: Any) -> type:
    """The class behind ``--quantization neuron_fp8``.

    Args:
        base: vLLM's ``QuantizationConfig``. What of it vLLM asks for is answered; no layer is quantized by it, since
            the plugin builds its own layers.
    """

    class NeuronFp8Config(base):  # type: ignore[misc]
        """FP8 weights of any convention, read by neuron_fp8_loader."""

        def __init__(self, config: Any = None) -> None:
            super().__init__()

        @classmethod
        def get_name(cls) -> str:
            return QUANTIZATION

        @classmethod
        def get_supported_act_dtypes(cls) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: Any) -> Any:
            return cls(config)

        @classmethod
        def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: Any, *args: Any, **kw: Any) -> str | None:
            by_environment = user_quant is None and flag.asked_by_user() and declares(hf_quant_cfg) is not None
            return QUANTIZATION if (user_quant == QUANTIZATION or by_environment) and can_read() else None

        def get_quant_method(self, layer: Any, prefix: str) -> None:
            return None

    return NeuronFp8Config


def can_read() -> bool:
    """Is the plugin's reader one that is known, and ours in its place? Imports it: by now vLLM has the plugin."""
    try:
        module = importlib.import_module(READER)
    except Exception as error:
        log.warning("%s cannot be imported (%s); %s does nothing", READER, error, QUANTIZATION)
        return False
    return bool(getattr(getattr(module, "SafetensorsCheckpoint", None), "_neuron_fp8_reads", False))


def check_and_update_config(original: Callable[..., Any], cls: type, vllm_config: Any, *args: Any, **kw: Any) -> Any:
    """``NeuronPlatform.check_and_update_config``: runs before the workers start, and before the plugin looks at the
    quantization."""
    model = getattr(vllm_config, "model_config", None)
    if model is not None:
        _prepare(vllm_config, model)
    return original(cls, vllm_config, *args, **kw)


def _prepare(vllm_config: Any, model: Any) -> None:
    named = getattr(model, "quantization", None) == QUANTIZATION
    if not named:
        flag.tell_workers(False)
    if not named and not flag.asked():
        return
    if not can_read():
        if named:
            raise OptionError(
                f"--quantization {QUANTIZATION}: this version of vllm_neuron reads checkpoints in a way that "
                "neuron_fp8_loader does not know; leave the flag out, or install versions that go together"
            )
        return
    options = flag.options() or Options()
    path, hf_config = str(model.model), model.hf_config
    holders = _holders(hf_config, getattr(model, "hf_text_config", None))
    config = next((c for holder in holders if (c := getattr(holder, "quantization_config", None))), None)
    design = design_for(_architecture(hf_config), _plan(path), config, options, flag.target())
    if design is None:
        if named and config:
            raise OptionError(
                f"--quantization {QUANTIZATION}: {Shown(path)} holds no float8_e4m3fn weights, and its config "
                f"declares {config.get('quant_method') or 'no method'}; leave the flag out"
            )
        return
    _show(holders, design)
    if design.kept and needs_rescale(flag.target()):
        _ask_for_compiler_flag(vllm_config)
    if named:
        flag.tell_workers(True)
    log.info("neuron_fp8_loader: %s: %s", path, design)


def _holders(*configs: Any) -> list[Any]:
    """The config, and that of the text part of a multimodal model."""
    found = [config for config in configs if config is not None]
    found += [text for config in found[:1] if (text := getattr(config, "text_config", None)) is not None]
    return found


def _architecture(hf_config: Any) -> str:
    return str((getattr(hf_config, "architectures", None) or [""])[0])


def _plan(path: str) -> Plan | None:
    """From the headers of a local directory. Where they cannot be read, the plugin's own reading will say why."""
    if not Path(path).is_dir():
        return None
    try:
        return plan_for(open_checkpoint(path))
    except Exception as error:
        log.warning("neuron_fp8_loader: %s: going by its config alone (%s)", path, error)
        return None


def _show(holders: list[Any], design: Design) -> None:
    """The form that the plugin's parser takes, or a checkpoint that is not quantized."""
    for holder in holders:
        for name in ("quantization_config", "compression_config"):
            if getattr(holder, name, None) is not None:
                delattr(holder, name)
    if design.kept:
        holders[0].quantization_config = dict(PRESENTED)


def _ask_for_compiler_flag(vllm_config: Any) -> None:
    """Have the plugin give the compiler --experimental-unsafe-fp8e4m3fn-as-fp8e4m3, as it does for "modelopt"."""
    additional = getattr(vllm_config, "additional_config", None)
    if additional is None:
        additional = vllm_config.additional_config = {}
    if isinstance(additional, dict):
        neuron = additional.setdefault("neuron_config", {})
        if isinstance(neuron, dict) and neuron.get("quantization") is None:
            neuron["quantization"] = "fp8"
