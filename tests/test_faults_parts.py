"""Parts of tensors, fused experts and parameters: as for whole loads, a file that changes gives an error or the right
bytes, at whichever read it does."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import experts
import pytest
import torch
from faults import Faulty, before, short
from support import random_codes, same_bytes, save

from neuron_fp8_loader import load_state_dict, safe_open
from neuron_fp8_loader.errors import CheckpointError
from neuron_fp8_loader.host.cache import forget

Tensors = dict[str, torch.Tensor]
KIND = experts.Kind()


def tensors(seed: int) -> Tensors:
    weight = random_codes((600, 1100), seed)
    torch.manual_seed(seed)
    moe = experts.per_expert(KIND, 2, 64, 48, seed=seed)
    return {"a.weight": weight, "a.weight_scale": torch.rand(600, 1) + 1, "b": torch.rand(300), **moe}


def rows(file: Path) -> Tensors:
    return load_state_dict(file, slices={"a.weight": (0, 100, 500)}, threads=1)


def columns(file: Path) -> Tensors:
    return load_state_dict(file, slices={"a.weight": (1, 3, 700)}, threads=1)


def dequantized(file: Path) -> Tensors:
    return load_state_dict(file, slices={"a.weight": (0, 100, 500)}, dequantize="a", threads=1)


def fused(file: Path) -> Tensors:
    return load_state_dict(file, experts="fused", threads=1)


def opened(file: Path) -> Tensors:
    with safe_open(file) as handle:
        return {name: handle.get_slice(name)[:] for name in ("a.weight", "a.weight_scale", "b")}


def parameters(file: Path) -> Tensors:
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    pytest.importorskip("torch.distributed.checkpoint.hf_storage")
    from neuron_fp8_loader.integrations.dcp import NeuronStorageReader

    state = {name: torch.zeros(t.shape).to(t.dtype) for name, t in tensors(0).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.load(state, storage_reader=NeuronStorageReader(file, threads=1), no_dist=True)
        except dcp.api.CheckpointException as error:  # what a rank met, which was ours
            ours = [found for found, _ in error.failures.values() if isinstance(found, CheckpointError)]
            raise ours[0] from error
    return state


WAYS: list[Callable[[Path], Tensors]] = [rows, columns, dequantized, fused, opened, parameters]


def written(file: Path, seed: int = 0) -> Path:
    return save(file, tensors(seed))


def replaced(file: Path) -> None:
    status = file.stat()
    other = written(file.with_name("other"), 1)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, file)


def rewritten(file: Path) -> None:
    content = written(file.with_name("other"), 1).read_bytes()
    with file.open("r+b") as handle:
        handle.write(content)
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("event", [replaced, rewritten, cut, os.unlink], ids=lambda event: event.__name__)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_file_that_changes_at_any_read(tmp_path, way, event):
    file = written(tmp_path / "model.safetensors")
    forget()
    with pytest.MonkeyPatch.context() as patch:
        reads = Faulty(patch)
        expected = way(file)
    assert expected
    refused = 0
    for at in range(len(reads.reads)):
        file.unlink(missing_ok=True)
        written(file)
        forget()
        with pytest.MonkeyPatch.context() as patch:
            Faulty(patch, before(lambda: event(file)), at)
            try:
                loaded = way(file)
            except CheckpointError as error:
                refused += str(file) in str(error)
            else:
                assert loaded.keys() == expected.keys()
                assert all(same_bytes(loaded[name], tensor) for name, tensor in expected.items())
    assert refused


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_short_reads_change_nothing(tmp_path, way):
    file = written(tmp_path / "model.safetensors")
    expected = way(file)
    forget()
    with pytest.MonkeyPatch.context() as patch:
        reads = Faulty(patch, short(4099))
        loaded = way(file)
    assert reads.reads
    assert all(same_bytes(loaded[name], tensor) for name, tensor in expected.items())
