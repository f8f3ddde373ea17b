"""Every native path against torch's, on memory that ends where it says: for ``make sanitize``, which watches."""

from __future__ import annotations

import os

import pytest
import torch

from neuron_fp8_loader import kernel
from neuron_fp8_loader.codes import requantize
from neuron_fp8_loader.codes.dequantize import dequantize_slice
from neuron_fp8_loader.codes.formats import HALF, RATIO

SIZES = [(1, 1), (1, 31), (1, 32), (2, 33), (3, 65), (5, 128), (4, 200), (1, 4097), (70, 130)]
BLOCKS = [(1, 1), (1, 16), (1, 32), (2, 32), (128, 128), (3, 7)]


def test_the_sanitizers_are_there() -> None:
    if "SANITIZED" not in os.environ:
        pytest.skip("only under make sanitize")
    with open("/proc/self/maps") as maps:
        mapped = maps.read()
    assert "libubsan" in mapped
    assert "sanitize/neuron_fp8_loader/codes/_kernel" in mapped


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_path_as_torch_does(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def everything() -> list[torch.Tensor]:
        out = []
        for table in (HALF, RATIO):
            dst = torch.empty_like(codes)
            out += [torch.tensor(kernel.translate(codes, dst, table)), dst]
        out.append(kernel.histogram(codes))
        wide = torch.full((shape[1] + 1, shape[0] + 3), 0xAB, dtype=torch.uint8)  # placed within, nothing beside it
        kernel.place(codes, wide[:-1, 2:-1])
        out.append(wide)
        for block in BLOCKS:
            draw = torch.Generator().manual_seed(1)
            scale = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]), generator=draw) + 0.1
            out.append(dequantize_slice(codes, scale, block).view(torch.int16))
            new, rows = torch.empty_like(codes), torch.empty(shape[0])
            for tile in requantize.tiles(codes, new, scale.double(), rows, block):
                requantize.requantize(tile)
            out += [new, rows]
        return out

    monkeypatch.setattr(kernel, "active", "torch")
    wanted = everything()
    for path in kernel.paths():
        monkeypatch.setattr(kernel, "active", path)
        for got, expected in zip(everything(), wanted, strict=True):
            assert torch.equal(got, expected), path
