"""Any checkpoint: whatever its names, dtypes, shapes and shards, the product of weight and scale stays what it was."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import (
    digests,
    e4m3fn,
    halved,
    ieee_e4m3,
    random_codes,
    raw,
    same_bytes,
    save,
    save_shards,
    scale_values,
)

from neuron_fp8_loader import load_checkpoint, load_file, load_state_dict, rescale_state_dict, safe_open

NAMES = {
    "weight_scale": ("{}.weight", "{}.weight_scale"),
    "weight_scale_inv": ("{}.weight", "{}.weight_scale_inv"),
    "scale": ("{}.weight", "{}.scale"),
    "fused_scale_inv": ("{}.gate_up_proj", "{}.gate_up_proj_scale_inv"),
}
SCALE_DTYPES = ["float32", "bfloat16", "float16", "float64", "uint8", "float8_e8m0fnu"]


@dataclass
class Made:
    """A checkpoint, and what is true of it: weight -> scale, and which tensors are neither."""

    tensors: dict[str, torch.Tensor]
    pairs: dict[str, str]
    shard_of: dict[str, int]
    shards: int


@st.composite
def checkpoints(draw) -> Made:
    tensors: dict[str, torch.Tensor] = {}
    pairs: dict[str, str] = {}
    for i in range(draw(st.integers(0, 5))):
        weight_name, scale_name = (t.format(f"m.{i}") for t in NAMES[draw(st.sampled_from(sorted(NAMES)))])
        shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
        top = draw(st.sampled_from([0x07, 0x77, 0x78, 0x7E]))
        rows = draw(st.sampled_from([(), (1,), shape[:1], (*shape[:1], 1)]))
        dtype = getattr(torch, draw(st.sampled_from(SCALE_DTYPES)), torch.float32)
        scale = torch.from_numpy(np.random.default_rng(i).uniform(0.001, 100, rows))
        if dtype.itemsize == 1:
            scale = torch.from_numpy(np.random.default_rng(i).integers(0, 254, rows, dtype=np.uint8)).view(dtype)
        tensors[weight_name], tensors[scale_name] = random_codes(shape, i, top=top), scale.to(dtype)
        pairs[weight_name] = scale_name
    for i in range(draw(st.integers(0, 3))):
        dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.int8, torch.bool, torch.float8_e5m2]))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=2)))
        tensors[f"other.{i}.weight"] = torch.ones(shape).to(dtype)
        tensors[f"other.{i}.weight_scale"] = torch.ones(1)
    names = draw(st.permutations(sorted(tensors)))
    shards = draw(st.integers(1, 3))
    shard_of = {name: draw(st.integers(0, shards - 1)) for name in names}
    return Made({name: tensors[name] for name in names}, pairs, shard_of, shards)


def write(made: Made, directory: Path) -> list[Path]:
    parts = [{n: t for n, t in made.tensors.items() if made.shard_of[n] == i} for i in range(made.shards)]
    if made.shards == 1:
        return [save(directory / "model.safetensors", parts[0])]
    parts = [part or {f"filler.{i}": torch.ones(1)} for i, part in enumerate(parts)]  # an index lists no empty shard
    return save_shards(directory, *parts)


def check_values(made: Made, after: dict[str, torch.Tensor], *, always: bool) -> None:
    changed = set()
    for weight, scale in made.pairs.items():
        before_code = raw(made.tensors[weight]) & 0x7F
        above = bool((before_code > 0x77).any())
        assert np.isfinite(ieee_e4m3(after[weight])).all()
        if not above and not always:
            continue
        changed |= {weight, scale}
        assert same_bytes(after[weight], halved(made.tensors[weight]).view(made.tensors[weight].shape))
        ratio = scale_values(after[scale]) / scale_values(made.tensors[scale])
        assert (ratio == 2).all()
        assert after[scale].dtype == made.tensors[scale].dtype
        assert after[scale].shape == made.tensors[scale].shape
        # in values: exact but for odd codes below 0x10, and those are off by half a step at most
        error = np.abs(e4m3fn(after[weight]) * 2 - e4m3fn(made.tensors[weight]))
        odd_and_small = (before_code < 0x10) & (before_code & 1 == 1)
        assert (error[~odd_and_small] == 0).all()
        assert (error <= 2.0**-9).all()
    for name, tensor in made.tensors.items():
        if name not in changed:
            assert same_bytes(after[name], tensor), name


@given(checkpoints(), st.booleans(), st.sampled_from([1, 3]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_checkpoint_on_disk(made, always, threads):
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        files = write(made, directory)
        hashes = digests(directory)
        loaded = load_checkpoint(directory, always=always, threads=threads)
        after = loaded.state_dict
        assert loaded.plan.scale_of == made.pairs
        assert set(made.tensors) <= set(after)
        check_values(made, after, always=always)
        for file in files:
            part = load_file(file, always=always)
            assert all(same_bytes(tensor, after[name]) for name, tensor in part.items())
        again = load_state_dict(directory, always=always)
        assert list(again) == list(after)
        assert digests(directory) == hashes


@given(checkpoints(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_state_dict_in_memory(made, always, inplace):
    given_tensors = {name: t.clone() for name, t in made.tensors.items()}
    after = rescale_state_dict(given_tensors, inplace=inplace, always=always)
    assert list(after) == list(made.tensors)
    check_values(made, after, always=always)
    if not inplace:
        assert all(same_bytes(given_tensors[name], tensor) for name, tensor in made.tensors.items())
    if not always:
        twice = rescale_state_dict(after)
        assert all(twice[name] is after[name] for name in after)


@given(checkpoints(), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_slice(made, data):
    with tempfile.TemporaryDirectory() as temporary:
        files = write(made, Path(temporary))
        expected = load_state_dict(temporary, always=True)
        for file in files:
            with safe_open(file) as f:
                for name in f.keys():  # noqa: SIM118
                    whole = expected[name]
                    assert same_bytes(f.get_tensor(name), whole)
                    if whole.dim() and 0 not in whole.shape:
                        ends = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in whole.shape]
                        index = tuple(slice(a, b) for a, b in ends)
                        assert same_bytes(f.get_slice(name)[index], whole[index])


@given(checkpoints())
@settings(max_examples=25, deadline=None)
def test_ratio_is_the_recipe_or_refuses(made):
    e8m0 = any(made.tensors[s].element_size() == 1 for s in made.pairs.values())
    if e8m0:
        return
    after = rescale_state_dict(made.tensors, method="ratio", always=True)
    for weight, scale in made.pairs.items():
        recipe = (made.tensors[weight].bfloat16() / (448 / 240)).to(torch.float8_e4m3fn)
        assert same_bytes(after[weight], recipe)
        assert same_bytes(after[scale], made.tensors[scale] * (448 / 240))
