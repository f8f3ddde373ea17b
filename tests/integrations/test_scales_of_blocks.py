"""Scales of blocks that a conversion leaves beside a weight must still be that weight's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from neuron_fp8_loader import WeightError
from tests.integrations.test_row_scales import (
    AT,
    FP8,
    SIZES,
    WIDE,
    Tensors,
    _exchange,
    _exchange_scales,
    _fuse,
    converted,
    given,
    raw,
)


def in_blocks() -> Tensors:
    """16 x 16."""
    tensors, rng = given(), np.random.default_rng(1)
    for name in [name for name in tensors if name.endswith(".scale")]:
        shape = (len(tensors[name]) // 16, WIDE // 16)
        tensors[name] = torch.from_numpy(rng.uniform(1e-4, 1, shape).astype(np.float32))
    return tensors


def _roll(state: Tensors) -> None:
    state[f"{AT}.q_proj.weight"] = raw(state[f"{AT}.q_proj.weight"]).roll(WIDE // 2, 1).view(FP8)


def _cast_anew(state: Tensors) -> None:
    raw(state[f"{AT}.q_proj.weight"])[0, 0] ^= 1


def _exchange_scales_and_rename(state: Tensors) -> None:
    _exchange_scales(state)
    for end in ("weight", "scale"):
        state[f"{AT}.key.{end}"] = state.pop(f"{AT}.k_proj.{end}")


def _rename_and_pad(state: Tensors) -> None:
    state[f"{AT}.query.weight"] = torch.nn.functional.pad(raw(state.pop(f"{AT}.q_proj.weight")), (0, 3, 0, 5)).view(
        FP8
    )
    state[f"{AT}.query.scale"] = state.pop(f"{AT}.q_proj.scale").clone()


def _fuse_both(state: Tensors) -> None:
    scales = [state.pop(f"{AT}.{name}.scale") for name in SIZES]
    _fuse(state)
    state[f"{AT}.Wqkv.scale"] = torch.cat(scales)


@pytest.mark.parametrize("convert", [_roll, _cast_anew, _exchange, _exchange_scales, _exchange_scales_and_rename])
def test_scales_of_blocks_beside_another_weight(convert: Callable[[Tensors], None]) -> None:
    with pytest.raises(WeightError, match=r"weight \[\d+, 64\]: has the scales of the blocks of layers\.1\.self_attn"):
        converted(in_blocks(), convert)


@pytest.mark.parametrize("convert", [lambda state: None, _rename_and_pad, _fuse_both])
def test_scales_of_blocks_that_moved_with_their_weight(convert: Callable[[Tensors], None]) -> None:
    want = in_blocks()
    convert(want)
    assert set(converted(in_blocks(), convert)) == set(want)


@pytest.mark.parametrize("shape", [(SIZES["q_proj"],), (1, WIDE)])
def test_scales_of_another_form_are_not_looked_at(shape: tuple[int, ...]) -> None:
    """Where there is one value a row columns may be moved, where there is one a column rows."""
    tensors = in_blocks()
    tensors[f"{AT}.q_proj.scale"] = torch.rand(shape)

    def move(state: Tensors) -> None:
        axis = 1 if len(shape) == 1 else 0
        state[f"{AT}.q_proj.weight"] = raw(state[f"{AT}.q_proj.weight"]).roll(3, axis).view(FP8)

    assert torch.equal(converted(tensors, move)[f"{AT}.q_proj.scale"], tensors[f"{AT}.q_proj.scale"])


def test_scales_of_blocks_that_are_all_the_same_are_right_in_any_order() -> None:
    tensors = in_blocks()
    tensors[f"{AT}.q_proj.scale"][:] = 3.0
    converted(tensors, _roll)
