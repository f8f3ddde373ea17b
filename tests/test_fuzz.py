"""Hostile checkpoints by the thousand: an error of ours or the right tensors, and never what safetensors refuses.

NEURON_FP8_LOADER_FUZZ_SECONDS gives the budget (`make fuzz`); without it a fixed set of cases runs. A failure names
its seed, which ``python tests/fuzz.py SEED`` makes again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import fuzz
import pytest
import safetensors
import torch
from safetensors.torch import load_file as original
from support import blob

from neuron_fp8_loader import load_checkpoint, load_state_dict
from neuron_fp8_loader.errors import CheckpointError, Fp8LoaderError

CASES = 1200
LET = {"nan": "keep", "unscaled": "keep"}

NOT_OURS = ("unknown dtype", "too large for torch", "is F4 of shape", "which torch")
"""What safetensors may accept and we do not, as our errors put it."""


def seeds() -> Iterator[int]:
    seconds = float(os.environ.get("NEURON_FP8_LOADER_FUZZ_SECONDS", "0"))
    if not seconds:
        yield from range(CASES)
        return
    begin, seed = time.monotonic(), time.time_ns()
    while time.monotonic() - begin < seconds:
        yield seed
        seed += 1


def parsed(file: Path) -> dict[str, torch.Tensor] | None:
    """What safetensors makes of a file: all its tensors, or None if it refuses it."""
    try:
        safetensors.deserialize(file.read_bytes())
        return original(file)
    except Exception:
        return None


def is_fp8(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def same_but_for_fp8(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], scales: set[str]) -> None:
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape
        if not is_fp8(tensor):
            assert ours[name].dtype == tensor.dtype
            if name not in scales:
                assert blob(ours[name]) == blob(tensor)


def one(path: Path, kind: str) -> bool:
    """Try one checkpoint; was it accepted?"""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    parts = [parsed(file) for file in files]
    try:
        loaded = load_checkpoint(path, **LET)
    except Fp8LoaderError as error:
        text = str(error)
        assert str(path.name) in text
        if kind == "configs":
            raise  # they never stop a load
        if kind == "file" and isinstance(error, CheckpointError) and parts[0] is not None:
            assert any(reason in text for reason in NOT_OURS)
        return False
    assert all(part is not None for part in parts)
    theirs = {name: tensor for part in parts for name, tensor in (part or {}).items()}
    plan = loaded.plan
    touched = {pair.scale for pair in plan.pairs} | {scale.name for scale in plan.activation_scales}
    same_but_for_fp8(loaded.state_dict, theirs, touched)
    plan.summary()
    plan.to_dict()
    if kind == "configs":  # nor do they decide anything
        bare = load_state_dict(path / "model.safetensors", **LET)
        assert all(blob(bare[name]) == blob(tensor) for name, tensor in loaded.state_dict.items())
        for more in ({"layout": "per_channel"}, {"dequantize": ["*"]}):
            try:
                load_checkpoint(path, **LET, **more)
            except Fp8LoaderError:
                pass
    return True


def test_hostile_checkpoints(tmp_path, caplog):
    caplog.set_level("ERROR")
    accepted = dict.fromkeys(fuzz.KINDS, 0)
    tried = dict.fromkeys(fuzz.KINDS, 0)
    for seed in seeds():
        directory = tmp_path / str(seed)
        directory.mkdir()
        kind, path = fuzz.make(seed, directory)
        tried[kind] += 1
        try:
            accepted[kind] += one(path, kind)
        except BaseException as error:
            pytest.fail(f"seed {seed} ({kind}): {type(error).__name__}: {error}")
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
    # the mutations neither spare all nor spoil all
    assert all(0.05 < accepted[kind] / tried[kind] < 0.95 for kind in ("file", "shards"))
    assert accepted["configs"] == tried["configs"]
    print(f"\n{tried} tried, {accepted} accepted")
