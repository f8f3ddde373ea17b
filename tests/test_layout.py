"""The shapes that NxD's layers take, from every granularity; and modules returned as bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import bf16_bits, to_bf16
from safetensors.torch import save_file
from support import E8M0_OR_ITS_BYTES, e4m3fn, ieee_e4m3, raw, save_shards, shared, sqnr

from neuron_fp8_loader import (
    CheckpointError,
    OptionError,
    PlanError,
    conventions,
    load_checkpoint,
    load_file,
    load_state_dict,
    rescale_state_dict,
    safe_open,
)

W = "model.layers.0.mlp.up_proj.weight"
S = W + "_scale"


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g) * 120).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("scale_shape", "layout", "expected"),
    [
        ((), "per_tensor", (1,)),
        ((1,), "per_tensor", (1,)),
        ((1, 1), "per_tensor", (1,)),
        ((), "per_channel", (48, 1)),
        ((1, 1), "per_channel", (48, 1)),
        ((48,), "per_channel", (48, 1)),
        ((48, 1), "per_channel", (48, 1)),
        ((), "keep", ()),
        ((48,), "keep", (48,)),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_shapes(scale_shape: tuple[int, ...], layout: str, expected: tuple[int, ...], inplace: bool) -> None:
    w, s = weight(48, 32), torch.rand(scale_shape) + 0.5
    before = e4m3fn(w) * s.double().reshape(-1, 1).numpy()
    sd = {W: w, S: s, "x": torch.ones(2)}
    out = rescale_state_dict(sd, layout=layout, inplace=inplace)
    assert out[S].shape == expected
    assert list(out) == [W, S, "x"]
    assert (out is sd) == inplace
    after = e4m3fn(out[W]) * out[S].double().reshape(-1, 1).numpy()
    assert sqnr(before, after) > 100
    assert np.isfinite(ieee_e4m3(out[W])).all()


@pytest.mark.parametrize("scale_shape", [(48,), (48, 1), (2, 1)])
def test_per_tensor_refuses_to_lose_scales(scale_shape: tuple[int, ...]) -> None:
    rows = 256 if scale_shape == (2, 1) else 48
    with pytest.raises(PlanError, match=r"up_proj\.weight: has one scale per .*per_channel"):
        rescale_state_dict({W: weight(rows, 128), S: torch.ones(scale_shape)}, layout="per_tensor")


def test_unknown_shapes_are_refused_all_at_once() -> None:
    sd = {}
    for n in range(3):
        sd[f"m{n}.weight"], sd[f"m{n}.weight_scale"] = weight(48, 32), torch.ones(7)
    with pytest.raises(PlanError) as caught:
        rescale_state_dict(sd, layout="per_channel")
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("name", "scale_name", "scale_shape", "expected"),
    [
        # Llama 4: [experts, in, out]
        ("experts.gate_up_proj", "experts.gate_up_proj_weight_scale", (), (4, 1, 64)),
        ("experts.gate_up_proj", "experts.gate_up_proj_scale", (4, 1, 64), (4, 1, 64)),
        # transformers: [experts, out, in]
        ("experts.gate_up_proj", "experts.gate_up_proj_scale_inv", (), (4, 32, 1)),
        ("moe.gate.weight", "moe.gate.weight_scale", (4,), (4, 32, 1)),
        ("moe.gate.weight", "moe.gate.weight_scale", (4, 1, 1), (4, 32, 1)),
        ("moe.gate.weight", "moe.gate.weight_scale", (4, 32, 1), (4, 32, 1)),
        ("moe.gate.weight", "moe.gate.weight_scale", (4, 32), (4, 32, 1)),
    ],
)
def test_experts(name: str, scale_name: str, scale_shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    w, s = weight(4, 32, 64), torch.rand(scale_shape) + 0.5
    out = rescale_state_dict({name: w, scale_name: s}, layout="per_channel")
    assert out[scale_name].shape == expected
    wide = s.double().reshape(*s.shape, *[1] * (3 - s.dim())).numpy() if s.dim() else s.double().numpy()
    assert sqnr(e4m3fn(w) * wide, e4m3fn(out[name]) * out[scale_name].double().numpy()) > 100


@pytest.mark.parametrize(
    ("name", "scale_name", "scale_shape"),
    [
        ("moe.gate.weight", "moe.gate.weight_scale", (4, 1, 32)),  # a scale an input column
        ("experts.gate_up_proj", "experts.gate_up_proj_weight_scale", (4, 32, 1)),  # Llama 4: rows are inputs
    ],
)
def test_experts_with_scales_of_their_inputs_are_refused(
    name: str, scale_name: str, scale_shape: tuple[int, ...]
) -> None:
    with pytest.raises(PlanError, match="cannot be laid out per row"):
        rescale_state_dict({name: weight(4, 32, 32), scale_name: torch.ones(scale_shape)}, layout="per_channel")


@pytest.mark.parametrize(
    ("shape", "scale_shape"),
    [((2, 768, 6144), (2, 8, 96)), ((2, 64, 128), (2, 8, 8)), ((2, 192, 192), (2, 2, 96)), ((2, 384, 64), (2, 4, 96))],
)
def test_a_grid_with_as_many_values_as_rows_is_not_one_a_row(
    shape: tuple[int, ...], scale_shape: tuple[int, ...]
) -> None:
    sd = {"e.gate_up_proj": weight(*shape), "e.gate_up_proj_scale_inv": torch.rand(scale_shape) + 0.5}
    with pytest.raises(PlanError, match="is not known"):
        rescale_state_dict(sd, layout="per_channel")


def test_expert_blocks() -> None:
    w = weight(3, 256, 300)
    s = torch.rand(3, 2, 3) + 0.5
    out = rescale_state_dict({"e.gate_up_proj": w, "e.gate_up_proj_scale_inv": s}, layout="per_channel")
    assert out["e.gate_up_proj_scale_inv"].shape == (3, 256, 1)
    for k in range(3):
        one = rescale_state_dict({"a.weight": w[k].clone(), "a.weight_scale": s[k].clone()}, layout="per_channel")
        np.testing.assert_array_equal(raw(one["a.weight"]), raw(out["e.gate_up_proj"][k]))
        assert torch.equal(one["a.weight_scale"], out["e.gate_up_proj_scale_inv"][k])


@pytest.mark.parametrize("as_dtype", E8M0_OR_ITS_BYTES)
def test_e8m0_becomes_float32(as_dtype: torch.dtype) -> None:
    w = weight(64, 96)
    codes = torch.randint(110, 125, (64, 3), dtype=torch.uint8)
    out = rescale_state_dict({W: w, S: codes.view(as_dtype)}, layout="per_channel")
    assert out[S].dtype == torch.float32
    before = e4m3fn(w) * np.repeat(np.exp2(codes.double().numpy() - 127), 32, axis=1)
    assert sqnr(before, e4m3fn(out[W]) * out[S].double().numpy()) >= 60  # 14 binades a row: underflow
    tensor = rescale_state_dict({W: w, S: torch.tensor([120], dtype=torch.uint8).view(as_dtype)}, layout="per_channel")
    assert torch.equal(tensor[S], torch.full((64, 1), 2.0**-6))


def test_four_dimensional_blocks() -> None:
    w, s = weight(256, 448), torch.rand(2, 1, 4, 1) + 0.5
    four = rescale_state_dict({W: w, S: s}, layout="per_channel")
    two = rescale_state_dict({W: w, S: s.reshape(2, 4)}, layout="per_channel")
    np.testing.assert_array_equal(raw(four[W]), raw(two[W]))
    assert torch.equal(four[S], two[S])


def write(path: Path, sd: dict[str, torch.Tensor], block: list[int]) -> Path:
    path.mkdir()
    save_file(sd, path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_the_configs_block_size_counts(tmp_path: Path) -> None:
    """[100, 96] in a grid of [2, 1] is cut at row 64 or at row 50..99: only the config knows."""
    w, s = weight(100, 96), torch.tensor([[1.0], [100.0]])
    for height in (64, 96):
        out = load_state_dict(write(tmp_path / str(height), {W: w, S: s}, [height, 96]), layout="per_channel")
        rows = np.where(np.arange(100) < height, 1.0, 100.0)[:, None]
        assert sqnr(e4m3fn(w) * rows, e4m3fn(out[W]) * out[S].double().numpy()) >= 100


def test_from_files_as_in_memory(tmp_path: Path) -> None:
    sd = {W: weight(300, 260), S: torch.rand(3, 3) + 0.5, "b.weight": weight(64, 64), "b.weight_scale": torch.rand(64)}
    path = write(tmp_path / "ckpt", sd, [128, 128])
    for threads in (1, 3):
        read = load_checkpoint(path, layout="per_channel", threads=threads)
        memory = rescale_state_dict(sd, layout="per_channel")
        for name in sd:
            np.testing.assert_array_equal(raw(read.state_dict[name]), raw(memory[name]))
    assert set(read.report.requantized) == {W}
    assert json.dumps(read.report.to_dict())


def test_tied_weights_are_requantized_once() -> None:
    w, s = weight(256, 256), torch.rand(2, 2) + 0.5
    sd = {"a.weight": w, "a.weight_scale": s, "b.weight": w, "b.weight_scale": s}
    alone = rescale_state_dict({"a.weight": w.clone(), "a.weight_scale": s.clone()}, layout="per_channel")
    for inplace in (False, True):
        out = rescale_state_dict(sd, layout="per_channel", inplace=inplace)
        assert out["a.weight"].data_ptr() == out["b.weight"].data_ptr()
        np.testing.assert_array_equal(raw(out["b.weight"]), raw(alone["a.weight"]))
        assert torch.equal(out["b.weight_scale"], alone["a.weight_scale"])


def test_dequantize_by_pattern() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    sd = {}
    for n in names:
        sd[f"{n}.weight"], sd[f"{n}.weight_scale_inv"] = weight(256, 300), torch.rand(2, 3) + 0.5
    out = rescale_state_dict(sd, dequantize=["*.self_attn.*"])
    attention = out[f"{names[0]}.weight"]
    assert attention.dtype == torch.bfloat16
    assert f"{names[0]}.weight_scale_inv" not in out
    assert out[f"{names[1]}.weight"].dtype == torch.float8_e4m3fn
    grid = np.repeat(np.repeat(sd[f"{names[0]}.weight_scale_inv"].numpy(), 128, 0), 128, 1)[:256, :300]
    expected = to_bf16(e4m3fn(sd[f"{names[0]}.weight"]) * grid.astype(np.float64))
    assert np.array_equal(bf16_bits(attention), expected)


@pytest.mark.parametrize("shape", [(), (256,), (256, 1), (1, 300), (2, 3), (2, 1, 3, 1)])
def test_dequantize_every_granularity(shape: tuple[int, ...]) -> None:
    w, s = weight(256, 300), torch.rand(shape) + 0.5
    out = rescale_state_dict({W: w, S: s}, dequantize="*up_proj")
    if shape in ((2, 3), (2, 1, 3, 1)):
        s = s.reshape(2, 3).repeat_interleave(128, 0).repeat_interleave(128, 1)[:256, :300]
    elif shape == (256,):
        s = s[:, None]
    assert np.array_equal(bf16_bits(out[W]), to_bf16((w.double() * s.double()).numpy()))
    assert list(out) == [W]


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"dequantize='\*\.atention\.\*' matches no FP8 module"):
        rescale_state_dict({W: weight(8, 8), S: torch.ones(1)}, dequantize=["*.atention.*"])


def test_needs_pairs_together(tmp_path: Path) -> None:
    save_file({W: weight(8, 8)}, tmp_path / "m-00001-of-00002.safetensors")
    save_file({S: torch.ones(8)}, tmp_path / "m-00002-of-00002.safetensors")
    index = {"weight_map": {W: "m-00001-of-00002.safetensors", S: "m-00002-of-00002.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    assert load_state_dict(tmp_path, layout="per_channel")[S].shape == (8, 1)
    with pytest.raises(CheckpointError, match="load the directory instead"):
        load_file(tmp_path / "m-00001-of-00002.safetensors", layout="per_channel")
    with pytest.raises(OptionError, match="whole pairs"):
        safe_open(tmp_path / "m-00001-of-00002.safetensors", layout="per_channel")


@pytest.mark.parametrize("name", ["hf_fp8_block", "ct_fp8_block", "modelopt_fp8_pb_wo", "ct_mxfp8"])
def test_real_checkpoints(name: str) -> None:
    done = load_checkpoint(shared(name), layout="per_channel")
    assert len(done.report.requantized) == 14
    least = 100 if name == "ct_mxfp8" else 31.5
    assert min(done.report.requantized.values()) >= least
    for pair in done.plan.pairs:
        assert done.state_dict[pair.scale].shape == (done.state_dict[pair.weight].shape[0], 1)
        assert np.isfinite(ieee_e4m3(done.state_dict[pair.weight])).all()


@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_what_cannot_be_dequantized_is_refused_before_anything_is_written(shape: tuple[int, ...]) -> None:
    sd = {W: weight(48, 32), S: torch.ones(1), "b.weight": weight(48, 32, seed=1), "b.weight_scale": torch.ones(shape)}
    before = {name: raw(t).copy() for name, t in sd.items()}
    with pytest.raises(PlanError, match=r"b\.weight: cannot be dequantized"):
        rescale_state_dict(sd, inplace=True, dequantize=["b"])
    for name, t in sd.items():
        np.testing.assert_array_equal(raw(t), before[name])


def test_a_pattern_for_weights_without_a_scale_says_so() -> None:
    with pytest.raises(PlanError, match=r"dequantize=.m. matches only FP8 weights without a scale \(unscaled="):
        rescale_state_dict({"m.weight": weight(8, 8), W: weight(8, 8), S: torch.ones(1)}, dequantize="m")


def test_fnuz_scales_are_not_laid_out() -> None:
    sd = {W: weight(8, 8).float().clamp(-240, 240).to(torch.float8_e4m3fnuz), S: torch.ones(1)}
    assert rescale_state_dict(sd)[S].shape == (1,)
    with pytest.raises(PlanError, match="float8_e4m3fnuz, whose scales are not laid out"):
        rescale_state_dict(sd, layout="per_channel")


@pytest.mark.parametrize("options", [{"layout": "per_channel"}, {"dequantize": ["*"]}])
def test_shards_loaded_alone_go_together(tmp_path: Path, options: dict[str, object]) -> None:
    files, where = {}, {}
    for n in (1, 2, 3):
        name = f"model-{n:05d}-of-00003.safetensors"
        files[name] = {f"m{n}.weight": weight(256, 160, seed=n), f"m{n}.weight_scale_inv": torch.rand(2, 2) + 0.5}
        if n == 3:
            files[name] = {"plain.weight": torch.ones(3)}
        save_file(files[name], tmp_path / name)
        where |= dict.fromkeys(files[name], name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    whole = load_state_dict(tmp_path, **options)
    parts: dict[str, torch.Tensor] = {}
    for name in files:
        parts |= load_file(tmp_path / name, **options)
    assert set(parts) == set(whole)
    for name, t in whole.items():
        np.testing.assert_array_equal(raw(parts[name]), raw(t))


def test_a_pair_apart_matters_only_where_it_is_touched(tmp_path: Path) -> None:
    first = {W: weight(8, 8), "b.weight": weight(8, 8), "b.weight_scale": torch.ones(8)}
    save_file(first, tmp_path / "m-00001-of-00002.safetensors")
    save_file({S: torch.ones(8)}, tmp_path / "m-00002-of-00002.safetensors")
    where = dict.fromkeys(first, "m-00001-of-00002.safetensors") | {S: "m-00002-of-00002.safetensors"}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    alone = load_file(tmp_path / "m-00001-of-00002.safetensors", dequantize=["b"])
    assert alone["b.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 2),
        ({"layout": "per_channel"}, 2),
        ({"dequantize": ["a"]}, 2),
        ({"layout": "per_channel", "activation_scales": "keep"}, 1),
    ],
)
@pytest.mark.parametrize("fits", [False, True])
def test_activation_scales_follow_the_weights(options: dict[str, object], factor: int, fits: bool) -> None:
    w = weight(256, 256)
    if fits:
        w = w.float().clamp(-200, 200).to(torch.float8_e4m3fn)
    sd = {"a.weight": w, "a.weight_scale": torch.rand(2, 2) + 0.5, "self_attn.k_scale": torch.ones(1)}
    assert rescale_state_dict(sd, **options)["self_attn.k_scale"] == (1 if fits else factor)
    assert rescale_state_dict(sd, always=True, **options)["self_attn.k_scale"] == factor


def test_parameters_come_out_without_a_graph() -> None:
    w = weight(8, 8).float().clamp(-200, 200).to(torch.float8_e4m3fn)
    sd = {W: torch.nn.Parameter(w, requires_grad=False), S: torch.nn.Parameter(torch.ones(8))}
    assert rescale_state_dict(sd, layout="per_channel")[S].grad_fn is None


def test_one_scale_for_weights_of_different_shapes_is_refused() -> None:
    rules = [conventions.Convention(f"test_{n}", f"{{}}.{n}", "{}.sc", "a test") for n in ("w1", "w3")]
    for rule in rules:
        conventions.register(rule)
    sd = {"m.w1": weight(64, 32), "m.w3": weight(48, 32), "m.sc": torch.ones(1)}
    try:
        with pytest.raises(PlanError, match=r"m\.sc: belongs to several weights"):
            rescale_state_dict(sd, layout="per_channel")
    finally:
        for rule in rules:
            conventions.unregister(rule.name)


def test_one_bin_shard_of_several_without_its_dropped_scale(tmp_path: Path) -> None:
    shards = [{f"{m}.weight": weight(8, 8), f"{m}.weight_scale": torch.ones(8, 1)} for m in "ab"]
    first, _ = save_shards(tmp_path, *shards, stem="pytorch_model", ext=".bin")
    assert {n: t.dtype for n, t in load_file(first, dequantize=["a"]).items()} == {"a.weight": torch.bfloat16}
