"""Loads while disks fail and other processes write: the right tensors, or an error that names the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import faults
import pytest
import torch
from faults import Faulty, before, failing, interrupted, short
from hooked import can_hook
from safetensors.torch import load_file as original
from support import halved, random_codes, same_bytes, save, save_shards, write_index

from neuron_fp8_loader import load_checkpoint, load_state_dict, safe_open
from neuron_fp8_loader.checkpoint import open_checkpoint
from neuron_fp8_loader.errors import CheckpointError
from neuron_fp8_loader.host import parallel
from neuron_fp8_loader.host.cache import forget
from neuron_fp8_loader.load import files as loader
from neuron_fp8_loader.load import slices
from neuron_fp8_loader.tools import export
from neuron_fp8_loader.tools.scan import scan_checkpoint

MIB = 1 << 20


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Three pieces of a weight, and small ones: some ten reads."""
    weight = random_codes((3 * parallel.PIECE // 1024, 1024), seed)
    return {
        "a.weight": weight,
        "a.weight_scale": torch.rand(len(weight), 1) + 1,
        "pad": torch.arange(1000 + seed),
        "b": torch.rand(300),
    }


@pytest.fixture(params=faults.WAYS, autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native" and not can_hook():
        pytest.skip("no native reader here, or no compiler to put faults into it")
    monkeypatch.setattr(faults, "way", request.param)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(tmp_path / "model.safetensors", tensors())


def check(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert same_bytes(loaded["a.weight"], halved(expected["a.weight"]))
    assert torch.equal(loaded["a.weight_scale"], expected["a.weight_scale"] * 2)
    assert torch.equal(loaded["pad"], expected["pad"])
    assert torch.equal(loaded["b"], expected["b"])


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "fault", [interrupted(), short(7001), short(parallel.PIECE // 2)], ids=["eintr", "7k", "half"]
)
def test_reads_that_give_less_change_nothing(file, monkeypatch, fault, threads):
    Faulty(monkeypatch, fault)
    check(load_state_dict(file, threads=threads), original(file))


def reads_of_a_load(file: Path) -> int:
    forget()
    with pytest.MonkeyPatch.context() as patch:
        reads = Faulty(patch)
        load_checkpoint(file, threads=1)
    return len(reads.reads)


@pytest.mark.parametrize("number", [errno.EIO, errno.EAGAIN, errno.ESTALE], ids=errno.errorcode.get)
def test_every_read_may_fail(file, number):
    """Header, index, config and data, each at every read: one error, of ours, and no descriptor left open."""
    write_index(file.with_name("model.safetensors.index.json"), dict.fromkeys(tensors(), file.name))
    file.with_name("config.json").write_text("{}")
    count, files = reads_of_a_load(file), open_files()
    assert count >= 6
    refused = 0
    for at in range(count):
        forget()
        with pytest.MonkeyPatch.context() as patch:
            reads = Faulty(patch, failing(number), at)
            try:
                loaded = load_checkpoint(file, threads=1)
            except CheckpointError as error:
                refused += str(file.parent) in str(error) and os.strerror(number) in str(error)
            else:  # a config, which never stops a load
                assert os.strerror(number) in str(loaded.plan.warnings)
                check(loaded.state_dict, original(file))
            assert len(reads.reads) < count + 1
    assert refused == count - 1
    assert open_files() == files


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def rewrite(file: Path) -> None:
    """Other bytes, in place: the size stays, the time does not."""
    with file.open("r+b") as handle:
        handle.seek(-8, os.SEEK_END)
        handle.write(b"12345678")
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))


def replace(file: Path) -> None:
    """Another file of the same layout, size and time."""
    status = file.stat()
    other = save(file.with_name("other"), tensors(seed=0) | {"b": torch.full((300,), 7.0)})
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert other.stat().st_size == status.st_size
    os.replace(other, file)


EVENTS: list[Callable[[Path], None]] = [cut, rewrite, replace, os.unlink]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_a_file_that_changes_at_any_read(file, event):
    """Before its data is opened that is an error. Afterwards a file renamed over is read to its own end."""
    expected, raw, count = original(file), file.read_bytes(), reads_of_a_load(file)
    errors = 0
    for at in range(count):
        file.unlink(missing_ok=True)
        file.write_bytes(raw)
        forget()
        with pytest.MonkeyPatch.context() as patch:
            Faulty(patch, before(lambda: event(file)), at)
            try:
                loaded = load_state_dict(file, threads=1)
            except CheckpointError as error:
                errors += str(file) in str(error)
            else:
                check(loaded, expected)
    # one read at a time of the header, and then again to parse it: 4; the rest is data
    assert errors == (4 if event in (replace, os.unlink) else count)


@pytest.mark.parametrize("event", [rewrite, replace], ids=["rewritten", "replaced"])
@pytest.mark.parametrize("what", ["load", "scan", "slices", "bin", "export"])
def test_a_file_replaced_between_header_and_data(file, tmp_path, monkeypatch, event, what):
    target = file
    if what == "bin":
        target = file.with_name("pytorch_model.bin")
        torch.save(tensors(), target)
        file.unlink()
        event = {rewrite: rewrite, replace: replace_bin}[event]
    if what == "export":
        made = export.prepare_export(target, tmp_path / "out")
        real = export.scan
        monkeypatch.setattr(export, "scan", lambda *args: (real(*args), event(target))[0])
        with pytest.raises(
            CheckpointError, match=rf"{target}: was (replaced|written to) while it was read; load again"
        ):
            made.run()
        assert not list((tmp_path / "out").glob("*.safetensors*"))
        return
    if what == "scan":
        checkpoint = open_checkpoint(target)
        event(target)
        with pytest.raises(CheckpointError, match="while it was read; load again"):
            checkpoint.source.visit(checkpoint.selected_tensors(), lambda name, piece: None, 1)
        assert scan_checkpoint(target).weights  # again, as it says
        return
    module = slices if what == "slices" else loader
    real_plan = module.recipe_for
    monkeypatch.setattr(module, "recipe_for", lambda *args: (real_plan(*args), event(target))[0])
    run = safe_open if what == "slices" else load_state_dict
    with pytest.raises(CheckpointError, match=rf"{target}: was (replaced|written to) while it was read; load again"):
        run(target)


def replace_bin(file: Path) -> None:
    torch.save(tensors(1), file.with_name("other"))
    os.replace(file.with_name("other"), file)


def test_another_shard_that_is_replaced(tmp_path, monkeypatch):
    """Shards read only to decide with are held to their headers too."""
    weight, scale = random_codes((64, 64), top=0x77), torch.ones(64, 1)
    one, two = save_shards(tmp_path, {"a.weight": weight}, {"a.weight_scale": scale})
    real = loader.recipe_for

    def then(*args):
        made = real(*args)
        other = save(tmp_path / "other", {"a.weight": random_codes((64, 64))})
        os.replace(other, one)
        return made

    monkeypatch.setattr(loader, "recipe_for", then)
    with pytest.raises(CheckpointError, match=rf"{one}: was replaced while it was read"):
        load_state_dict(two)
