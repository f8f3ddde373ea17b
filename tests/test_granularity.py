"""What one scale value covers, told from two shapes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_fp8_loader.codes.granularity import Granularity, granularity


@pytest.mark.parametrize(
    ("weight", "scale", "expected"),
    [
        ((256, 448), (), "tensor"),
        ((256, 448), (1,), "tensor"),
        ((256, 448), (1, 1), "tensor"),
        ((256, 448), (256,), "row"),
        ((256, 448), (256, 1), "row"),
        ((256, 256), (256,), "row"),
        ((256, 448), (1, 448), "column"),
        ((256, 448), (2, 4), "block 128x128"),  # ragged: 448 = 3.5 x 128
        ((256, 448), (2, 1, 4, 1), "block 128x128"),  # ModelOpt's 4-D
        ((128, 256), (1, 2), "block 128x128"),
        ((576, 7168), (5, 56), "block 128x128"),  # DeepSeek: 576 = 4.5 x 128
        ((256, 448), (256, 14), "block 1x32"),  # MX
        ((256, 448), (8, 14), "block 32x32"),
        ((8, 256, 448), (8,), "expert"),
        ((8, 256, 448), (8, 1, 1), "expert"),
        ((8, 256, 448), (8, 256, 1), "expert row"),
        ((8, 256, 448), (8, 1, 448), "expert column"),
        ((8, 256, 448), (8, 2, 4), "expert block 128x128"),
        ((8, 256, 448), (1,), "tensor"),
        ((8, 256, 448), (3, 2, 4), "unknown"),
        ((256, 448), (3, 5, 7), "unknown"),
        ((256, 448), (255, 1), "unknown"),
        ((256, 448), (0,), "unknown"),
        ((16,), (16,), "row"),
        ((16,), (4,), "unknown"),
        ((), (1,), "tensor"),
    ],
)
def test_published_layouts(weight, scale, expected):
    assert str(granularity(weight, scale)) == expected


def test_the_declared_block_counts_where_it_fits():
    assert granularity((256, 256), (4, 4), (64, 64)).block == (64, 64)
    assert granularity((100, 100), (2, 2), (60, 60)).block == (60, 60)
    assert granularity((256, 256), (2, 2), (64, 64)).block == (128, 128)  # it does not fit


def test_a_grid_that_is_turned_is_not_taken_for_blocks_of_an_odd_shape():
    for declared in (None, (128, 128)):
        for weight, scale in (((256, 512), (4, 2)), ((576, 7168), (56, 5)), ((128, 512), (4, 1))):
            assert granularity(weight, scale, declared).kind == "unknown"
        assert granularity((4, 256, 512), (4, 4, 2), declared).kind == "unknown"
    assert granularity((256, 512), (4, 2), (64, 256)).block == (64, 256)  # as declared


@given(
    st.integers(1, 2000),
    st.integers(1, 2000),
    st.sampled_from([16, 32, 64, 128, 256, 512]),
    st.sampled_from([16, 32, 64, 128, 256, 512]),
)
def test_an_inferred_block_cuts_the_weight_into_that_grid(rows, columns, high, wide):
    grid = (math.ceil(rows / high), math.ceil(columns / wide))
    told = granularity((rows, columns), grid)
    turned = grid in {(math.ceil(columns / block), math.ceil(rows / block)) for block in (16, 32, 64, 128, 256, 512)}
    assert told.kind != "unknown" or (high != wide and (turned or 1 in grid))
    if told.kind == "block":
        assert told.block is not None
        assert grid == (math.ceil(rows / told.block[0]), math.ceil(columns / told.block[1]))
    assert granularity((rows, columns), grid, (high, wide)).kind in ("tensor", "row", "column", "block")


@given(st.lists(st.integers(0, 64), max_size=5), st.lists(st.integers(0, 64), max_size=5))
def test_any_two_shapes_have_an_answer(weight, scale):
    assert isinstance(granularity(tuple(weight), tuple(scale)), Granularity)
