"""Counting codes says the same as comparing value by value."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from neuron_fp8_loader import rescale_state_dict
from neuron_fp8_loader.codes.granularity import granularity
from neuron_fp8_loader.tools import compare as module
from neuron_fp8_loader.tools.compare import Side, compare
from tests.support import codes, random_codes


class Never:
    """Stands for ``ByCode``, and leaves every tile to the other way."""

    def __init__(self, *_: object) -> None:
        pass

    def compare(self, *_: object) -> None:
        return None


SCALES = [(), (1,), (70, 1), (1, 36), (5, 3), (5, 2), (5, 4), (3, 5)]


@pytest.mark.parametrize("shape", SCALES)
@pytest.mark.parametrize("kind", ["half", "same", "off", "overflow", "nan"])
def test_both_ways_agree(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], kind: str) -> None:
    weight = random_codes((70, 36), 3, top={"half": 0x7E, "overflow": 0x7E}.get(kind, 0x77))
    if kind == "nan":
        weight.view(torch.uint8)[5, 7] = 0x7F
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1
    covers = granularity((70, 36), shape)
    new, factor = weight.clone(), 1.0
    if kind == "half":
        new, factor = rescale_state_dict({"a.weight": weight, "a.weight_scale": torch.ones(1)})["a.weight"], 2.0
    if kind == "off":
        new.view(torch.uint8)[9, 9] ^= 1
    sides = Side(weight, scale, covers), Side(new, scale * factor, covers)
    if covers.kind == "unknown" and kind == "off":
        pytest.skip("compared by the factor alone")
    quick = asdict(compare("a", *sides, 1, nan_is_fine=True))
    monkeypatch.setattr(module, "ByCode", Never)
    slow = asdict(compare("a", *sides, 1, nan_is_fine=True))
    for key, value in slow.items():
        assert quick[key] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), key
    assert (slow["changed"] > 0) == (kind in ("half", "off", "overflow"))


def test_one_code_among_many_is_found() -> None:
    old = codes(np.full((64, 512), 0x40))
    new = old.clone()
    new.view(torch.uint8)[63, 511] = 0x41
    check = compare("a", Side(old, torch.ones(64, 1), granularity((64, 512), (64, 1))),
                    Side(new, torch.ones(64, 1), granularity((64, 512), (64, 1))), 2)  # fmt: skip
    assert (check.off, check.changed) == (1, 1)
