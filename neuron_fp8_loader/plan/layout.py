"""Layout as a decision: which scale shape a pair takes for the layers that use it. NxD's want one scale a row."""

from __future__ import annotations

from collections.abc import Mapping

from ..checkpoint import TensorInfo
from .plan import Pair

Infos = Mapping[str, TensorInfo]


def scale_shape(pair: Pair, tensors: Infos, layout: str) -> tuple[int, ...] | None:
    """The shape that a pair's scale takes in ``layout``; None where block scales become row scales.

    Args:
        pair: weight and scale.
        tensors: their headers.
        layout: ``"per_channel"`` or ``"per_tensor"``.

    Raises:
        ValueError: there is no such shape; the text says why and what to do.
    """
    weight, scale = tensors[pair.weight].shape, tensors[pair.scale].shape
    kind, experts = pair.granularity.kind, pair.granularity.experts
    if layout == "per_tensor":
        if kind == "tensor" and not experts:
            return (1,)
        raise ValueError(
            f'has one scale per {pair.granularity}; layout="per_tensor" would lose it, "per_channel" keeps more '
            '(quantization_type="per_channel_symmetric" in NxD Inference)'
        )
    if len(weight) in (2, 3) and 0 in weight and 0 not in row_scale_shape(pair, weight):
        # as many scales as a header likes to say, of no bytes
        raise ValueError(
            f'has shape {list(weight)}, rows without values; layout="keep" leaves it and its scale as they are'
        )
    if len(weight) == 2:
        if kind in ("tensor", "row"):
            return (weight[0], 1)
        if kind == "block":
            return None
    elif len(weight) == 3:
        rows = (weight[0], 1, weight[2]) if pair.transposed else (weight[0], weight[1], 1)
        # "unknown" where a stack of square matrices leaves it open: the convention tells
        # only what is one value a row for sure: a grid of blocks may have as many values by chance
        shapes = {rows, (weight[0], max(rows[1:]))}
        if pair.transposed:
            shapes.add((weight[0], weight[2], 1))
        right = kind in (("column", "unknown") if pair.transposed else ("row", "unknown"))
        if kind == "tensor" or (right and scale in shapes):
            return rows
        if kind == "block" and experts:
            return None
    if kind == "unknown":
        raise ValueError(f'{unknown(pair, tensors)}; layout="keep" leaves it as it is')
    raise ValueError(
        f"a scale of shape {list(scale)} (per {pair.granularity}) for a weight of shape {list(weight)} cannot be laid "
        'out per row; dequantize=[...] with its module\'s name, or layout="keep"'
    )


def row_scale_shape(pair: Pair, weight: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scale that block scales become: one value an output row, wherever outputs lie."""
    return (weight[0], 1, weight[2]) if pair.transposed and len(weight) == 3 else (*weight[:-1], 1)


def can_be_dequantized(pair: Pair, tensors: Infos) -> bool:
    """Is it known which part of the weight each scale value covers?"""
    kind, shape = pair.granularity.kind, tensors[pair.weight].shape
    return kind == "tensor" or (kind != "unknown" and len(shape) in (2, 3))


def unknown(pair: Pair, tensors: Infos) -> str:
    """What is not known of such a pair, for an error."""
    weight, scale = tensors[pair.weight].shape, tensors[pair.scale].shape
    return f"which part of a weight of shape {list(weight)} a scale of shape {list(scale)} covers is not known"
