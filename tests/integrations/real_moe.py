"""Experts on the fused layers of the real NxD Inference: every rank, expert and row, read as a device does.

The reference is a float32 twin of each checkpoint, converted and sharded by the same code without quantization.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest
import torch

from neuron_fp8_loader import OptionError
from tests.integrations import contributed, moe_checkpoints
from tests.integrations.contributed import application
from tests.integrations.real_cases import FP8, H
from tests.support import ieee_e4m3, sqnr

TYPES: dict[str, dict[str, Any]] = {
    "expert_wise": {"quantization_type": "expert_wise_per_channel_symmetric"},
    "blockwise": {
        "quantization_type": "blockwise_symmetric",
        "quantization_block_axis": [1, 2],
        "quantization_block_size": [128, 128],
    },
    "per_channel": {"quantization_type": "per_channel_symmetric"},
    "per_tensor": {"quantization_type": "per_tensor_symmetric"},
}
MX_BLOCKS = {**TYPES["blockwise"], "quantization_block_size": [32, 1]}
Ranks = list[dict[str, torch.Tensor]]


@functools.cache
def checkpoint(family: str, form: str, stack: bool = False) -> tuple[Path, Path]:
    return moe_checkpoints.write(Path(tempfile.mkdtemp()), family, form, stack=stack)


@functools.cache
def scripted(family: str, form: str, kind: str, stack: bool = False) -> Path:
    """The values that a hand-written script's FP8 weights have, as a float32 checkpoint."""
    return moe_checkpoints.write(Path(tempfile.mkdtemp()), family, form, stack=stack, rival=kind)[1]


@functools.cache
def llama4() -> type:
    """The text model as an application of its own; its config has that of the whole model around it."""
    from neuronx_distributed_inference.models.llama4 import modeling_llama4_text as module

    def config(neuron_config: Any, load_config: Any, **more: Any) -> Any:
        return module.LlamaInferenceConfig(neuron_config, load_config=load_config, **more).text_config

    config.get_neuron_config_cls = module.LlamaInferenceConfig.get_neuron_config_cls  # type: ignore[attr-defined]
    body = {"get_config_cls": classmethod(lambda cls: config), "__module__": module.__name__}
    return type("Llama4Text", (module.NeuronLlama4TextForCausalLM,), body)


def shards(family: str, path: Path, tp: int, **given: Any) -> Ranks:
    import families

    cls = llama4() if family == "llama4" else application(family) if family in contributed.MODELS else None
    given = {"fp8_rescale": True, **given}
    if family in contributed.MODELS:
        given["config_kwargs"] = json.loads((path / "config.json").read_text())
    with patch("gc.collect"):  # some conversions call it; with all that is imported here, it takes longer than they do
        ranks: Ranks = families.shards(family, path, tp, cls=cls, **given)
    return ranks


@functools.cache
def twin(family: str, path: Path, tp: int) -> Ranks:
    return shards(family, path, tp, quantized=False, torch_dtype="float32", fp8_rescale=False)


def spread(rank: Mapping[str, torch.Tensor], name: str) -> np.ndarray:
    """A weight's scale, of one value an output row, a block or for all, as float64 of the weight's shape."""
    weight, scale = rank[name], rank[name.removesuffix("weight") + "scale"]
    assert scale.dtype == torch.float32
    whole = scale.double().numpy()
    if whole.ndim == weight.dim():
        for axis, size in enumerate(weight.shape):
            assert size % whole.shape[axis] == 0
            whole = whole.repeat(size // whole.shape[axis], axis)
    return whole


def values(rank: Mapping[str, torch.Tensor], name: str) -> np.ndarray:
    """float64 weight x scale, its bytes read as IEEE e4m3."""
    return ieee_e4m3(rank[name]) * spread(rank, name)


def worst(ranks: Ranks, twins: Ranks) -> dict[str, float]:
    """The least SQNR in dB of any rank, expert and output row, by the name of the weight."""
    found: dict[str, float] = {}
    for rank, other in zip(ranks, twins, strict=True):
        assert {name for name in rank if not name.endswith("scale")} == set(other)
        for name, weight in rank.items():
            if weight.dtype != FP8:
                continue
            got, want = values(rank, name), other[name].double().numpy()
            if got.ndim == 3:  # [experts, in, out]
                got, want = (a.transpose(0, 2, 1).reshape(-1, a.shape[1]) for a in (got, want))
            assert got.shape == want.shape
            assert np.isfinite(got).all()
            noise, signal = (np.square(a).sum(axis=1) for a in (got - want, want))
            noisy = noise > 0
            dB = 10 * np.log10(np.maximum(signal[noisy], np.finfo(np.float64).tiny) / noise[noisy])
            found[name] = min(found.get(name, np.inf), dB.min(initial=np.inf))
    return found


def misrounded(ranks: Ranks, twins: Ranks) -> dict[str, int]:
    """How many codes are further from value / scale than another code, by the name of the weight.

    Codes are rounded to the nearest when blocks become rows, and when they are halved. A scale that is some percent
    off leaves the dB of a row as they are, but not its codes the nearest.
    """
    found: dict[str, int] = {}
    for rank, other in zip(ranks, twins, strict=True):
        for name in (n for n, t in rank.items() if t.dtype == FP8):
            want, scale, got = other[name].double().numpy(), spread(rank, name), ieee_e4m3(rank[name])
            exact = np.divide(
                want, scale, out=np.zeros_like(want), where=want != 0
            )  # heads of zeros have scales of zero
            nearest = exact.astype(np.float32).astype(ml_dtypes.float8_e4m3).astype(np.float64)
            further = np.abs(got - exact) > np.abs(nearest - exact) * (1 + 1e-5)
            found[name] = found.get(name, 0) + int(further.sum())
    return found


def whole(ranks: Ranks, twins: Ranks, names: Iterable[str]) -> dict[str, float]:
    """The SQNR in dB of a tensor over all ranks, FP8 as a device reads it, else as it is."""

    def of(rank: Mapping[str, torch.Tensor], name: str) -> np.ndarray:
        return (values(rank, name) if rank[name].dtype == FP8 else rank[name].double().numpy()).ravel()

    pairs = {name: [(of(t, name), of(r, name)) for r, t in zip(ranks, twins, strict=True)] for name in names}
    return {name: sqnr(*(np.concatenate(side) for side in zip(*both, strict=True))) for name, both in pairs.items()}


def check(ranks: Ranks, twins: Ranks, *, experts: float, others: float) -> None:
    """The least dB that every row must reach."""
    found = worst(ranks, twins)
    assert sum(".expert_mlps." in name for name in found) == 4
    assert sum(".self_attn." in name for name in found) == 8
    for name, least in found.items():
        assert least > (experts if ".expert_mlps." in name else others), (name, least)


# halving rounds values below 2^-6 only; requantizing rounds every value once more
HALVED, REQUANTIZED = 50.0, 25.0


@pytest.mark.parametrize(
    ("family", "form", "tp"),
    [
        ("qwen3_moe", "channel", 1),
        ("qwen3_moe", "channel", 4),
        ("qwen3_moe", "block", 2),
        ("mixtral", "channel", 2),
        ("mixtral", "tensor", 4),
        ("mixtral", "mx", 1),
    ],
)
def test_expert_wise(family: str, form: str, tp: int) -> None:
    fp8, plain = checkpoint(family, form)
    ranks = shards(family, fp8, tp, **TYPES["expert_wise"])
    least = HALVED if form in ("channel", "tensor") else REQUANTIZED
    check(ranks, twin(family, plain, tp), experts=least, others=least)
    for rank in ranks:
        for name in (n for n in rank if n.endswith("mlp_op.gate_up_proj.weight")):
            experts, _, out = rank[name].shape
            assert rank[name.replace("weight", "scale")].shape == (experts, 1, out)


@pytest.mark.parametrize(
    ("family", "form", "tp"),
    [
        ("qwen3_moe", "block", 1),
        ("qwen3_moe", "block", 4),  # a rank has half a block
        ("mixtral", "block", 2),
        ("mixtral", "tensor", 2),
        ("mixtral", "mx", 4),
    ],
)
def test_blockwise(family: str, form: str, tp: int) -> None:
    fp8, plain = checkpoint(family, form)
    given = MX_BLOCKS if form == "mx" else TYPES["blockwise"]
    ranks = shards(family, fp8, tp, **given)
    attention = HALVED if form == "tensor" else REQUANTIZED
    check(ranks, twin(family, plain, tp), experts=HALVED, others=attention)


@pytest.mark.parametrize(
    ("form", "stack", "kind", "tp"),
    [
        ("channel", True, "expert_wise", 2),  # FBGEMM
        ("channel", False, "expert_wise", 4),
        ("block", False, "blockwise", 2),
        ("block", True, "blockwise", 4),
        ("block", True, "expert_wise", 2),
    ],
)
def test_llama4(form: str, stack: bool, kind: str, tp: int) -> None:
    """Its shared experts, which NxD does not quantize, come as bfloat16."""
    fp8, plain = checkpoint("llama4", form, stack)
    ranks, twins = shards("llama4", fp8, tp, **TYPES[kind]), twin("llama4", plain, tp)
    experts = REQUANTIZED if (form, kind) == ("block", "expert_wise") else HALVED
    check(ranks, twins, experts=experts, others=HALVED if form == "channel" else REQUANTIZED)
    name = "layers.0.feed_forward.moe.shared_experts.up_proj.weight"
    for rank, other in zip(ranks, twins, strict=True):
        assert torch.equal(rank[name], other[name].bfloat16())


@pytest.mark.parametrize("stack", [True, False])
def test_llama4_experts_as_bfloat16(stack: bool) -> None:
    """The list names ``.moe.`` paths, which no name in the checkpoint has."""
    fp8, plain = checkpoint("llama4", "channel", stack)
    ranks = shards("llama4", fp8, 2, fp8_rescale={"dequantize": ["*.experts.*"]}, **TYPES["expert_wise"])
    for rank, other in zip(ranks, twin("llama4", plain, 2), strict=True):
        for name in (n for n in other if ".mlp_op." in n):
            assert torch.equal(rank[name], other[name].bfloat16())
            assert name.replace("weight", "scale") not in rank


def test_one_scale_for_all_experts_where_asked_for() -> None:
    fp8, plain = checkpoint("qwen3_moe", "tensor")
    ranks = shards("qwen3_moe", fp8, 2, **TYPES["per_channel"])
    assert ranks[0]["layers.0.mlp.expert_mlps.mlp_op.down_proj.scale"].shape == (1, 1, 256)
    found = worst(ranks, twin("qwen3_moe", plain, 2))
    # experts whose scales lie 2^10 apart share one: the smaller ones lose what the format cannot hold
    assert min(least for name, least in found.items() if "self_attn" in name) > HALVED
    for name in (n for n in found if "expert_mlps" in n):
        got, want = (np.concatenate([a[k] for k in range(4)]) for a in (values(ranks[0], name), _twin(plain, name)))
        assert sqnr(want, got) > REQUANTIZED


def _twin(plain: Path, name: str) -> np.ndarray:
    return twin("qwen3_moe", plain, 2)[0][name].double().numpy()


@pytest.mark.parametrize(("form", "kind"), [("channel", "blockwise"), ("mx", "blockwise"), ("tensor", "per_tensor")])
def test_what_a_type_cannot_hold_is_refused_in_words(form: str, kind: str) -> None:
    fp8, _ = checkpoint("mixtral", form)
    with pytest.raises(OptionError, match="expert_wise_per_channel_symmetric") as error:
        shards("mixtral", fp8, 1, **TYPES[kind])
    assert "mlp_op" in str(error.value)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_an_assertion_of_a_model_about_something_else_passes(family: str) -> None:
    with pytest.raises(AssertionError, match="Only GLU MLP is supported"):
        shards(family, checkpoint(family, "channel")[0], 1, **TYPES["expert_wise"], glu_mlp=False)


def test_assertions_about_scales_are_said_in_words(tmp_path: Path) -> None:
    given = {"quantization_type": "blockwise_symmetric", "quantization_block_size": [128, 128]}
    axes = "quantization_block_axis"
    with pytest.raises(OptionError, match=rf"For weight shape .*per_channel_symmetric.*{axes}=\[1, 2\]"):
        shards("mixtral", checkpoint("mixtral", "block")[0], 1, **given, quantization_block_axis=[0, 1])
    H.make_tiny_checkpoint(tmp_path, flavour="block", kv_heads=4)
    with pytest.raises(OptionError, match=r"no text.*per_channel_symmetric"):
        shards("llama", tmp_path, 1, **given, quantization_block_axis=[0, 1])


def test_the_comparison_sees_one_scale_in_the_place_of_another() -> None:
    fp8, plain = checkpoint("mixtral", "channel")
    ranks, twins = shards("mixtral", fp8, 2, **TYPES["expert_wise"]), twin("mixtral", plain, 2)
    name = "layers.1.mlp.expert_mlps.mlp_op.down_proj.scale"
    ranks[1][name] = ranks[1][name][[1, 0, 2, 3]]
    with pytest.raises(AssertionError, match=r"layers\.1\.mlp\.expert_mlps\.mlp_op\.down_proj"):
        check(ranks, twins, experts=HALVED, others=HALVED)


def test_what_is_sharded_fits_the_model_that_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    import families

    from neuron_fp8_loader.integrations.modules import modules_of

    fp8, _ = checkpoint("qwen3_moe", "block")
    ranks = shards("qwen3_moe", fp8, 4, **TYPES["blockwise"])
    given = {"tp_degree": 4, "on_cpu": False, "torch_dtype": "bfloat16", **TYPES["blockwise"]}
    app = families.build("qwen3_moe", fp8, fp8_rescale=True, **given)
    monkeypatch.setenv("NXD_CPU_MODE", "0")  # as where there is a device; else NxD wants real process groups
    modules = modules_of(app)
    assert modules is not None
    assert len(modules.shapes) == 12
    for path, (weight, scale) in modules.shapes.items():
        for rank in ranks:
            assert tuple(rank[f"{path}.weight"].shape) == weight, path
            assert tuple(rank[f"{path}.scale"].shape) == scale, path
