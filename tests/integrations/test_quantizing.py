"""Experts and the other layers of one model take different quantization types."""

from __future__ import annotations

import importlib
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import neuron_fp8_loader
from neuron_fp8_loader import OptionError
from tests.integrations.conftest import PACKAGE, Standin


class Kind(Enum):
    """As NxD's QuantizationType."""

    CHANNEL = "per_channel_symmetric"
    EXPERTS = "expert_wise_per_channel_symmetric"
    BLOCKS = "blockwise_symmetric"


class Linear:
    def __init__(self, *shape: int, stride: int = 1, **share: int) -> None:
        self.weight, self.stride = torch.empty(shape, device="meta"), stride
        self.input_size, self.output_size = shape[-2:] if len(shape) == 3 else shape[::-1]
        vars(self).update(share)


class Fused(Linear):
    pass


class Quantized:
    @classmethod
    def from_float(cls, mod: Any, q_config: dict[str, Any]) -> dict[str, Any]:
        return dict(q_config)


def converted(nxdi: Standin, q_config: dict[str, Any], layers: dict[str, Any], **given: Any) -> dict[str, Any]:
    config = nxdi.config.NeuronConfig(**{"quantized": True, "fp8_rescale": True, **given})
    model = SimpleNamespace(config=SimpleNamespace(neuron_config=config), layers=dict(layers))
    wrapper = importlib.import_module(f"{PACKAGE}.models.model_wrapper")
    wrapper.convert(model, q_config=q_config, inplace=True, mapping={Linear: Quantized, Fused: Quantized})
    return model.layers


BLOCKS = {"quantization_block_axis": [1, 2], "quantization_block_size": [128, 128]}
Q_BLOCKS = {"quantization_type": Kind.BLOCKS, "block_axis": [1, 2], "block_size": [128, 128], "scale_dtype": 1, "x": 2}


def test_experts_by_expert_and_all_else_by_channel(enabled: Standin) -> None:
    q_config = {"quantization_type": Kind.EXPERTS, "quantization_per_channel_axis": None, "x": 1}
    layers = {"q_proj": Linear(64, 32), "experts": Fused(4, 32, 64)}
    got = converted(enabled, q_config, layers, quantization_type="expert_wise_per_channel_symmetric")
    assert got["experts"] == q_config
    assert got["q_proj"] == {**q_config, "quantization_type": Kind.CHANNEL}


def test_blocks_are_for_experts_only(enabled: Standin) -> None:
    layers = {"q_proj": Linear(64, 32), "experts": Fused(4, 256, 512, output_size_per_partition=512, stride=2)}
    got = converted(enabled, Q_BLOCKS, layers, quantization_type="blockwise_symmetric", **BLOCKS)
    assert got["experts"] == Q_BLOCKS
    assert got["q_proj"] == {"quantization_type": Kind.CHANNEL, "x": 2, "quantization_per_channel_axis": None}


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (Fused(4, 256, 2 * 192, output_size_per_partition=2 * 192, stride=2), [128, 64]),  # gate ends within a block
        (Fused(4, 256, 512, output_size_per_partition=2 * 32, stride=2), [128, 32]),  # several ranks share a block
        (Fused(4, 256, 512, input_size_per_partition=64), [64, 128]),
        (Fused(4, 192, 512, input_size_per_partition=96), [32, 128]),
    ],
)
def test_blocks_that_ranks_share_become_smaller(enabled: Standin, layer: Fused, size: list[int]) -> None:
    got = converted(enabled, Q_BLOCKS, {"experts": layer}, quantization_type="blockwise_symmetric", **BLOCKS)
    assert got["experts"]["block_size"] == size


def test_blocks_that_would_be_too_small_are_refused(enabled: Standin) -> None:
    layer = Fused(4, 256, 512, output_size_per_partition=2 * 24, stride=2)
    with pytest.raises(OptionError, match="expert_wise_per_channel_symmetric"):
        converted(enabled, Q_BLOCKS, {"experts": layer}, quantization_type="blockwise_symmetric", **BLOCKS)


class Patched:
    """A quantized layer of a port that takes the scales of gate and up for one run, and a rank's for all experts'."""

    @classmethod
    def from_float(cls, mod: Any, q_config: dict[str, Any]) -> Any:
        weight, scale = torch.nn.Parameter(mod.weight), torch.nn.Parameter(torch.empty(4, 2, 4))
        parallel = {"tensor_model_parallel": True, "partition_dim": 2}
        vars(weight).update(parallel, partition_stride=mod.stride, expert_model_parallel=True, is_prefill=True)
        vars(scale).update(parallel, partition_stride=1)
        return SimpleNamespace(weight=weight, scale=scale)


@pytest.mark.parametrize("flag", [True, False])
def test_scales_are_split_among_ranks_as_their_weights(
    enabled: Standin, monkeypatch: pytest.MonkeyPatch, flag: bool
) -> None:
    monkeypatch.setattr(Quantized, "from_float", Patched.from_float)
    layer = Fused(4, 256, 512, output_size_per_partition=512, stride=2)
    given = {"quantization_type": "blockwise_symmetric", "fp8_rescale": flag, **BLOCKS}
    got = converted(enabled, Q_BLOCKS, {"experts": layer}, **given)
    assert got["experts"].scale.partition_stride == (2 if flag else 1)
    assert getattr(got["experts"].scale, "expert_model_parallel", False) == flag


@pytest.mark.parametrize("given", [{"fp8_rescale": False, **BLOCKS}, {**BLOCKS, "quantization_block_axis": [0, 1]}])
def test_without_the_flag_or_for_two_axes_nothing_changes(enabled: Standin, given: dict[str, Any]) -> None:
    given = {"quantization_type": "blockwise_symmetric", **given}
    assert converted(enabled, Q_BLOCKS, {"q_proj": Linear(64, 32)}, **given)["q_proj"] == Q_BLOCKS


def test_disable_puts_convert_back(nxdi: Standin) -> None:
    wrapper = importlib.import_module(f"{PACKAGE}.models.model_wrapper")
    before = wrapper.convert
    neuron_fp8_loader.enable()
    assert wrapper.convert is not before
    neuron_fp8_loader.disable()
    assert wrapper.convert is before
