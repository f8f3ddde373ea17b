"""Long runs, read and translated by one native call: what it writes, what it counts, when it comes back."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hooked import can_hook, library
from support import random_codes, same_bytes, save

from benchmarks.pagecache import cached, can_drop, drop
from neuron_fp8_loader import OptionError, load_state_dict
from neuron_fp8_loader.checkpoint import runs
from neuron_fp8_loader.codes import kernel
from neuron_fp8_loader.codes.formats import HALF
from neuron_fp8_loader.codes.kernel import SEGMENT, How, read_segments
from neuron_fp8_loader.host.parallel import PIECE

pytestmark = pytest.mark.skipif(kernel._kernel is None, reason="no native extension")

MARGIN = 64


@pytest.fixture(params=[path for path in kernel.paths() if path != "torch"], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "active", request.param)


def halves(codes: np.ndarray) -> np.ndarray:
    """By the arithmetic of ml_dtypes; NaN bytes stay."""
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    made = (values / 2).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where((codes & 0x7F) == 0x7F, codes, made)


class Run:
    """Segments of a file with random bytes, each with memory of its own between two margins."""

    def __init__(self, file: Path, sizes: list[int], hows: list[How], *, offset: int, seed: int, hot: bool) -> None:
        rng = np.random.default_rng(seed)
        self.content = rng.integers(0, 256, offset + sum(sizes), dtype=np.uint8)
        if not hot:
            self.content[(self.content & 0x7F) > 0x77] = 0x33
        file.write_bytes(self.content.tobytes())
        self.file, self.sizes, self.hows, self.offset = file, sizes, hows, offset
        self.memory = [torch.full((size + 2 * MARGIN,), 0x5A, dtype=torch.uint8) for size in sizes]
        self.words = array("Q")
        for memory, size, how in zip(self.memory, sizes, hows, strict=True):
            at = memory.data_ptr() + MARGIN
            self.words.extend((at, size, at, at + size, how, 0, how == How.DECIDE, 0, 0, 0, 0, 0))
        self.cells = torch.zeros(2, dtype=torch.uint8)

    def read(self, piece: int, *, direct: bool = False) -> tuple[int, int]:
        handle = os.open(self.file, os.O_RDONLY)
        try:
            done, error = 0, 0
            while done < sum(self.sizes) and not error:
                done, error = read_segments(handle, self.offset, done, piece, self.words, [HALF], self.cells, direct)
            return done, error
        finally:
            os.close(handle)


@pytest.mark.parametrize("hot", [True, False], ids=["hot", "cold"])
@pytest.mark.parametrize(
    "sizes",
    [[1], [7, 1, 4096, 33], [5000, 5000], [1] * 700 + [9999], [3 << 20], [100_000, 5, 2_500_001]],
    ids=lambda sizes: f"{len(sizes)}x{sum(sizes)}",
)
@pytest.mark.parametrize("piece", [1, 1000, 1 << 18])
def test_every_byte_is_where_it_belongs(tmp_path: Path, sizes: list[int], piece: int, hot: bool) -> None:
    if piece == 1 and sum(sizes) > 20_000:
        piece = 4096
    hows = [(How.DECIDE, How.KEEP, How.COUNT)[i % 3] for i in range(len(sizes))]
    run = Run(tmp_path / "file", sizes, hows, offset=13, seed=len(sizes), hot=hot)
    assert run.read(piece) == (sum(sizes), 0)
    at = run.offset
    for number, (memory, size, how) in enumerate(zip(run.memory, sizes, hows, strict=True)):
        before = run.content[at : at + size]
        at += size
        assert (memory[:MARGIN] == 0x5A).all()
        assert (memory[MARGIN + size :] == 0x5A).all()
        expected = before.copy()
        words = run.words[number * SEGMENT : (number + 1) * SEGMENT]
        seen, put_off = tuple(words[7:11]), words[11]
        if how == How.DECIDE and run.cells[1]:
            expected[put_off:] = halves(before[put_off:])
            early = before[:put_off] & 0x7F
            assert not ((early > 0x77) & (early < 0x7F)).any()  # the first piece with such a code decides
        elif how == How.DECIDE:
            assert put_off == size
        assert np.array_equal(memory[MARGIN : MARGIN + size].numpy(), expected), number
        code = before & 0x7F
        above = np.count_nonzero((code > 0x77) & (code < 0x7F))
        lossy = np.count_nonzero((code < 16) & (code & 1 == 1))
        counted = (code.max(), above, lossy, np.count_nonzero(code == 0x7F))
        assert seen == ((0, 0, 0, 0) if how == How.KEEP else counted)


@pytest.mark.parametrize(
    ("sizes", "piece", "offset"),
    [([1], 1, 0), ([7, 1, 4096, 33], 64, 4090), ([1] * 700 + [9999], 1000, 1), ([3 << 20, 5, 2_500_001], 1 << 18, 8)],
    ids=lambda value: str(value) if isinstance(value, int) else f"{len(value)}x{sum(value)}",
)
def test_past_the_page_cache(tmp_path: Path, sizes: list[int], piece: int, offset: int) -> None:
    """Where the file system has that; elsewhere as ever."""
    run = Run(tmp_path / "file", sizes, [How.COUNT] * len(sizes), offset=offset, seed=1, hot=True)
    with run.file.open("ab") as file:
        file.write(b"what follows")
    if can_drop():
        drop([run.file])
    before = cached([run.file])
    assert run.read(piece, direct=True) == (sum(sizes), 0)
    after = cached([run.file])
    for memory, part in zip(run.memory, np.split(run.content[offset:], np.cumsum(sizes)[:-1]), strict=True):
        assert np.array_equal(memory[MARGIN:-MARGIN].numpy(), part)
        assert (memory[:MARGIN] == 0x5A).all()
        assert (memory[-MARGIN:] == 0x5A).all()
    counted = [sum(run.words[at + 8 :: SEGMENT]) for at in (0, 2)]
    code = run.content[offset:] & 0x7F
    assert counted == [np.count_nonzero((code > 0x77) & (code < 0x7F)), np.count_nonzero(code == 0x7F)]
    if sum(sizes) > 1 << 22 and before == 0 and has_direct(run.file):
        assert after is not None
        assert after < 0.5  # of a file that plain reads leave there whole


def has_direct(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0)))
    except OSError:
        return False
    return hasattr(os, "O_DIRECT")


def test_past_the_page_cache_a_file_that_ends(tmp_path: Path) -> None:
    run = Run(tmp_path / "file", [3 << 20], [How.KEEP], offset=10, seed=0, hot=True)
    os.truncate(run.file, 2_000_001)
    if can_drop():
        drop([run.file])
    assert run.read(1 << 18, direct=True) == (1_999_991, -1)
    assert np.array_equal(run.memory[0][MARGIN : MARGIN + 1_999_991].numpy(), run.content[10:2_000_001])


def test_past_the_page_cache_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_codes(1 << 16).view(torch.float8_e4m3fn).view(256, 256)
    save(tmp_path / "model.safetensors", {"a.weight": weight, "a.weight_scale": torch.ones(256, 1)})
    wanted = load_state_dict(tmp_path)
    asked: list[bool] = []

    def read(*arguments: Any) -> tuple[int, int]:
        asked.append(arguments[-1])
        return read_segments(*arguments)

    monkeypatch.setattr(runs, "read_segments", read)
    for value, expected in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv(runs.DIRECT_ENV, value)
        got = load_state_dict(tmp_path)
        assert all(same_bytes(got[name], wanted[name]) for name in wanted)
        assert asked.pop() is expected
    monkeypatch.setenv(runs.DIRECT_ENV, "yes")
    with pytest.raises(OptionError, match="NEURON_FP8_LOADER_DIRECT=yes: expected 1"):
        load_state_dict(tmp_path)


def test_a_file_that_ends(tmp_path: Path) -> None:
    run = Run(tmp_path / "file", [1000, 1000], [How.DECIDE, How.DECIDE], offset=10, seed=0, hot=True)
    os.truncate(run.file, 1500)
    assert run.read(100) == (1490, -1)
    run = Run(tmp_path / "file", [10], [How.KEEP], offset=0, seed=0, hot=True)
    assert read_segments(-1, 0, 0, 4, run.words, [HALF], run.cells) == (0, 9)  # EBADF


@pytest.mark.parametrize(
    ("word", "value"),
    [(0, 0), (1, 0), (1, 2**64 - 1), (1, 11), (2, 2**63), (3, 1), (4, 3), (5, 1), (6, 0), (6, 2)],
)
def test_segments_that_cannot_be(tmp_path: Path, word: int, value: int) -> None:
    run = Run(tmp_path / "file", [10], [How.DECIDE], offset=0, seed=0, hot=True)
    run.words[word] = value
    with pytest.raises(ValueError, match="read: segment 0"):
        run.read(4)
    assert (run.memory[0] == 0x5A).all()


@pytest.mark.parametrize(
    "arguments", [{"done": 11}, {"piece": 0}, {"offset": 2**63 - 5}, {"cells": torch.zeros(0, dtype=torch.uint8)}]
)
def test_runs_that_cannot_be(tmp_path: Path, arguments: dict[str, object]) -> None:
    run = Run(tmp_path / "file", [10], [How.KEEP], offset=0, seed=0, hot=True)
    good = {"handle": 0, "offset": 0, "done": 0, "piece": 4, "segments": run.words, "tables": [HALF]}
    with pytest.raises(ValueError, match="read: "):
        read_segments(**{**good, "cells": run.cells, **arguments})
    run.words.pop()
    with pytest.raises(ValueError, match="read: segments"):
        read_segments(**good, cells=run.cells)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """Reads that each take 30 ms, in C: a signal's handler cannot run in the midst of them."""
    if not can_hook():
        pytest.skip("no compiler to build a slow reader with")
    made = library(monkeypatch)
    delay, count = (ctypes.c_int.in_dll(made, name) for name in ("preadv_delay", "preadv_count"))
    delay.value, count.value = 30_000, 0
    yield count
    delay.value = 0


@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupt_does_not_wait_for_a_run(tmp_path: Path, slow_disk: ctypes.c_int, threads: int) -> None:
    weight = random_codes((64 * PIECE // 1024, 1024))
    file = save(tmp_path / "model.safetensors", {"w": weight, "w_scale": torch.ones(1)})
    running = threading.active_count()
    alarm = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
    alarm.start()
    with pytest.raises(KeyboardInterrupt):
        load_state_dict(file, threads=threads)
    alarm.join()
    assert slow_disk.value < 50  # of 64 reads
    assert threading.active_count() == running


@pytest.mark.parametrize("told", [0, 1, 2])
def test_reads_are_larger_where_bytes_are_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int
) -> None:
    if not can_hook():
        pytest.skip("no compiler to build a counting reader with")
    made = library(monkeypatch)
    tells, count = (ctypes.c_int.in_dll(made, name) for name in ("preadv_told", "preadv_count"))
    run = Run(tmp_path / "file", [64 << 10, 64 << 10], [How.KEEP, How.DECIDE], offset=1, seed=3, hot=True)
    tells.value, count.value = told, 0
    try:
        assert run.read(2 << 10) == (128 << 10, 0)
    finally:
        tells.value = 1
    assert count.value == pytest.approx(16 if told else 4, abs=2)
    kept, halved = (memory[MARGIN : MARGIN + (64 << 10)].numpy() for memory in run.memory)
    assert np.array_equal(kept, run.content[1 : 1 + (64 << 10)])
    assert np.array_equal(halved, halves(run.content[1 + (64 << 10) :]))
