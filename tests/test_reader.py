"""Reading in pieces: none skipped, none translated twice, whatever the order; and files that fail half-way."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from faults import Faulty
from hooked import can_hook
from hypothesis import given, settings
from hypothesis import strategies as st
from support import halved, random_codes, same_bytes, save, save_shards

from neuron_fp8_loader import load_checkpoint, load_file, load_state_dict
from neuron_fp8_loader.checkpoint import TensorInfo, reader
from neuron_fp8_loader.checkpoint.pieces import cut
from neuron_fp8_loader.errors import CheckpointError
from neuron_fp8_loader.host import parallel
from neuron_fp8_loader.host.parallel import PIECE
from neuron_fp8_loader.load import files as loader

MIB = 1 << 20


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(reader, "PIECE", 64)
    monkeypatch.setattr(parallel, "PIECE", 64)


def cold(n: int, seed: int) -> torch.Tensor:
    return random_codes((n,), seed, top=0x77)


def heat(weight: torch.Tensor, *places: int) -> torch.Tensor:
    """Put a code above 240 at these places only."""
    hot = weight.clone()
    for place in places:
        hot.view(torch.uint8)[place] = 0x7E
    return hot


# -- pieces put off until the first code that does not fit ------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, 2 * PIECE + 17, -1, None], ids=str)
def test_the_only_overflow_of_a_large_weight(tmp_path, threads, place):
    weight = cold(3 * PIECE + 12345, 1)
    weight = weight if place is None else heat(weight, place)
    tensors = {"pad": torch.zeros(1001, dtype=torch.uint8), "a.weight": weight, "a.weight_scale": torch.ones(1)}
    loaded = load_checkpoint(save(tmp_path / "model.safetensors", tensors), threads=threads)
    after = loaded.state_dict
    assert same_bytes(after["a.weight"], weight if place is None else halved(weight))
    assert after["a.weight_scale"].item() == (1 if place is None else 2)
    (report,) = loaded.report.weights
    code = weight.view(torch.uint8).numpy() & 0x7F
    assert report.counts.above == (0 if place is None else 1)
    assert report.counts.lossy == np.count_nonzero((code < 16) & (code & 1 == 1))


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_every_piece_is_translated_once(tmp_path, small_pieces, threads):
    rng = np.random.default_rng(threads)
    tensors, expected = {}, {}
    for i in range(12):
        n = int(rng.integers(1, 5000))
        weight = cold(n, i)
        if i % 3:
            weight = heat(weight, *rng.integers(0, n, i % 3))
        tensors[f"{i}.weight"], tensors[f"{i}.weight_scale"] = weight, torch.ones(1)
        expected[f"{i}.weight"] = halved(weight) if i % 3 else weight
    file = save(tmp_path / "model.safetensors", tensors)
    for _ in range(5):
        loaded = load_checkpoint(file, threads=threads)
        for name, weight in expected.items():
            assert same_bytes(loaded.state_dict[name], weight)
        for report in loaded.report.weights:
            code = tensors[report.name].view(torch.uint8).numpy() & 0x7F
            assert report.counts.lossy == np.count_nonzero((code < 16) & (code & 1 == 1))
            assert report.counts.above == np.count_nonzero(code > 0x77)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("hot", ["x", "x.weight"])
def test_weights_that_share_a_scale_wait_for_each_other(tmp_path, small_pieces, threads, hot):
    tensors = {"x": cold(3000, 1), "x.weight": cold(2000, 2)}
    tensors[hot] = heat(tensors[hot], -1)
    shards = [{"x": tensors["x"]}, {"x.weight": tensors["x.weight"]}, {"x.weight_scale": torch.ones(1)}]
    files = save_shards(tmp_path, *shards)
    whole = load_state_dict(tmp_path, threads=threads)
    for file in files:
        whole_part = load_file(file, threads=threads)
        assert all(same_bytes(whole[name], tensor) for name, tensor in whole_part.items())
    assert same_bytes(whole["x"], halved(tensors["x"]))
    assert same_bytes(whole["x.weight"], halved(tensors["x.weight"]))
    assert whole["x.weight_scale"].item() == 2


@pytest.mark.parametrize("byte", [0x77, 0x78, 0x7E, 0xF8])
def test_an_overflow_far_into_a_sibling_shard_is_found(tmp_path, small_pieces, byte):
    weight = cold(1000, 1)
    weight.view(torch.uint8)[999] = byte
    files = save_shards(tmp_path, {"a.weight": weight}, {"a.weight_scale": torch.ones(1)})
    assert load_file(files[1])["a.weight_scale"].item() == (1 if byte == 0x77 else 2)


# -- cutting ----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 300), max_size=60), min_size=1, max_size=3),
    st.sampled_from([1, 7, 64, 1000]),
    st.sampled_from([1, 3, 512]),
    st.randoms(),
)
@settings(max_examples=60, deadline=None)
def test_pieces_cover_every_byte_once(sizes, piece, buffers, random):
    infos = []
    for number, lengths in enumerate(sizes):
        offset = 100
        for i, nbytes in enumerate(lengths):
            infos.append(TensorInfo(f"{number}.{i}", "uint8", (nbytes,), nbytes, Path(f"{number}"), offset))
            offset += nbytes
    infos = [info for info in infos if random.random() < 0.8]  # what is not asked for leaves gaps
    random.shuffle(infos)
    by_name = {info.name: info for info in infos}
    parts = cut(infos, piece, buffers)
    seen: dict[str, list[tuple[int, int]]] = {}
    for part in parts:
        assert 0 < part.nbytes <= piece
        assert len(part.segments) <= buffers
        position = part.offset
        for segment in part.segments:
            info = by_name[segment.name]
            assert info.file == part.file
            assert info.offset + segment.start == position
            position += segment.end - segment.start
            seen.setdefault(segment.name, []).append((segment.start, segment.end))
        assert position == part.offset + part.nbytes
    for info in infos:
        spans = sorted(seen.get(info.name, []))
        assert [b for span in spans for b in range(*span)] == list(range(info.nbytes))


# -- files that fail --------------------------------------------------------------------------------------------


def some(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = {"a.weight": heat(cold(5000, 1), 4000), "a.weight_scale": torch.ones(1), "b": torch.rand(3000)}
    return save(tmp_path / "model.safetensors", tensors), tensors


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("left", [0, 0.5, -1])
def test_a_file_that_shrinks_after_its_header_was_read(tmp_path, monkeypatch, small_pieces, threads, left):
    file, _ = some(tmp_path)
    size = file.stat().st_size
    plan = loader.recipe_for

    def then_shrink(*args):
        made = plan(*args)
        os.truncate(file, int(size * left) if left >= 0 else size - 1)
        return made

    monkeypatch.setattr(loader, "recipe_for", then_shrink)
    files, running = open_files(), threading.active_count()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was written to while it was read"):
        load_state_dict(file, threads=threads)
    assert (open_files(), threading.active_count()) == (files, running)


def test_a_file_that_goes_away(tmp_path, monkeypatch):
    file, _ = some(tmp_path)
    plan = loader.recipe_for
    monkeypatch.setattr(loader, "recipe_for", lambda *args: (plan(*args), file.unlink())[0])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be opened: No such file"):
        load_state_dict(file)


@pytest.fixture(params=faults.WAYS)
def way(request, monkeypatch):
    if request.param == "native" and not can_hook():
        pytest.skip("no native reader here, or no compiler to put faults into it")
    monkeypatch.setattr(faults, "way", request.param)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_disk_that_fails(tmp_path, monkeypatch, small_pieces, way, threads):
    file, _ = some(tmp_path)
    calls = []

    def failing(real, handle, buffers, offset):
        calls.append(offset)
        if len(calls) > 20:
            raise OSError(5, "Input/output error")
        return real(handle, buffers, offset)

    Faulty(monkeypatch, failing)
    files, running = open_files(), threading.active_count()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: reading at byte \d+ failed: Input/output error"):
        load_state_dict(file, threads=threads)
    assert (open_files(), threading.active_count()) == (files, running)
    assert len(calls) <= 20 + threads


@pytest.mark.parametrize("threads", [1, 4])
def test_short_reads_are_continued(tmp_path, monkeypatch, way, threads):
    file, tensors = some(tmp_path)
    rng = np.random.default_rng(0)

    def stingy(real, handle, buffers, offset):
        some_buffers = buffers[: int(rng.integers(1, len(buffers) + 1))]
        last = some_buffers[-1][: int(rng.integers(1, len(some_buffers[-1]) + 1))]
        return real(handle, [*some_buffers[:-1], last], offset)

    Faulty(monkeypatch, stingy)
    after = load_state_dict(file, threads=threads)
    assert same_bytes(after["a.weight"], halved(tensors["a.weight"]))
    assert same_bytes(after["b"], tensors["b"])


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_first_error_ends_a_run(threads, error):
    done = []

    def work(job):
        if job == 30:
            raise error("stop")
        done.append(job)

    with pytest.raises(error, match="stop"):
        parallel.run(range(100_000), work, threads)
    assert set(range(30)) <= set(done) | {30}
    assert len(done) < 50_000


def test_a_run_does_every_job_once():
    for threads in (1, 2, 9):
        done: list[int] = []
        parallel.run(range(1000), done.append, threads)
        assert sorted(done) == list(range(1000))
    parallel.run([], done.append, 4)


def peak_of(action) -> int:
    """Bytes by which the process grew at most."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def field(name: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    try:
        clear.write_text("5")  # resets VmHWM
    except OSError:
        pytest.skip("peak memory cannot be measured here")
    before = field("VmRSS")
    kept = action()
    grown = field("VmHWM") - before
    del kept
    return grown


def test_peak_memory_is_the_state_dict(tmp_path):
    """Also where the last code of all decides, so that everything was put off."""
    total = 64 * MIB
    tensors = {"a.weight": heat(torch.zeros(total, dtype=torch.uint8).view(torch.float8_e4m3fn), -1)}
    file = save(tmp_path / "model.safetensors", tensors | {"a.weight_scale": torch.ones(1)})
    del tensors
    load_state_dict(file, threads=2)
    assert peak_of(lambda: load_state_dict(file, threads=2)) < 1.3 * total
