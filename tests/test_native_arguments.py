"""The native module trusts none of its arguments: each kind of wrong one is a ValueError, and nothing is touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from neuron_fp8_loader import kernel
from neuron_fp8_loader.codes.formats import HALF

native = kernel._kernel
pytestmark = pytest.mark.skipif(native is None, reason="no native extension")

HUGE = 2**62
CODES, OUT = torch.full((4, 6), 0x41, dtype=torch.uint8), torch.full((4, 6), 0x55, dtype=torch.uint8)
WIDE, FACTORS = torch.full((4, 6), 7.0, dtype=torch.bfloat16), torch.ones(3, 2)
SCALES, MANTISSAS = torch.ones(2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
ROW_SCALES = torch.zeros(4)
ERRORS = torch.zeros(4096)
GOOD: dict[str, dict[str, object]] = {
    "translate": {
        "path": "portable",
        "src": CODES.data_ptr(),
        "src_size": 24,
        "dst": OUT.data_ptr(),
        "dst_size": 24,
        "table": HALF.symmetric,
    },
    "histogram": {"src": CODES.data_ptr(), "src_size": 24},
    "requantize": {
        "path": "portable",
        "src": CODES.data_ptr(),
        "src_size": 24,
        "dst": OUT.data_ptr(),
        "dst_size": 24,
        "rows": 4,
        "columns": 6,
        "height": 2,
        "width": 3,
        "scales": SCALES.data_ptr(),
        "scales_size": 32,
        "errors": ERRORS.data_ptr(),
        "errors_size": 4 * 4096,
        "row_scales": ROW_SCALES.data_ptr(),
        "row_scales_size": 16,
    },
}
GOOD["dequantize"] = {
    "path": "portable",
    "src": CODES.data_ptr(),
    "src_size": 24,
    "src_stride": 6,
    "dst": WIDE.data_ptr(),
    "dst_size": 48,
    "dst_stride": 6,
    "rows": 4,
    "columns": 6,
    "height": 2,
    "width": 4,
    "top": 1,
    "left": 2,
    "scales": FACTORS.data_ptr(),
    "scales_size": 24,
}
GOOD["best_mantissas"] = {
    "scales": SCALES.data_ptr(),
    "scales_size": 32,
    "rows": 2,
    "columns": 2,
    "errors": ERRORS.data_ptr(),
    "errors_size": 4 * 4096,
    "mantissas": MANTISSAS.data_ptr(),
    "mantissas_size": 16,
}
GOOD["place"] = {
    "path": "portable",
    "src": CODES.data_ptr(),
    "src_size": 24,
    "rows": 4,
    "columns": 6,
    "dst": OUT.data_ptr(),
    "dst_size": 24,
    "dst_stride": 4,
}


def wrong(arguments: dict[str, object]) -> list[tuple[str, object]]:
    """Every argument, in every way in which its kind can be wrong."""
    bad: list[tuple[str, object]] = []
    for name, value in arguments.items():
        if name == "path":
            bad += [(name, "nosuch"), (name, "")]
        elif name == "table":
            bad += [(name, b""), (name, HALF.symmetric[:-1]), (name, HALF.symmetric + b"\0")]
        elif name.endswith("_size"):
            bad += [(name, -1), (name, value - 1), (name, value + 1), (name, HUGE)]
        elif name in ("rows", "columns"):
            bad += [(name, -1), (name, value - 1), (name, value + 1), (name, HUGE), (name, 2**63 - 1)]
        elif name in ("height", "width"):
            bad += [(name, 0), (name, -1), (name, -(2**63)), (name, 1)]
        elif name in ("top", "left"):
            bad += [(name, -1), (name, 4), (name, HUGE)]
        elif name.endswith("_stride"):
            bad += [(name, -1), (name, 5), (name, 7), (name, HUGE), (name, 2**63 - 1)]
        else:  # an address
            bad += [(name, 0), (name, 2**64 - 2)]
            if name in ("scales", "mantissas", "row_scales", "errors"):
                bad += [(name, value + 2)]
            if name == "dst" and "src_stride" not in arguments:
                bad += [(name, CODES.data_ptr() + 1)]
    return bad


# dequantize is given all the memory that follows, and may take fewer columns of as many blocks
FINE = [("dequantize", "columns", 5)]
FINE += [
    ("dequantize", name, value) for name, size in (("src_size", 24), ("dst_size", 48)) for value in (size + 1, HUGE)
]
FINE += [("place", "dst_size", value) for value in (25, HUGE)]  # it is given all the memory that follows, too
CASES = [
    (call, name, value)
    for call, arguments in GOOD.items()
    for name, value in wrong(arguments)
    if (call, name) != ("histogram", "src_size") or value == -1  # any other size is one, too
    if (call, name, value) not in FINE
]


@pytest.mark.parametrize("call", GOOD)
def test_the_right_arguments_pass(call: str) -> None:
    getattr(native, call)(*GOOD[call].values())


@pytest.mark.parametrize(("call", "name", "value"), CASES)
def test_one_wrong_argument(call: str, name: str, value: object) -> None:
    arguments = GOOD[call] | {name: value}
    before, wide = OUT.clone(), WIDE.clone()
    with pytest.raises(ValueError, match=r"."):
        getattr(native, call)(*arguments.values())
    assert torch.equal(OUT, before)
    assert torch.equal(WIDE, wide)


@pytest.mark.parametrize("call", GOOD)
def test_a_missing_or_foreign_argument(call: str) -> None:
    with pytest.raises(TypeError):
        getattr(native, call)(*list(GOOD[call].values())[:-1])
    with pytest.raises(TypeError):
        getattr(native, call)(*[None] * len(GOOD[call]))


def test_products_that_wrap_around() -> None:
    """rows x columns is 0 modulo 2**64."""
    call = GOOD["requantize"] | {"rows": 2**32, "columns": 2**32, "src_size": 0, "dst_size": 0}
    with pytest.raises(ValueError, match="larger than any memory"):
        native.requantize(*call.values())


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan"), 2.0**126])
def test_scales_out_of_range(value: float) -> None:
    values = SCALES.clone()
    values.view(-1)[1] = value
    with pytest.raises(ValueError, match="scales: value 1"):
        native.requantize(*(GOOD["requantize"] | {"scales": values.data_ptr()}).values())


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_scales_that_have_no_mantissa(value: float) -> None:
    values = SCALES.clone()
    values.view(-1)[1] = value
    with pytest.raises(ValueError, match="scales: value 1"):
        native.best_mantissas(*(GOOD["best_mantissas"] | {"scales": values.data_ptr()}).values())


def _views() -> dict[str, torch.Tensor]:
    return {
        "dtype": torch.zeros(4, 6, dtype=torch.int8),
        "dimensions": torch.zeros(24, dtype=torch.uint8),
        "strided": torch.zeros(4, 12, dtype=torch.uint8)[:, ::2],
        "device": torch.zeros(4, 6, dtype=torch.uint8, device="meta"),
    }


@pytest.mark.parametrize("view", _views())
def test_wrong_tensors(view: str) -> None:
    tensor = _views()[view]
    good = (CODES, OUT, SCALES, ERRORS, ROW_SCALES)
    calls: list[Callable[[], object]] = [lambda: kernel.best_mantissas(tensor, ERRORS)]
    for place, wrong in (
        (0, tensor),
        (1, tensor),
        (1, OUT[:3]),
        (2, SCALES.float()),
        (2, SCALES[:1]),
        (3, ERRORS[:, None]),
        (3, ERRORS[:-1]),
        (4, ROW_SCALES.double()),
        (4, ROW_SCALES[:3]),
    ):
        given = (*good[:place], wrong, *good[place + 1 :])
        calls.append(lambda given=given: kernel.requantize(*given, (2, 3)))
    for call in calls:
        with pytest.raises(ValueError, match=r"expected contiguous|bytes where its shape says"):
            call()


@pytest.mark.parametrize("size", [10**9 * 2, 2**62, 2**70])
def test_blocks_larger_than_the_weight(size: int) -> None:
    if kernel.active == "torch":
        pytest.skip("native only")
    one = torch.ones(1, 1, dtype=torch.float64)
    kernel.requantize(CODES, out := torch.zeros_like(CODES), one, ERRORS, row := torch.zeros(4), (size, size))
    values = out.view(torch.float8_e4m3fn).float() * row[:, None]
    assert torch.equal(values, CODES.view(torch.float8_e4m3fn).float())
