"""Block scales to row scales on shapes that fit nothing: alike on every path, in memory, from files, by slices."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from support import e4m3fn, fp8, same_bytes, save_shards

from neuron_fp8_loader import WeightError, kernel, load_checkpoint, load_state_dict, rescale_state_dict
from neuron_fp8_loader.codes.requantize import requantize, tiles

BLOCK = (128, 128)
SHAPES = [(1, 128), (1, 5), (3, 4095), (129, 300), (257, 96), (64, 1152), (128, 1184), (300, 2500)]
NAMES = [f"model.layers.{k}.mlp.down_proj.weight" for k in range(len(SHAPES))]


def drawn(rows: int, columns: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [rows, columns], and scales float32 of their blocks."""
    rng = np.random.default_rng([rows, columns, len(kind)])
    values = rng.normal(size=(rows, columns)) * 100
    if kind == "outliers":
        values *= np.where(rng.random(values.shape) < 0.001, 30, 0.1)
    if kind == "zeros":
        values *= rng.random(values.shape) < 0.7
        values[:, : columns // 2] *= 0.001
    if kind == "nan":
        values[rng.random(values.shape) < 0.002] = np.nan
    grid = math.ceil(rows / BLOCK[0]), math.ceil(columns / BLOCK[1])
    scale = rng.uniform(0.2, 2.0, grid) * 1e-3
    if kind == "zeros":
        scale[:, -1] = 0
    return fp8(values.clip(-448, 448)).view(torch.uint8), torch.from_numpy(scale).float()


@pytest.mark.parametrize("kind", ["plain", "outliers", "zeros", "nan"])
@pytest.mark.parametrize("block", [BLOCK, (1, 32), (16, 64), (7, 48), (1000, 1000)], ids=str)
@pytest.mark.parametrize("shape", [(1, 128), (3, 4095), (129, 300), (2, 9000)], ids=str)
def test_rows_are_nearest_and_alike(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], block: tuple[int, int], kind: str
) -> None:
    codes, _ = drawn(*shape, kind)
    rng = np.random.default_rng(1)
    scales = rng.uniform(0.2, 2.0, (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])))
    made = []
    for path in kernel.paths():
        monkeypatch.setattr(kernel, "active", path)
        new, row_scales = torch.zeros_like(codes), torch.zeros(shape[0])
        for tile in tiles(codes, new, torch.from_numpy(scales), row_scales, block):
            requantize(tile)
        inplace, again = codes.clone(), torch.zeros(shape[0])
        for tile in tiles(inplace, inplace, torch.from_numpy(scales), again, block):
            requantize(tile)
        assert torch.equal(inplace, new)
        assert torch.equal(again, row_scales)
        made.append((new, row_scales))
    for new, row_scales in made[1:]:
        assert torch.equal(new, made[0][0])
        assert torch.equal(row_scales, made[0][1])

    new, row_scales = made[0]
    spread = scales.repeat(block[0], 0)[: shape[0]].repeat(block[1], 1)[:, : shape[1]]
    values, factor = e4m3fn(codes.view(torch.float8_e4m3fn)) * spread, row_scales.double().numpy()[:, None]
    got = e4m3fn(new.view(torch.float8_e4m3fn))
    there = ~np.isnan(values)
    assert np.array_equal(np.isnan(got), ~there)
    assert np.nanmax(np.abs(got), initial=0) <= 240
    # nearest: no further away than half of what is between a result and the next number
    step = np.exp2(np.floor(np.log2(np.maximum(np.abs(got), 2.0**-6))) - 3)
    assert (np.abs(values / factor - got)[there] <= step[there] / 2 * (1 + 1e-12)).all()
    largest = np.nanmax(np.abs(values), axis=1, keepdims=True)
    public = (np.where(largest > 0, largest, 240) / 240).astype(np.float32).astype(np.float64)
    theirs = e4m3fn(fp8((values / public).clip(-240, 240))) * public
    ours, theirs = (np.nansum((part - values) ** 2, axis=1) for part in (got * factor, theirs))
    assert (ours <= theirs * (1 + 1e-9)).all()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Weights of all shapes in three shards, each beside its scale, and one large enough for several runs."""
    shards: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for k, (name, shape) in enumerate(zip(NAMES, SHAPES, strict=True)):
        codes, scale = drawn(*shape, ("plain", "outliers", "zeros")[k % 3])
        shards[k % 3] |= {name: codes.view(torch.float8_e4m3fn), name + "_scale_inv": scale}
    codes, scale = drawn(1500, 4000, "plain")
    shards[1] |= {"model.embed.weight": torch.ones(7), "lm_head.weight": codes.view(torch.float8_e4m3fn)}
    shards[1] |= {"lm_head.weight_scale_inv": scale}
    save_shards(tmp_path, *shards)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(BLOCK)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("threads", [1, 3])
def test_loaded_as_in_memory_on_every_path(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, threads: int) -> None:
    stored = {k: t for file in checkpoint.glob("*.safetensors") for k, t in safetensors.torch.load_file(file).items()}
    in_memory = rescale_state_dict(stored, layout="per_channel")
    results = []
    for path in kernel.paths():
        monkeypatch.setattr(kernel, "active", path)
        loaded = load_checkpoint(checkpoint, layout="per_channel", threads=threads)
        results.append((loaded.state_dict, loaded.report))
    report = results[0][1]
    for state_dict, other in results:
        assert state_dict.keys() == in_memory.keys()
        for name, tensor in in_memory.items():
            assert same_bytes(state_dict[name], tensor), name
        assert [w.counts for w in other.weights] == [w.counts for w in report.weights]
        for name, db in report.requantized.items():
            assert other.requantized[name] == pytest.approx(db, abs=0.3)


def test_a_rank_s_rows_are_those_of_the_whole(checkpoint: Path) -> None:
    whole = load_state_dict(checkpoint, layout="per_channel", always=True)
    for rank in range(4):
        cut = {"lm_head.weight": (0, 375 * rank, 375 * rank + 375), NAMES[7]: (1, 625 * rank, 625 * rank + 625)}
        part = load_state_dict(checkpoint, layout="per_channel", slices=cut)
        for name, (dim, start, stop) in cut.items():
            assert same_bytes(part[name], whole[name].narrow(dim, start, stop - start).contiguous()), (name, rank)
        rows = slice(375 * rank, 375 * rank + 375)
        assert torch.equal(part["lm_head.weight_scale_inv"], whole["lm_head.weight_scale_inv"][rows])


def test_each_byte_is_read_once(checkpoint: Path) -> None:
    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    if not Path("/proc/self/io").exists():
        pytest.skip("the system does not tell")
    load_state_dict(checkpoint, layout="per_channel")  # what is imported and kept by the first load
    before = bytes_read()
    load_state_dict(checkpoint, layout="per_channel")
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert size * 0.9 < bytes_read() - before < size * 1.1


def test_nan_is_refused_as_ever(checkpoint: Path) -> None:
    codes, scale = drawn(300, 2500, "nan")
    sd = {"a.weight": codes.view(torch.float8_e4m3fn), "a.weight_scale_inv": scale}
    save_shards(checkpoint, sd)
    for file in checkpoint.glob("*-of-00003.safetensors"):
        file.unlink()
    with pytest.raises(WeightError, match=r"a\.weight"):
        load_state_dict(checkpoint, layout="per_channel")
