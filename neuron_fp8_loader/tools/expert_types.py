"""Which ``quantization_type`` NxD's fused layers can hold the FP8 experts of a checkpoint with, told from headers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from ..integrations.flag import BLOCKWISE, EXPERT_WISE, FUSED_KERNEL
from ..integrations.modules import one_each
from ..plan import Plan

EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
"""In the name of a weight: it is one expert's, or that of several."""

DEQUANTIZE = "*.experts.*"

EXPERT_TYPES = ("expert_wise", "blockwise")
"""What may be asked for: one scale an output row of each expert, or blocks."""

# DBRX: rows are inputs, so scales of rows are not those of output rows
_ROWS_ARE_INPUTS = re.compile(r"\.experts\.mlp\.w2$")
_OTHERS = "all other layers take one scale an output row, under the flag"
_FROM_BLOCKS = "; blocks are requantized to rows while loading, or kept with --experts blockwise"
_ROWS = (
    "one scale an output row of each expert [experts, 1, out], which NxD's kernels for fused experts take as it is; "
    f"{_OTHERS}"
)
_BLOCKS = (
    "the blocks of the experts as they are, which loses nothing; NxD dequantizes them to bfloat16 in its kernels, so "
    f"that expert_wise_per_channel_symmetric is faster; {_OTHERS}"
)
_ONLY_BLOCKS = (
    "the blocks of the experts as they are, which loses nothing; one scale an output row cannot be had, for the rows "
    f"of w2 are inputs; {_OTHERS}"
)
_FLOATS = (
    "the experts as bfloat16, in twice the memory: NxD's layers take scales of output rows, and the rows of w2, which "
    f"have scales here, are inputs; {_OTHERS}"
)


@dataclass(frozen=True)
class ExpertType:
    """What experts are loaded with.

    Attributes:
        kind: the ``quantization_type``.
        layout: what becomes of their scales, in words.
        floats: are they loaded as bfloat16?
        blocks: keyword arguments for the blockwise type: ``quantization_block_axis``, ``quantization_block_size``, and
            ``moe_fused_nki_kernel_enabled``: that kernel would misread blocks, and some models have it unless told.
    """

    kind: str
    layout: str
    floats: bool
    blocks: dict[str, Any]


def has_experts(plan: Plan) -> bool:
    """Are there FP8 experts, of whose scales it is known what they are for?"""
    told = set(one_each(plan))
    known = [pair for pair in plan.pairs if pair.module not in told]
    if any(pair.granularity.kind == "unknown" for pair in known):
        return False
    return any(pair.granularity.experts or EXPERTS.search(pair.weight) for pair in plan.pairs)


def expert_type(plan: Plan, asked: str | None = None) -> ExpertType | None:
    """What the experts of a checkpoint are loaded with; None where it has none that are FP8.

    Args:
        plan: of the checkpoint.
        asked: ``"expert_wise"``, ``"blockwise"`` or None: what suits.

    Raises:
        OptionError: what was asked for cannot be had; the text says what can.
    """
    if asked not in (None, *EXPERT_TYPES):
        raise OptionError(f"experts={asked!r}: expected {' or '.join(map(repr, EXPERT_TYPES))}")
    if not has_experts(plan):
        if asked is not None:
            raise OptionError(f"experts={asked!r}: {plan.source} has no FP8 experts whose scales are known")
        return None
    rows_of_inputs = [p for p in plan.pairs if _ROWS_ARE_INPUTS.search(p.module) and p.granularity.kind in _FINE]
    if not rows_of_inputs:
        if asked == "blockwise":
            return ExpertType(BLOCKWISE, _BLOCKS, False, _blocks(plan))
        requantized = any(p.granularity.kind == "block" for p in plan.pairs if EXPERTS.search(p.weight))
        return ExpertType(EXPERT_WISE, _ROWS + _FROM_BLOCKS * requantized, False, {})
    square = all(p.granularity.block and len(set(p.granularity.block)) == 1 for p in rows_of_inputs)
    if asked == "expert_wise":
        raise OptionError(
            f"experts='expert_wise': {plan.source}: the rows of {rows_of_inputs[0].module} are inputs, so that its "
            f"scales are not those of output rows; {_INSTEAD[square]}"
        )
    if square:
        return ExpertType(BLOCKWISE, _ONLY_BLOCKS, False, _blocks(plan))
    if asked == "blockwise":
        raise OptionError(
            f"experts='blockwise': {plan.source}: its experts have no blocks that NxD takes; leave it out"
        )
    return ExpertType(EXPERT_WISE, _FLOATS, True, {})


def one_for_inputs(plan: Plan) -> list[str]:
    """Experts with one scale whose rows are inputs: spread over rows in a copy, it would look like one an input."""
    pairs = (pair for pair in plan.pairs if pair.granularity.kind == "tensor")
    return [pair.module for pair in pairs if _ROWS_ARE_INPUTS.search(pair.module)]


_FINE = ("row", "column", "block")
_INSTEAD = {True: "use 'blockwise'", False: "leave it out, and the experts are loaded as bfloat16"}


def _blocks(plan: Plan) -> dict[str, Any]:
    """NxD's fused weights are [experts, in, out], so the block of a weight that lies [out, in] is turned."""
    pairs = [pair for pair in plan.pairs if EXPERTS.search(pair.weight)]
    found = {block if p.transposed else block[::-1] for p in pairs if (block := p.granularity.block) is not None}
    if len(found) != 1 or any(pair.granularity.block is None for pair in pairs):
        what = f"blocks of {len(found)} sizes" if len(found) > 1 else "not all blocks" if found else "no blocks"
        raise OptionError(f"experts='blockwise': {plan.source}: its experts have {what}; use 'expert_wise'")
    return {
        "quantization_block_axis": [1, 2],
        "quantization_block_size": list(*found),
        FUSED_KERNEL: False,
    }


def dequantized_experts(plan: Plan) -> set[str]:
    """The weights that ``DEQUANTIZE`` has returned as bfloat16."""
    return {pair.weight for pair in plan.pairs if f".{DEQUANTIZE[2:-2]}." in pair.module}


def flag_value(method: str, *, floats: bool) -> Any:
    """``fp8_rescale``, in its shortest form."""
    if floats:
        return {"dequantize": [DEQUANTIZE], **({} if method == "half" else {"method": method})}
    return True if method == "half" else method
