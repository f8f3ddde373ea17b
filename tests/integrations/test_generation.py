"""Models with NxD's fused kernel for token generation, on a stand-in of its module."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from neuron_fp8_loader import OptionError
from tests.integrations.apps import settings
from tests.integrations.checkpoints import state_dict, write
from tests.integrations.conftest import PACKAGE, Standin


class Experts(torch.nn.Module):
    def __init__(self, shape: tuple[int, ...], scale: tuple[int, ...] | None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(shape, device="meta"))
        if scale is not None:
            self.scale = torch.nn.Parameter(torch.empty(scale, device="meta"))


class MoEFusedTKG(torch.nn.Module):
    """As NxD's: set, the flag decides; else the device, the batch and shared experts (here: none)."""

    def __init__(self, enabled: bool | None, quantized: bool, scales: list[tuple[int, ...] | None]) -> None:
        super().__init__()
        self.config = SimpleNamespace(quantized=quantized, moe_fused_kernel_enabled=enabled)
        self.sequence_dimension, self.hidden_size = 1, 32
        gate_up, down = Experts((4, 32, 64), scales[0]), Experts((4, 32, 32), scales[1])
        self.expert_mlps = torch.nn.ModuleDict(
            {"mlp_op": torch.nn.ModuleDict({"gate_up_proj": gate_up, "down_proj": down})}
        )

    def _can_use_nki_kernel(self, kernel: str, hidden_states: torch.Tensor) -> bool:
        assert kernel == "moe_fused"
        enabled = self.config.moe_fused_kernel_enabled
        if enabled is not None:
            return enabled
        return hidden_states.device.type != "cpu" and hidden_states.shape[0] <= 64


ROWS: list[tuple[int, ...] | None] = [(4, 1, 64), (4, 1, 32)]


def build(enabled: Standin, path: str, kernel: MoEFusedTKG, prefill: bool = False, **given: Any) -> None:
    wrapper = importlib.import_module(f"{PACKAGE}.models.model_wrapper")
    neuron_config = enabled.config.NeuronConfig(**settings(path, **given))
    neuron_config.is_prefill_stage = prefill
    neuron_config.batch_size = given.get("batch_size", 1)
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"moe_fused_tkg": kernel})})
    instance = wrapper.DecoderModelInstance(lambda config: model, SimpleNamespace(neuron_config=neuron_config))
    instance.load_module()
    assert instance.module is model


def test_experts_without_scales(enabled: Standin, tmp_path: Path) -> None:
    path = write(tmp_path, state_dict())
    for flag in (True, None):
        for scales in ([None, None], [ROWS[0], None]):
            with pytest.raises(OptionError, match=rf"enabled={flag}.*mlp_op\.\w+ is not quantized and has none"):
                build(enabled, path, MoEFusedTKG(flag, True, scales))
    build(enabled, path, MoEFusedTKG(True, True, ROWS))
    build(enabled, path, MoEFusedTKG(False, True, [None, None]))
    build(enabled, path, MoEFusedTKG(True, False, [None, None]))
    build(enabled, path, MoEFusedTKG(True, True, [None, None]), prefill=True)
    build(enabled, path, MoEFusedTKG(True, True, [None, None]), fp8_rescale=False)
    build(enabled, path, MoEFusedTKG(None, True, [None, None]), batch_size=65)
    unknown = MoEFusedTKG(True, True, [None, None])
    unknown._can_use_nki_kernel = None  # type: ignore[assignment,method-assign]
    build(enabled, path, unknown)


def test_scales_that_are_no_rows(enabled: Standin, tmp_path: Path) -> None:
    path = write(tmp_path, state_dict())
    for scales in ([(4, 2, 4), (4, 2, 2)], [(1, 1, 64), (1, 1, 32)], [ROWS[0], (4, 2, 2)]):
        with pytest.raises(OptionError, match=r"would misread .*expert_wise_per_channel_symmetric"):
            build(enabled, path, MoEFusedTKG(None, True, scales))
        build(enabled, path, MoEFusedTKG(False, True, scales))
    build(enabled, path, MoEFusedTKG(True, True, [(1, 1, 1), (1,)]))  # GLM-5.2's kernel spreads one scale
