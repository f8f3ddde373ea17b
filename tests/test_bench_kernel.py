"""The kernel benchmark checks what it times; the rival of the layout step is the public scripts' arithmetic."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from support import e4m3fn, ieee_e4m3, sqnr

from benchmarks import kernel as bench
from benchmarks import layout
from benchmarks.common import WrongAnswer
from neuron_fp8_loader import kernel


@pytest.fixture(autouse=True)
def _once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_BATCH", 1)  # the figures mean nothing here


def test_codes_hold_the_largest_and_no_nan() -> None:
    magnitude = bench.codes(1 << 16).numpy() & 0x7F
    assert magnitude.max() == 0x7E
    assert len(bench.codes(100_001)) == 100_001


@pytest.mark.parametrize("threads", [1, 2])
def test_every_path_is_measured_against_memcpy(threads: int) -> None:
    before = kernel.active
    found = bench.measure(1 << 16, threads, 2, slow=True)
    expected = {f"{path}, {method}" for path in kernel.paths() for method in ("half", "ratio")}
    assert set(found) == {*expected, "memcpy", "bytes.translate", "README recipe"}
    assert found["memcpy"]["speedup"] == 1.0
    assert all(len(entry["runs_s"]) == 2 for entry in found.values())
    assert kernel.active == before


def test_a_kernel_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernel.translate

    def one_off(src: torch.Tensor, dst: torch.Tensor, table: object) -> object:
        counts = real(src, dst, table)  # type: ignore[arg-type]
        dst[7] ^= 1
        return counts

    monkeypatch.setattr(kernel, "translate", one_off)
    with pytest.raises(WrongAnswer, match="1 of 65536 bytes are wrong"):
        bench.measure(1 << 16, 1, 1, slow=False)


@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (128, 64)])
def test_public_scripts(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(3)
    weight = bench.codes(shape[0] * shape[1]).view(torch.float8_e4m3fn).view(shape)
    grid = tuple(-(-n // layout.BLOCK) for n in shape)
    scale = torch.from_numpy(generator.uniform(1e-4, 1e-3, grid).astype(np.float32))
    new_weight, new_scale = layout.public_scripts(weight, scale)

    whole = np.kron(scale.numpy(), np.ones((128, 128)))[: shape[0], : shape[1]]
    true = e4m3fn(weight) * whole
    rows = np.abs(true).max(axis=1, keepdims=True) / 240
    expected = (true / rows).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * rows
    assert new_scale.shape == (shape[0], 1)
    np.testing.assert_allclose(new_scale.double().numpy(), rows, rtol=1e-6)
    device = ieee_e4m3(new_weight)
    assert np.isfinite(device).all()
    # float32 on the way may round a halfway case to the other side
    assert sqnr(expected, device * rows) > 40
    assert 28 < sqnr(true, device * rows) < 36


def test_layout_is_measured() -> None:
    found = bench.measure_layout(128, 1)
    assert found["rescale, half"]["sqnr_db"] > 100
    assert found["public scripts, block -> row"]["speedup"] == 1.0
    assert ("neuron_fp8_loader, block -> row" in found) == layout.has_layout()
