"""Tensors made up as checkpoints hold them; what scales mean, read by ml_dtypes and numpy; what must be kept."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from support import e4m3fn, ieee_e4m3, raw, sqnr

from neuron_fp8_loader.plan import Pair


def values(tensor: torch.Tensor) -> np.ndarray:
    """float64 values of a scale; e8m0, and uint8 that holds it, are decoded by ml_dtypes."""
    if tensor.dtype in (torch.uint8, getattr(torch, "float8_e8m0fnu", None)):
        return raw(tensor).view(ml_dtypes.float8_e8m0fnu).astype(np.float64).reshape(tensor.shape)
    return tensor.double().numpy()


def expanded(scale: np.ndarray, shape: tuple[int, ...], granularity: str) -> np.ndarray | None:
    """A scale's values in its weight's shape, block scales repeated and cropped; None for an unknown granularity."""
    kind = granularity.removeprefix("expert ")
    if kind == "unknown":
        return None
    if kind == "tensor":
        return np.broadcast_to(scale.reshape(()), shape)
    if kind == "expert":
        return np.broadcast_to(scale.reshape(shape[0], *[1] * (len(shape) - 1)), shape)
    stack = shape[:-2]
    if kind == "row":
        return np.broadcast_to(scale.reshape(*stack, shape[-2], 1), shape)
    if kind.startswith("column"):
        return np.broadcast_to(scale.reshape(*stack, 1, shape[-1]), shape)
    rows, columns = map(int, kind.split()[-1].split("x"))
    grid = scale.reshape(*stack, -(-shape[-2] // rows), -(-shape[-1] // columns))
    return grid.repeat(rows, axis=-2).repeat(columns, axis=-1)[..., : shape[-2], : shape[-1]]


def filled(dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A tensor as a checkpoint might hold it: FP8 codes without NaN of which some are above 240, positive scales."""

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    if dtype.startswith("float8_e4m3"):
        codes = integers(0, 0x7F) | (integers(0, 2) << 7)
        if codes.numel():
            codes.view(-1)[-1] = 0x7E
        if dtype == "float8_e4m3fnuz":
            codes[codes == 0x80] = 0
        return codes.to(torch.uint8).view(getattr(torch, dtype))
    if dtype == "float8_e5m2":
        return integers(0, 0x7B).to(torch.uint8).view(torch.float8_e5m2)
    if dtype in ("uint8", "float8_e8m0fnu"):
        return integers(110, 125).to(torch.uint8).view(getattr(torch, dtype))
    if dtype in ("int8", "int32"):
        return integers(-100, 100).to(getattr(torch, dtype))
    return (torch.rand(shape, generator=generator) * 1e-3 + 1e-4).to(getattr(torch, dtype))


def assert_pair_kept(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], weight: str, scale: str, granularity: str
) -> None:
    """weight x scale, as the device reads it, is what a GPU makes of the original."""
    old, new = e4m3fn(before[weight]), ieee_e4m3(after[weight])
    assert np.isfinite(new).all()
    assert after[weight].dtype == before[weight].dtype
    assert after[weight].shape == before[weight].shape
    # only codes below 2^-5 may round, by half a subnormal step of the new weight
    assert (np.abs(2 * new - old)[np.abs(old) >= 2**-5] == 0).all()
    assert np.abs(2 * new - old).max() <= 2**-9
    assert after[scale].dtype == before[scale].dtype
    assert after[scale].shape == before[scale].shape
    scales = values(before[scale]), values(after[scale])
    np.testing.assert_array_equal(scales[1], 2 * scales[0])
    wide = [expanded(s, old.shape, granularity) for s in scales]
    if wide[0] is not None and wide[1] is not None:
        assert sqnr(old * wide[0], new * wide[1]) >= 100


def assert_bytes_kept(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], names: set[str]) -> None:
    for name in names:
        assert (after[name].dtype, after[name].shape) == (before[name].dtype, before[name].shape), name
        assert raw(after[name].reshape(-1)).tobytes() == raw(before[name].reshape(-1)).tobytes(), name


def to_bf16(exact: np.ndarray) -> np.ndarray:
    """float64 -> bfloat16 bits, nearest even, by integers: the double rounding of float64 -> float32 -> bfloat16 is
    not in it."""
    bits = np.ascontiguousarray(exact).view(np.uint64)
    sign, exponent, mantissa = bits >> 63, ((bits >> 52) & 0x7FF).astype(np.int64) - 1023, bits & ((1 << 52) - 1)
    full = mantissa | np.uint64(1 << 52)
    cut = np.where(exponent < -126, 45 + (-126 - exponent), 45).astype(np.uint64)  # bits to drop
    cut = np.minimum(cut, np.uint64(62))
    kept, rest = full >> cut, full & ((np.uint64(1) << cut) - np.uint64(1))
    half = np.uint64(1) << (cut - np.uint64(1))
    kept = kept + ((rest > half) | ((rest == half) & (kept & np.uint64(1) == 1)))
    biased = np.where(exponent < -126, 0, exponent + 126).astype(np.uint64)
    magnitude = np.where(exact == 0, 0, (biased << np.uint64(7)) + kept)
    return ((sign << np.uint64(15)) | magnitude).astype(np.uint16)


def bf16_reference(weight: torch.Tensor, scale: torch.Tensor, granularity: str) -> np.ndarray:
    """The bits of weight x scale, from float64, rounded once."""
    wide = expanded(values(scale), tuple(weight.shape), granularity)
    assert wide is not None
    return to_bf16(e4m3fn(weight).reshape(weight.shape) * wide)


def bf16_bits(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.dtype == torch.bfloat16
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def granularity_of(pair: Pair) -> str:
    """As ``expanded`` takes it; where the shapes leave it open, by the convention."""
    kind = str(pair.granularity).replace("MX group", "block").removesuffix(" (scale stored transposed)")
    return ("expert column" if pair.transposed else "expert row") if kind == "unknown" else kind
