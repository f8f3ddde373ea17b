"""Rescaling a scale: same dtype, same shape, and an error where the new value does not exist."""

from __future__ import annotations

import torch

from ..errors import ScaleError
from .formats import Table

E8M0 = getattr(torch, "float8_e8m0fnu", None)


def is_e8m0(scale: torch.Tensor) -> bool:
    """float8_e8m0fnu, or uint8 holding the same bytes: 2^(byte - 127), 255 is NaN."""
    return scale.dtype == torch.uint8 or (E8M0 is not None and scale.dtype == E8M0)


def check_scale(scale: torch.Tensor, where: str) -> None:
    """Raise ScaleError where a scale is not finite: times any weight it would be NaN or inf on the device."""
    bad = _e8m0_bytes(scale) == 255 if is_e8m0(scale) else ~torch.isfinite(scale)
    count = int(bad.sum())
    if count:
        raise ScaleError(
            f"{where}: {count} of {scale.numel()} scale values are not finite; the checkpoint is damaged, or "
            'nan="keep" lets them through'
        )


def rescaled(scale: torch.Tensor, table: Table, where: str, *, reciprocal: bool = False) -> torch.Tensor:
    """``scale`` times the table's factor (divided by it for a ``reciprocal``), as a new tensor.

    Args:
        scale: float32, bfloat16, float16, float64, float8_e8m0fnu, or uint8 holding e8m0; any shape.
        table: the method.
        where: file and tensor, for messages.
        reciprocal: ``scale`` is 1/scale; floats only, no published e8m0 scale is one.

    Raises:
        ScaleError: a finite value would become infinite; an e8m0 value of 2^127 or NaN would have to be doubled;
            ``ratio`` on e8m0, which holds powers of two only.
    """
    if is_e8m0(scale):
        return _doubled_e8m0(scale, table, where)
    factor = 1 / table.scale_factor if reciprocal else table.scale_factor
    result = scale.detach() * factor
    lost = torch.isfinite(scale) & ~torch.isfinite(result)
    if bool(lost.any()):
        raise ScaleError(
            f"{where}: {int(lost.sum())} of {scale.numel()} values overflow {scale.dtype} when multiplied by "
            f"{factor:g} (largest {scale[lost].abs().max().item():g}); a scale this large is not plausible"
        )
    return result


def _e8m0_bytes(scale: torch.Tensor) -> torch.Tensor:
    return scale.detach().contiguous().view(torch.uint8)


def _doubled_e8m0(scale: torch.Tensor, table: Table, where: str) -> torch.Tensor:
    if table.scale_factor != 2.0:
        raise ScaleError(
            f'{where}: an e8m0 scale holds powers of two, so method="{table.name}" has no value for it; '
            'use method="half"'
        )
    raw = _e8m0_bytes(scale)
    too_large = int((raw >= 254).sum())
    if too_large:
        raise ScaleError(
            f"{where}: {too_large} of {raw.numel()} e8m0 scale bytes are 254 (2^127, cannot be doubled) or 255 (NaN)"
        )
    return (raw + 1).view(scale.dtype)
