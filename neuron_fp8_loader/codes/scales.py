"""Rescaling a scale: same dtype, same shape, and an error where the new value does not exist."""

from __future__ import annotations

import torch

from ..errors import ScaleError
from ..host.grain import count, mapped
from .formats import Table

E8M0 = getattr(torch, "float8_e8m0fnu", None)


def is_e8m0(scale: torch.Tensor) -> bool:
    """float8_e8m0fnu, or uint8 holding the same bytes: 2^(byte - 127), 255 is NaN."""
    return scale.dtype == torch.uint8 or (E8M0 is not None and scale.dtype == E8M0)


def check_scale(scale: torch.Tensor, where: str) -> None:
    """Raise ScaleError where a scale is not finite: times any weight it would be NaN or inf on the device."""
    scale = scale.detach()
    if is_e8m0(scale):
        bad = count(lambda raw: raw == 255, scale.view(torch.uint8))
    else:
        bad = count(lambda part: ~torch.isfinite(part), scale)
    if bad:
        raise ScaleError(
            f"{where}: {bad} of {scale.numel()} scale values are not finite; the checkpoint is damaged, or "
            'nan="keep" lets them through'
        )


_LARGEST_CODE = 448.0


def check_floats(scale: torch.Tensor, where: str) -> None:
    """Raise ScaleError where a finite scale times the largest code is beyond bfloat16: an inf on the device."""
    scale = scale.detach()
    if is_e8m0(scale):
        bad = count(lambda raw: (raw > 246) & (raw < 255), scale.view(torch.uint8))
    else:
        most = torch.finfo(torch.bfloat16).max / _LARGEST_CODE
        bad = count(lambda part: torch.isfinite(part) & (part.abs() > most), scale)
    if bad:
        raise ScaleError(
            f"{where}: {bad} of {scale.numel()} scale values take codes of its weight beyond bfloat16; a scale this "
            'large is not plausible; nan="keep" lets them through'
        )


def rescaled(scale: torch.Tensor, table: Table, where: str, *, reciprocal: bool = False) -> torch.Tensor:
    """``scale`` times the table's factor (divided by it for a ``reciprocal``), as a new tensor.

    Args:
        scale: float32, bfloat16, float16, float64, float8_e8m0fnu, or uint8 holding e8m0; any shape.
        table: the method.
        where: file and tensor, for messages.
        reciprocal: ``scale`` is 1/scale; floats only, no published e8m0 scale is one.

    Raises:
        ScaleError: a finite value would become infinite, or so small that it loses bits; a reciprocal would be 0, or
            so small that 1 / it is infinite; an e8m0 value of 2^127 or NaN would have to be doubled; ``ratio`` on
            e8m0, which holds powers of two only.
    """
    if is_e8m0(scale):
        return _doubled_e8m0(scale, table, where)
    factor = 1 / table.scale_factor if reciprocal else table.scale_factor
    scale = scale.detach()
    epsilon = torch.finfo(scale.dtype).eps

    def overflows(part: torch.Tensor) -> torch.Tensor:
        return torch.isfinite(part) & ~torch.isfinite(part * factor)

    def underflows(part: torch.Tensor) -> torch.Tensor:
        result = part * factor
        exact = part.double() * factor
        lost = (result.double() - exact).abs() > epsilon * exact.abs()
        # a 0 was one before: it keeps whatever it means
        return torch.isfinite(part) & (part != 0) & (lost | ~torch.isfinite(1 / result) if reciprocal else lost)

    if lost := count(overflows, scale):
        largest = scale[overflows(scale)].abs().max().item()
        raise ScaleError(
            f"{where}: {lost} of {scale.numel()} values overflow {scale.dtype} when multiplied by "
            f"{factor:g} (largest {largest:g}); a scale this large is not plausible"
        )
    if lost := count(underflows, scale):
        smallest = scale[underflows(scale)].abs().min().item()
        raise ScaleError(
            f"{where}: {lost} of {scale.numel()} values underflow {scale.dtype} when multiplied by "
            f"{factor:g} (smallest {smallest:g}{', a reciprocal' if reciprocal else ''}); a scale like this is not "
            "plausible"
        )
    return mapped(lambda part: part * factor, scale, scale.dtype)


def _doubled_e8m0(scale: torch.Tensor, table: Table, where: str) -> torch.Tensor:
    if table.scale_factor != 2.0:
        raise ScaleError(
            f'{where}: an e8m0 scale holds powers of two, so method="{table.name}" has no value for it; '
            'use method="half"'
        )
    raw = scale.detach().view(torch.uint8)
    too_large = count(lambda part: part >= 254, raw)
    if too_large:
        raise ScaleError(
            f"{where}: {too_large} of {raw.numel()} e8m0 scale bytes are 254 (2^127, cannot be doubled) or 255 (NaN)"
        )
    return mapped(lambda part: part + 1, raw, torch.uint8).view(scale.dtype)
