"""Configurations and applications of the stand-in, with the flag."""

from __future__ import annotations

from typing import Any

from tests.integrations.conftest import Standin


def settings(path: str, **more: Any) -> dict[str, Any]:
    """What a ``NeuronConfig`` with the flag is given."""
    return {
        "quantized": True,
        "quantized_checkpoints_path": path,
        "quantization_dtype": "f8e4m3",
        "quantization_type": "per_channel_symmetric",
        "fp8_rescale": True,
        **more,
    }


def config_for(nxdi: Standin, path: str, **more: Any) -> Any:
    return nxdi.config.InferenceConfig(nxdi.config.NeuronConfig(**settings(path, **more)))


def app_for(nxdi: Standin, path: str, **more: Any) -> Any:
    return nxdi.application.NeuronApplicationBase(path, config_for(nxdi, path, **more))
