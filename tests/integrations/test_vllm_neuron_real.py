"""Against a checkout of the real plugin, where ``VLLM_NEURON_SRC`` names one: its own loader modules, on a CPU.

They need torch, safetensors and huggingface_hub; the packages around them, and the platform, are stubs.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuron_fp8_loader import WeightError, plan_checkpoint
from neuron_fp8_loader.codes.device import PLATFORM_ENV
from neuron_fp8_loader.integrations import vllm_neuron
from neuron_fp8_loader.integrations.vllm_neuron.flag import ENV, GUARD_ENV
from tests.integrations.test_vllm_neuron_bf16 import references, sharded
from tests.integrations.test_vllm_neuron_static import column, tensors_of
from tests.integrations.vllm_neuron_standin import forget
from tests.oracle import bf16_bits
from tests.support import REAL, halved, same_bytes, shared

SRC = os.environ.get("VLLM_NEURON_SRC", "")
pytestmark = pytest.mark.skipif(not SRC, reason="VLLM_NEURON_SRC is not set")


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Its modules by name, under stubs of the packages that they are in; a process group of one."""
    forget()
    for name in ("", ".utils", ".model", ".model.llama3"):
        package = types.ModuleType(f"vllm_neuron{name}")
        package.__path__ = [str(Path(SRC, "vllm_neuron", *name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, package.__name__, package)
    platform = types.ModuleType("libtorch_neuronx_lite.compile.platform")
    platform.get_platform_target = lambda: os.environ[PLATFORM_ENV]  # type: ignore[attr-defined]
    for name in ("libtorch_neuronx_lite", "libtorch_neuronx_lite.compile"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, platform.__name__, platform)
    monkeypatch.setenv(PLATFORM_ENV, "trn2")
    monkeypatch.delenv(GUARD_ENV, raising=False)
    monkeypatch.setenv(ENV, "1")
    vllm_neuron.enable()
    yield lambda name: importlib.import_module(f"vllm_neuron.{name}")
    vllm_neuron.disable()
    forget()


def load(real: Any, path: Path, parameters: dict[str, Any], tp: int, rank: int, *, pipelined: bool) -> Any:
    model, mappings = torch.nn.Module(), {}
    for name, (dtype, loader, keys) in parameters.items():
        parameter = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        real("utils.weight_loader").set_weight_loader(parameter, loader)
        setattr(model, name, parameter)
        mappings[name] = keys
    checkpoint = real("utils.checkpoints").SafetensorsCheckpoint(str(path))
    if not pipelined:
        return checkpoint.load_sharded(rank, tp, model, mappings, torch.device("cpu"))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        # this one process reads the files of all ranks: as rank 0 of 1 to the page cache, as `rank` to the loaders
        loaders = {n: real("utils.weight_loader").with_rank_override(p[1], rank) for n, p in parameters.items()}
        for name, loader in loaders.items():
            real("utils.weight_loader").set_weight_loader(getattr(model, name), loader)
        return checkpoint.load_sharded_pipelined(0, 1, model, mappings, torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", REAL)
def test_bfloat16(real: Any, name: str, tp: int, pipelined: bool) -> None:
    loaders, rank = real("utils.weight_loader"), tp - 1
    plan = plan_checkpoint(shared(name))
    parameters: dict[str, Any] = {}
    expected: dict[str, np.ndarray] = {}
    for number, (weight, value) in enumerate(references(plan).items()):
        for dim in (value.ndim - 2, value.ndim - 1):
            size = -(-value.shape[dim] // tp // 32) * 32
            loader = loaders.sharding_weight_loader(dim, size, tp, pad_shard=True)
            parameters[f"{number}_{dim}"] = (torch.bfloat16, loader, weight)
            expected[f"{number}_{dim}"] = sharded(value, dim, size, rank)
    result = load(real, shared(name), parameters, tp, rank, pipelined=pipelined)
    for parameter, value in expected.items():
        np.testing.assert_array_equal(bf16_bits(result.state_dict[parameter]), value, err_msg=parameter)
    assert not {p.scale for p in plan.pairs} & set(result.unexpected_keys)


@pytest.mark.parametrize("name", ["modelopt_fp8_kv", "quark_fp8_tensor_kv"])
def test_static_mlp(real: Any, name: str) -> None:
    """Its own loaders for the static layers' MLP, which rescale by 240/448 unless they are kept from it."""
    path, tp = shared(name), 2
    before = tensors_of(path)
    at = "model.layers.0.mlp"
    module = torch.nn.Module()
    for m in ("gate", "up", "down"):
        weight = torch.nn.Parameter(torch.empty(0, dtype=torch.float8_e4m3fn), requires_grad=False)
        setattr(module, f"{m}_proj_weight", weight)
    for buffer in ("gate_weight_scale", "up_weight_scale", "down_weight_scale", "gate_up_input_scale",
                   "down_input_scale"):  # fmt: skip
        module.register_buffer(buffer, torch.empty(0), persistent=False)
    width = before[f"{at}.down_proj.weight"].shape[1] // tp
    static = real("model.llama3.weight_loaders_static_fp8")
    static.attach_mlp_loaders(module, intermediate_size_per_rank=width, mlp_tp_size=tp, mlp_tp_rank=1)
    checkpoint = real("utils.checkpoints").SafetensorsCheckpoint(str(path))
    mappings = {f"{m}_proj_weight": f"{at}.{m}_proj.weight" for m in ("gate", "up", "down")}
    result = checkpoint.load_sharded(1, tp, module, mappings, torch.device("cpu"))
    down = before[f"{at}.down_proj.weight"].view(torch.uint8)[:, width:].T.contiguous().view(torch.float8_e4m3fn)
    assert same_bytes(result.state_dict["down_proj_weight"], halved(down))
    get = real("utils.weight_loader").get_weight_loader
    for buffer, key in (
        ("down_weight_scale", "down_proj.weight_scale"),
        ("down_input_scale", "down_proj.input_scale"),
    ):
        got = get(getattr(module, buffer)).load([checkpoint._get_slice(f"{at}.{key}")], 1)
        assert torch.equal(got, column(before[f"{at}.{key}"], 2))


@pytest.mark.parametrize("pipelined", [False, True])
def test_the_guard(real: Any, monkeypatch: pytest.MonkeyPatch, pipelined: bool) -> None:
    monkeypatch.delenv(ENV)
    loader = real("utils.weight_loader").SafetensorsWeightLoader()
    weight = plan_checkpoint(shared("modelopt_fp8_kv")).pairs[0].weight
    with pytest.raises(WeightError, match="cast without their scales"):
        load(real, shared("modelopt_fp8_kv"), {"w": (torch.bfloat16, loader, weight)}, 1, 0, pipelined=pipelined)
