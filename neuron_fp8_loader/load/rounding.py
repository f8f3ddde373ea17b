"""Value x scale, rounded to bfloat16 once: in torch."""

from __future__ import annotations

import torch

_TILE = 1 << 18  # elements at a time; their float64 products are eight times that


def dequantize_slice(
    codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], offset: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """A part of an FP8 matrix, times its scales, as bfloat16: the exact product, rounded to nearest even once.

    Args:
        codes: float8_e4m3fn, or uint8 with the same bytes, [rows, columns].
        scale: float32, one entry a block, ceil((offset + size) / block) of them in each dimension.
        block: (rows, columns) of a block.
        offset: (rows, columns) by which the part begins inside the first block; each less than the block.

    Returns:
        bfloat16 [rows, columns].
    """
    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device="cpu")
    step = max(1, _TILE // max(1, columns))
    across = (torch.arange(columns, device="cpu") + offset[1]) // block[1]
    for top in range(0, rows, step):
        bottom = min(rows, top + step)
        down = (torch.arange(top, bottom, device="cpu") + offset[0]) // block[0]
        factor = scale[down][:, across]
        out[top:bottom] = _product(codes[top:bottom].view(torch.float8_e4m3fn), factor)
    return out


def _product(codes: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    near = codes.float() * factor
    # The float32 product decides the bfloat16 one, but where it lies halfway between two of them and is not exact
    # itself: there it is moved a step towards the exact product, which float64 holds.
    halfway = (near.view(torch.int32) & 0xFFFF) == 0x8000
    if bool(halfway.any()):
        exact = codes[halfway].double() * factor[halfway].double()
        at = near[halfway]
        towards = torch.where(exact > at.double(), torch.inf, -torch.inf).float()
        near[halfway] = torch.where(exact == at.double(), at, torch.nextafter(at, towards))
    return near.bfloat16()
