"""Every path of the kernel that runs here, against numpy."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support import CODES, ROOT

from neuron_fp8_loader import OptionError, kernel
from neuron_fp8_loader.codes.formats import FNUZ, HALF, RATIO, Table
from neuron_fp8_loader.codes.kernel import Counts, translate

LENGTHS = [*range(101), 127, 128, 129, 255, 256, 4095, 4096, 4097, 255 * 16, 255 * 16 + 1]
BLOCK_EDGES = [255 * 32 - 1, 255 * 32, 255 * 32 + 1, 255 * 32 + 33, 2 * 255 * 32 + 7, 32767, 32768, 32769, 1 << 18]


def random_table(seed: int) -> Table:
    """128 entries, any of them: what the native paths promise to look up."""
    rng = np.random.default_rng(seed)
    entries = rng.integers(0, 256, 128, dtype=np.uint8)
    both = np.concatenate([entries, entries])
    out = (both & 0x7F) | (CODES & 0x80)
    return Table(f"random {seed}", 1.0, out.tobytes(), (both >> 7).tobytes(), entries.tobytes())


TABLES = [HALF, RATIO, FNUZ, random_table(1), random_table(2)]


def oracle(src: np.ndarray, table: Table) -> tuple[np.ndarray, Counts]:
    out = np.frombuffer(table.out, np.uint8)[src]
    code = src & 0x7F
    is_nan = src == 0x80 if table is FNUZ else code == 0x7F
    above = np.zeros_like(is_nan) if table is FNUZ else (code > 0x77) & ~is_nan
    lossy = np.frombuffer(table.lossy, np.uint8)[src]
    return out, Counts(int(code.max(initial=0)), int(above.sum()), int(lossy.sum(dtype=np.int64)), int(is_nan.sum()))


@pytest.fixture(params=kernel.paths())
def path(request, monkeypatch):
    monkeypatch.setattr(kernel, "active", request.param)
    return request.param


def bytes_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)


def check(src: np.ndarray, table: Table) -> None:
    expected, counts = oracle(src, table)
    given = torch.from_numpy(src.copy())
    dst = torch.full((len(src),), 0xA5, dtype=torch.uint8)
    assert translate(given, dst, table) == counts
    np.testing.assert_array_equal(dst.numpy(), expected)
    np.testing.assert_array_equal(given.numpy(), src)
    assert translate(given, None, table) == counts
    np.testing.assert_array_equal(given.numpy(), src)
    assert translate(given, given, table) == counts
    np.testing.assert_array_equal(given.numpy(), expected)


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.name)
def test_bytes_and_counts_at_every_length(path, table):
    for n in LENGTHS:
        check(bytes_of(n, n), table)


@pytest.mark.parametrize("table", [HALF, RATIO], ids=lambda t: t.name)
@pytest.mark.parametrize("n", BLOCK_EDGES)
def test_counters_do_not_wrap(path, table, n):
    check(bytes_of(n, n), table)
    for byte in (0x7E, 0xFF, 0x01, 0x77):  # every lane counts at every step
        check(np.full(n, byte, np.uint8), table)


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.name)
def test_each_code_alone_at_each_place(path, table):
    for place in range(0, 40, 3):
        for byte in range(0, 256, 5 if place else 1):
            src = np.zeros(40, np.uint8)
            src[place] = byte
            check(src, table)


def test_unaligned_parts_leave_their_neighbours_alone(path):
    src, whole = bytes_of(1000, 3), bytes_of(1000, 4)
    for start in (0, 1, 7, 15, 31, 33):
        for n in (1, 31, 32, 33, 64, 100, 500):
            dst = torch.from_numpy(whole.copy())
            translate(torch.from_numpy(src)[start : start + n], dst[start + 3 : start + 3 + n], HALF)
            expected = whole.copy()
            expected[start + 3 : start + 3 + n] = oracle(src[start : start + n], HALF)[0]
            np.testing.assert_array_equal(dst.numpy(), expected)


def test_nothing_seen_in_nothing(path):
    empty = torch.empty(0, dtype=torch.uint8)
    assert translate(empty, None, HALF) == Counts(0, 0, 0, 0)
    assert translate(empty, empty, RATIO) == Counts(0, 0, 0, 0)


def test_any_contiguous_shape(path):
    src = bytes_of(60).reshape(3, 4, 5)
    dst = torch.zeros(60, dtype=torch.uint8)
    assert translate(torch.from_numpy(src), dst, HALF) == oracle(src.ravel(), HALF)[1]
    np.testing.assert_array_equal(dst.numpy(), oracle(src.ravel(), HALF)[0])


GOOD = torch.zeros(8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        (torch.zeros(8), GOOD),
        (GOOD, torch.zeros(8, dtype=torch.int8)),
        (GOOD, torch.zeros(7, dtype=torch.uint8)),
        (torch.zeros(16, dtype=torch.uint8)[::2], GOOD),
        (GOOD, torch.zeros(16, dtype=torch.uint8)[::2]),
        (torch.zeros(8, dtype=torch.uint8, device="meta"), GOOD),
        (torch.zeros(8, dtype=torch.uint8).view(torch.float8_e4m3fn), None),
    ],
)
def test_bad_arguments(path, src, dst):
    with pytest.raises(ValueError, match="contiguous uint8 CPU"):
        translate(src, dst, HALF)


def test_counts_add_up():
    parts = [Counts(3, 1, 2, 0), Counts(0x7F, 0, 5, 4), Counts()]
    assert parts[0] + parts[1] + parts[2] == Counts(0x7F, 1, 7, 4)


def test_threads_on_one_buffer(path):
    src = bytes_of(1 << 20, 9)
    expected, counts = oracle(src, RATIO)
    given, dst = torch.from_numpy(src), torch.zeros(len(src), dtype=torch.uint8)
    cuts = [*range(0, len(src), 50_001), len(src)]
    with ThreadPoolExecutor(4) as pool:
        spans = list(itertools.pairwise(cuts))
        parts = list(pool.map(lambda s: translate(given[s[0] : s[1]], dst[s[0] : s[1]], RATIO), spans))
    np.testing.assert_array_equal(dst.numpy(), expected)
    total = Counts()
    for part in parts:
        total = total + part
    assert total == counts


def in_a_fresh_process(forced: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), kernel.ENV: forced}
    code = "from neuron_fp8_loader import kernel; print(kernel.active)"
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_the_variable_forces_a_path():
    slowest = kernel.paths()[-1]  # never chosen by itself where there is another
    assert in_a_fresh_process(slowest).stdout.strip() == slowest


def test_a_path_that_is_not_here_is_a_clear_error(monkeypatch):
    assert in_a_fresh_process("altivec").returncode == 0  # not the import's business: `doctor` must still run
    monkeypatch.setattr(kernel, "active", "altivec")
    with pytest.raises(OptionError, match=f"{kernel.ENV}=altivec: no such path here") as caught:
        kernel.translate(torch.zeros(1, dtype=torch.uint8), None, HALF)
    for name in kernel.paths():
        assert name in str(caught.value)


def test_without_the_variable_the_fastest():
    assert in_a_fresh_process("").stdout.strip() == kernel.paths()[0]
    assert kernel.paths()[-1] == "torch"
