"""Interleaved queries, keys and values under the flag: a port's layers are three, so that is what they are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..conventions import module_of
from ..errors import OptionError
from ..options import Options
from ..plan import Plan
from ..plan.qkv import parts_of, unfused
from .flag import dequantized
from .modules import patterns

__all__ = ["fused_again", "interleaved_as_floats", "parts_dequantized", "split_with_rows", "unfused"]


def split_with_rows(plan: Plan, options: Mapping[str, Any]) -> dict[str, str]:
    """The option that splits them, where every row gets a scale of its own; none where the options say otherwise."""
    if not plan.interleaved or "qkv" in options or Options.of(options).layout != "per_channel":
        return {}
    return {"qkv": "split"}


def interleaved_as_floats(plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that split them as bfloat16, for a model without quantized layers: it would misread the scales."""
    if not plan.interleaved or "qkv" in options:
        return {}
    fp8 = [pair.module for pair in plan.pairs if pair.weight in plan.interleaved]
    return {"qkv": "split", "dequantize": [*Options.of(options).dequantize, *patterns(plan, fp8)]}


def fused_again(plan: Plan, chosen: Iterable[str]) -> list[str]:
    """Modules of ``unfused(plan)`` as those of the plan.

    Raises:
        OptionError: of queries, keys and values in one tensor, only some are among them.
    """
    wanted = set(chosen)
    found = []
    for module in (pair.module for pair in plan.pairs):
        parts = parts_of(plan, module)
        inside = [part for part in parts if part in wanted]
        if inside and len(inside) < len(parts):
            raise OptionError(
                f"{plan.source}: {module} holds {', '.join(parts)}, of which NxD would quantize some, and not "
                f"{', '.join(inside)}; name all three in modules_to_not_convert, or none"
            )
        found += [module] * bool(inside)
    return found


def parts_dequantized(plan: Plan, options: Mapping[str, Any]) -> set[str]:
    """The FP8 weights of ``unfused(plan)`` that these options have returned as bfloat16."""
    names: set[str] = set()
    for name in dequantized(plan, options):
        fused = name in plan.interleaved
        names |= {f"{part}.weight" for part in parts_of(plan, module_of(name))} if fused else {name}
    return names
