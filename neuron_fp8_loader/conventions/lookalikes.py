"""Tensors that look like FP8 weights and are not: scales of packed weights, zero points, and markers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .convention import rename
from .registry import conventions, follows_a_rule, weight_tails

PACKED_DTYPES = ("uint8", "int8", "int32", "float4_e2m1fn_x2")
"""dtypes of weights that hold other formats: NVFP4, MXFP4, INT8, INT4."""

# where the packed values lie, if a convention says that the weight would be "{}"
_PACKED = ("{}", "{}_packed", "{}_blocks")


def packed_owners(scale: str) -> Iterator[str]:
    """Names of the tensors whose (NVFP4, ...) scale ``scale`` would be; NVFP4 scales are e4m3fn too.

    The same rules as for FP8 weights, with ``X.weight_packed`` for ``X.weight``.
    """
    if not follows_a_rule(scale):
        return
    for rule in conventions():
        weight = rule.weight_of(scale)
        if weight is not None:
            for template in _PACKED:
                owner = rename("{}", template, weight)
                if owner is not None:
                    yield owner


_OTHER_ENDINGS = ("", "_weight", ".weight_packed", "_packed", "_blocks", ".qweight", "_qweight")


def weight_endings() -> tuple[str, ...]:
    """What may follow a module's name in its weight's: FP8 weights', and those of formats that are left alone."""
    return (*weight_tails(), *_OTHER_ENDINGS)


_MARKER = re.compile(r"(^|\.)scaled_fp8$")


def is_marker(name: str, shape: tuple[int, ...]) -> bool:
    """Is it FP8 by dtype alone?

    ComfyUI's ``scaled_fp8`` is an empty or two-element tensor whose dtype is the message, not its values;
    compressed-tensors may store zero points (all 0) in the weight's dtype.
    """
    if name.endswith("_zero_point"):
        return True
    return name.endswith("scaled_fp8") and _MARKER.search(name) is not None and shape in ((0,), (2,))
