"""The vLLM Neuron plugin reads FP8 weights as bfloat16: every slice equals the float64 product rounded once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch

from neuron_fp8_loader import OptionError, PlanError, WeightError, plan_checkpoint
from neuron_fp8_loader.integrations.vllm_neuron.flag import ENV
from neuron_fp8_loader.plan import Plan
from tests.integrations.vllm_neuron_standin import Hub, Plugin
from tests.oracle import bf16_bits, bf16_reference, expanded, granularity_of, to_bf16
from tests.support import REAL, halved, random_codes, same_bytes, save, save_shards, shared

BF16 = torch.bfloat16


def references(plan: Plan) -> dict[str, np.ndarray]:
    def tensor(name: str) -> torch.Tensor:
        with safetensors.safe_open(plan.tensors[name].file, "pt") as file:
            return file.get_tensor(name)

    return {p.weight: bf16_reference(tensor(p.weight), tensor(p.scale), granularity_of(p)) for p in plan.pairs}


def sharded(whole: np.ndarray, dim: int, size: int, rank: int) -> np.ndarray:
    """One rank's part, with zeros where the tensor has ended."""
    part = np.take(whole, range(min(rank * size, whole.shape[dim]), min((rank + 1) * size, whole.shape[dim])), dim)
    widths = [(0, 0)] * whole.ndim
    widths[dim] = (0, size - part.shape[dim])
    return np.pad(part, widths)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", REAL)
def test_real_checkpoints(plugin: Plugin, monkeypatch: pytest.MonkeyPatch, name: str, tp: int) -> None:
    """Column- and row-parallel, stored transposed, padded, and q, k and v in one, through the plugin's own loaders."""
    monkeypatch.setenv(ENV, "1")
    plugin.module("vllm.plugins").load_general_plugins()
    plan = plan_checkpoint(shared(name))
    whole = references(plan)
    assert bool(whole) == (name not in ("ct_int8_w8a8", "ct_nvfp4"))
    for rank in {tp // 2, tp - 1}:  # one inside, and the one that is padded
        check_rank(plugin, plan, whole, tp, rank)


def check_rank(plugin: Plugin, plan: Plan, whole: dict[str, np.ndarray], tp: int, rank: int) -> None:
    loaders = plugin.module("vllm_neuron.utils.weight_loader")
    parameters: dict[str, Any] = {}
    expected: dict[str, np.ndarray] = {}
    for number, (weight, value) in enumerate(whole.items()):
        for dim in (value.ndim - 2, value.ndim - 1):
            size = -(-value.shape[dim] // tp // 32) * 32 + 32 * (number % 2)
            loader = loaders.sharding_weight_loader(dim, size, tp, pad_shard=True)
            parameters[f"{number}_{dim}"] = (BF16, loader, weight)
            expected[f"{number}_{dim}"] = sharded(value, dim, size, rank)
        if value.ndim == 2:
            size = value.shape[0] // tp
            loader = loaders.sharding_weight_loader(1, size, tp, is_storage_transposed=True)
            parameters[f"{number}_t"] = (BF16, loader, weight)
            expected[f"{number}_t"] = sharded(value, 0, size, rank).T
        if weight.endswith("q_proj.weight"):
            keys = [weight.replace("q_proj", f"{m}_proj") for m in "qkv"]
            sizes = [whole[key].shape[0] // tp for key in keys]
            hidden = value.shape[1] + 64
            loader = loaders.fused_qkv_weight_loader(
                sizes[0], sizes[1], 1, tp, is_storage_transposed=True,
                padded_hidden_size=hidden, unpadded_hidden_size=value.shape[1],
            )  # fmt: skip
            parameters[f"{number}_qkv"] = (BF16, loader, keys)
            parts = [sharded(whole[key], 0, size, rank).T for key, size in zip(keys, sizes, strict=True)]
            expected[f"{number}_qkv"] = np.pad(np.concatenate(parts, axis=1), ((0, 64), (0, 0)))
    result = plugin.read(plan.source, parameters, tp=tp, rank=rank)
    for parameter, value in expected.items():
        np.testing.assert_array_equal(bf16_bits(result.state_dict[parameter]), value, err_msg=parameter)
    assert not {p.scale for p in plan.pairs} & set(result.unexpected_keys)
    assert result.missing_keys == []


@pytest.mark.parametrize("platform", ["trn2", "trn3"])
@pytest.mark.parametrize("by", ["name", "environment"])
@pytest.mark.parametrize("name", ["hf_fp8_block", "ct_fp8_dynamic_moe", "derived_split_shards", "ct_fp8_dynamic"])
def test_a_model_from_config_to_parameters(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, name: str, by: str, platform: str
) -> None:
    """The one flag through vLLM's gates, on both platforms; the graph is the plain bfloat16 one."""
    if json.loads((shared(name) / "config.json").read_text())["num_attention_heads"] % 2:
        pytest.skip("this one, cut, has an odd number of heads")
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", platform)
    if by == "environment":
        monkeypatch.setenv(ENV, "1")
    config = plugin.configure(shared(name), quantization="neuron_fp8" if by == "name" else None)
    assert config.model_config.quantization == "neuron_fp8"
    assert not hasattr(config.model_config.hf_config, "quantization_config")
    runner = plugin.worker(config, 1, 2).load_model()
    assert runner.compiler_args == []
    whole = references(plan_checkpoint(shared(name)))
    o = whole["model.layers.1.self_attn.o_proj.weight"]
    got = runner.model.model.layers[1].self_attn.o_proj_weight
    np.testing.assert_array_equal(bf16_bits(got.data), o[:, o.shape[1] // 2 :].T)
    if "moe" in name:
        keys = [k for k in whole if "layers.0.mlp.experts" in k and k.endswith("down_proj.weight")]
        down = np.stack([whole[k] for k in sorted(keys, key=lambda k: int(k.split(".")[5]))])
        got = runner.model.model.layers[0].mlp.down_proj
        np.testing.assert_array_equal(bf16_bits(got.data), down[..., down.shape[-1] // 2 :])
    assert not [key for key in runner.model.result.unexpected_keys if "scale" in key]


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return random_codes((64, 96), seed), torch.from_numpy(rng.uniform(0.01, 1, (64, 1)).astype(np.float32))


def apart(directory: Path) -> dict[str, np.ndarray]:
    """A checkpoint of three files whose scales lie in the last one, the weights in the first; and what to read."""
    weights = {f"{n}.weight": pair(seed)[0] for seed, n in enumerate("ab")}
    scales = {f"{n}.weight_scale": pair(seed)[1] for seed, n in enumerate("ab")}
    directory.mkdir()
    save_shards(directory, weights, {"norm.weight": torch.ones(4, dtype=BF16)}, scales, index=False)
    return {f"{n}.weight": bf16_reference(*pair(seed), "row") for seed, n in enumerate("ab")}


def columns(plugin: Plugin) -> dict[str, Any]:
    """As a model has them: two weights, and a norm."""
    loader = plugin.module("vllm_neuron.utils.weight_loader").SafetensorsWeightLoader()
    return {n[0]: (BF16, loader, n) for n in ("a.weight", "b.weight", "norm.weight")}


def test_files_come_one_by_one(plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub, without an index: an FP8 weight waits for the file of its scale, other parameters do not."""
    expected = apart(tmp_path / "remote")
    monkeypatch.setenv(ENV, "1")
    plugin.module("vllm.plugins").load_general_plugins()
    hub = Hub(tmp_path / "remote", tmp_path / "cache", plugin)
    order: list[str] = []
    checkpoint = plugin.checkpoints.SafetensorsCheckpoint
    process = checkpoint._process_param

    def watched(self: Any, name: str, *args: Any) -> None:
        order.append(f"{name} with {len(self._open_safetensor_files)} files")
        process(self, name, *args)
        if name == "n":
            hub.last_may_come.set()

    monkeypatch.setattr(checkpoint, "_process_param", watched)
    result = plugin.read("org/model", columns(plugin))
    for name, value in expected.items():
        np.testing.assert_array_equal(bf16_bits(result.state_dict[name[0]]), value)
    assert sorted(order[1:]) == ["a with 3 files", "b with 3 files"]
    assert order[0] == "n with 2 files"
    assert hub.downloaded == sorted(f.name for f in (tmp_path / "remote").iterdir())


def test_the_index_is_incomplete_at_first(plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a local directory all files are there: the weight is read as soon as the plugin sees it, before its scale."""
    expected = apart(tmp_path / "ckpt")
    monkeypatch.setenv(ENV, "1")
    plugin.module("vllm.plugins").load_general_plugins()
    checkpoint = plugin.checkpoints.SafetensorsCheckpoint(str(tmp_path / "ckpt"))
    checkpoint._open("model-00001-of-00003.safetensors")
    assert "a.weight" in checkpoint._tensor_name_to_file
    assert "a.weight_scale" in checkpoint._tensor_name_to_file  # known, though not listed
    assert list(checkpoint._tensor_name_to_file) == ["a.weight", "b.weight"]
    np.testing.assert_array_equal(bf16_bits(checkpoint._get_slice("a.weight")[:]), expected["a.weight"])


def test_four_threads_at_once(plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from neuron_fp8_loader.integrations.vllm_neuron import reader

    expected = apart(tmp_path / "ckpt")
    monkeypatch.setenv(ENV, "1")
    plugin.module("vllm.plugins").load_general_plugins()
    plans: list[object] = []
    make = reader.make_plan
    monkeypatch.setattr(reader, "make_plan", lambda *args: plans.append(args) or make(*args))
    checkpoint = plugin.checkpoints.SafetensorsCheckpoint(str(tmp_path / "ckpt"))
    checkpoint._ensure_indexed()
    jobs = [(n, start) for n in expected for start in range(0, 64, 2)]
    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(lambda job: checkpoint._get_slice(job[0])[job[1] : job[1] + 2], jobs))
    for (name, start), part in zip(jobs, parts, strict=True):
        np.testing.assert_array_equal(bf16_bits(part), expected[name][start : start + 2])
    assert len(plans) == 1


def test_a_loader_that_asks_for_the_scale_gets_both_as_they_are(
    plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, scale = pair()
    save(tmp_path / "model.safetensors", {"a.weight": weight, "a.weight_scale": scale})
    monkeypatch.setenv(ENV, "1")
    plugin.module("vllm.plugins").load_general_plugins()
    loader = plugin.module("vllm_neuron.utils.weight_loader").SafetensorsWeightLoader(
        lambda slices, rank: (slices[0][:].double() * slices[1][:].double()).bfloat16()
    )
    result = plugin.read(tmp_path, {"a": (BF16, loader, ["a.weight", "a.weight_scale"])})
    assert torch.equal(result.state_dict["a"], (weight.double() * scale.double()).bfloat16())


def test_layers_that_take_fp8_by_rows(plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of somebody's own, with a parameter for the scales: both halves of the pair change, whatever it is."""
    weight, scale = pair()
    save(tmp_path / "model.safetensors", {"a.weight": weight, "a.weight_scale": scale})
    monkeypatch.setenv(ENV, "1")
    plugin.module("vllm.plugins").load_general_plugins()
    loader = plugin.module("vllm_neuron.utils.weight_loader").SafetensorsWeightLoader
    packed = loader(lambda slices, rank: slices[0][:].view(torch.int32))
    parameters = {"s": (torch.float32, loader(), "a.weight_scale")}
    for name, dtype, how in (("f", torch.float8_e4m3fn, loader()), ("p", torch.int32, packed)):
        result = plugin.read(tmp_path, {**parameters, name: (dtype, how, "a.weight")}).state_dict
        assert same_bytes(result[name].view(torch.float8_e4m3fn), halved(weight))
        assert torch.equal(result["s"], 2 * scale)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("shape", "grid", "kind", "block"),
    [
        ((257, 401), (3, 4), "float32", 128),
        ((257, 401), (3, 4), "float8_e8m0fnu", 128),
        ((257, 401), (9, 13), "bfloat16", 32),
        ((257, 401), (257, 13), "float8_e8m0fnu", None),
        ((3, 200, 300), (3, 2, 3), "float32", 128),
        ((3, 200, 300), (3, 200, 1), "float32", None),
        ((3, 200, 300), (3,), "float32", None),
        ((257, 401), (), "bfloat16", None),
    ],
    ids=str,
)
def test_ragged_blocks_and_stacked_experts(
    plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], grid: tuple[int, ...],
    kind: str, block: int | None, tp: int,
) -> None:  # fmt: skip
    """No size divides another: ranks begin inside blocks, and the last one is padded."""
    dtype = getattr(torch, kind)
    rng = np.random.default_rng(0)
    drawn = torch.from_numpy(np.asarray(2.0 ** rng.uniform(-9, 0, grid), dtype=np.float32))
    scale = (
        torch.from_numpy(rng.integers(110, 127, grid, dtype=np.uint8)).view(dtype) if dtype.itemsize == 1 else drawn
    )
    save(tmp_path / "model.safetensors", {"a.weight": random_codes(shape), "a.weight_scale": scale.to(dtype)})
    config = {"quant_method": "fp8", "weight_block_size": [block, block]} if block else {}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    monkeypatch.setenv(ENV, "1")
    plugin.module("vllm.plugins").load_general_plugins()
    plan = plan_checkpoint(tmp_path)
    whole = references(plan)
    assert list(whole) == ["a.weight"]
    for rank in range(tp):
        check_rank(plugin, plan, whole, tp, rank)


@pytest.mark.parametrize("shape", [(), (64, 1), (2, 3)], ids=["tensor", "row", "block"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "float8_e5m2"])
def test_other_fp8_formats(
    plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, shape: tuple[int, ...]
) -> None:
    """By their own values (ml_dtypes), times the scale; static FP8 layers, which are for e4m3fn, do not get them."""
    weight = random_codes((64, 96), top=0x7B, dtype=getattr(torch, dtype))
    weight.view(torch.uint8)[weight.view(torch.uint8) == 0x80] = 0  # NaN in one of them
    scale = torch.from_numpy(np.asarray(np.random.default_rng(1).uniform(0.01, 1, shape), dtype=np.float32))
    save(tmp_path / "model.safetensors", {"a.weight": weight, "a.weight_scale": scale})
    blocks = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": blocks} if shape == (2, 3) else {}))
    monkeypatch.setenv(ENV, "1")
    plugin.module("vllm.plugins").load_general_plugins()
    wide = expanded(scale.double().numpy(), (64, 96), {(): "tensor", (64, 1): "row"}.get(shape, "block 32x32"))
    assert wide is not None
    want = to_bf16(weight.view(torch.uint8).numpy().view(getattr(ml_dtypes, dtype)).astype(np.float64) * wide)
    loader = plugin.module("vllm_neuron.utils.weight_loader").sharding_weight_loader(1, 48, 2)
    result = plugin.read(tmp_path, {"a": (BF16, loader, "a.weight")}, tp=2, rank=1)
    np.testing.assert_array_equal(bf16_bits(result.state_dict["a"]), want[:, 48:])
    assert result.unexpected_keys == []
    with pytest.raises(OptionError, match=rf"a\.weight: is {dtype}.*dequantize"):
        plugin.read(tmp_path, {"a": (torch.float8_e4m3fn, loader, "a.weight")}, tp=2)


def test_what_cannot_be_read_is_an_error(plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = pair()
    monkeypatch.setenv(ENV, "1")
    plugin.module("vllm.plugins").load_general_plugins()
    parameters = {"a": columns(plugin)["a"]}
    save(tmp_path / "model.safetensors", {"a.weight": weight})
    with pytest.raises(WeightError, match=r"a\.weight: has no scale.*conventions\.register"):
        plugin.read(tmp_path, parameters)
    monkeypatch.setenv(ENV, '{"unscaled": "dequantize"}')
    assert torch.equal(plugin.read(tmp_path, parameters).state_dict["a"], weight.bfloat16())
    monkeypatch.setenv(ENV, "1")
    save(tmp_path / "model.safetensors", {"a.weight": weight, "a.weight_scale": scale, "a.scale": scale.clone()})
    with pytest.raises(PlanError, match=r"a\.weight: has 2 candidates for its scale"):
        plugin.read(tmp_path, parameters)
    weight.view(torch.uint8)[3, 3] = 0x7F
    save(tmp_path / "model.safetensors", {"a.weight": weight, "a.weight_scale": scale})
    with pytest.raises(WeightError, match=r"a\.weight: 1 NaN codes"):
        plugin.read(tmp_path, parameters)
