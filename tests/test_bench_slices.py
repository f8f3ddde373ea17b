"""The benchmark of slices: its contenders read what they say, and its reference is right."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from oracle import bf16_bits, bf16_reference

from benchmarks import slices

KINDS = {"tensor": "tensor", "row": "row", "128x128": "block 128x128", "MX": "block 1x32"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("slices")
    slices.make(directory, 200, 320)
    return directory


@pytest.mark.parametrize("kind", slices.KINDS)
def test_contenders(made: Path, kind: str) -> None:
    tensors = safetensors.torch.load_file(made / kind / "model.safetensors")
    whole = bf16_reference(tensors["x.weight"], tensors["x.weight_scale"], KINDS[kind])
    np.testing.assert_array_equal(bf16_bits(slices._reference(made, kind)), whole)
    index = (slice(50, 150), slice(33, 320))
    np.testing.assert_array_equal(bf16_bits(slices.reader(made, kind, "ours")(index)), whole[index])
    codes = slices.reader(made, kind, "fp8")(index)
    assert codes.is_contiguous()
    assert torch.equal(codes.view(torch.uint8), tensors["x.weight"].view(torch.uint8)[index])
    plain = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(ml_dtypes.bfloat16).view(np.uint16)
    for contender in ("bf16", "cast"):
        assert slices.reader(made, kind, contender)(index).dtype == torch.bfloat16
    np.testing.assert_array_equal(bf16_bits(slices.reader(made, kind, "cast")(index)), plain)
