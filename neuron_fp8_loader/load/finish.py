"""The last step of every driver: the tensors as they come out, under their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..codes.formats import E4M3FN
from ..host.memory import allocate, as_bytes, shaped
from ..host.parallel import pieces
from ..plan import Recipe, Step
from ..plan.qkv import Piece


def finished(
    recipe: Recipe, tensors: Mapping[str, Any], made: Mapping[str, torch.Tensor], fused: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """The tensors as they come out, under their names; ``made`` takes the place of what was there, a fused tensor that
    of the first tensor that went into it."""
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        step = recipe.steps.get(name)
        if step is None:  # no tensor
            out[name] = tensor
        elif step.place is not None:
            out[step.out] = fused[step.out]
        elif step.action != "drop":
            whole = as_codes(step, made.get(name, tensor))
            if step.pieces:
                out.update((piece.name, _piece(whole, piece)) for piece in step.pieces)
            else:
                out[step.out] = whole
    return out


def _piece(whole: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The rows of one part of every chunk, in memory of their own."""
    row = whole.numel() // max(1, whole.shape[0]) * whole.element_size()
    raw = allocate(torch.Size(piece.shape).numel() * whole.element_size())
    chunks = as_bytes(whole.contiguous()).view(-1, piece.chunk * row)
    start, stop = (bound * row for bound in piece.rows)
    for chunk, into in zip(chunks, raw.view(len(chunks), stop - start), strict=True):
        for first, last in pieces(stop - start):
            into[first:last].copy_(chunk[start + first : start + last])
    return shaped(raw, whole.dtype, piece.shape)


def as_codes(step: Step, tensor: torch.Tensor) -> torch.Tensor:
    """A weight of another FP8 dtype, translated where it lay, gets the dtype of its new codes."""
    if step.action == "translate" and tensor.dtype != E4M3FN:
        return tensor.view(E4M3FN)
    return tensor
