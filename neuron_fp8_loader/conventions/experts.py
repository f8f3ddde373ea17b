"""How families of models name the experts of a mixture: one line a family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class ExpertNames:
    """The names of one family.

    Attributes:
        models: who uses them.
        parts: the projections. Of one expert: gate, up, down, each [out, in], as modules ``{block}.experts.{number}.
            {part}``. Of a stack of all experts: gate_up (gate before up, not interleaved) and down, as parameters
            ``{block}.experts.{part}``; whether they lie as [experts, out, in] or [experts, in, out] is told from
            their shapes.
        stacked: are all experts in one tensor?
        within: what the block calls its experts.
    """

    models: str
    parts: tuple[str, ...]
    stacked: bool = False
    within: str = "experts"


FAMILIES: tuple[ExpertNames, ...] = (
    ExpertNames(
        "Qwen2-MoE, Qwen3-MoE, DeepSeek, GLM, Kimi, MiMo, Ling, Llama 4 quantized per expert",
        ("gate_proj", "up_proj", "down_proj"),
    ),
    ExpertNames("Mixtral, MiniMax-M2, Phi-3.5-MoE, DeepSeek inference code", ("w1", "w3", "w2")),
    ExpertNames("Llama 4, transformers' fused experts", ("gate_up_proj", "down_proj"), stacked=True),
)

ROUTERS = ("gate.weight", "router.weight")
"""What a block calls its router, [experts, hidden]: it tells how many experts there must be."""


_WITHIN = tuple(dict.fromkeys(names.within for names in FAMILIES))


class Located(NamedTuple):
    """Where a module belongs: part ``names.parts[part]`` of an expert (None: of all of them) of ``block``."""

    block: str
    names: ExpertNames
    expert: int | None
    part: int


def locate(module: str) -> Located | None:
    """Which expert's projection a module is; None where it is none of a known family.

    >>> locate("model.layers.0.mlp.experts.12.up_proj")[2:]
    (12, 1)
    """
    head, _, last = module.rpartition(".")
    for names in FAMILIES:
        if last not in names.parts:
            continue
        within, expert = head, None
        if not names.stacked:
            within, _, number = head.rpartition(".")
            # as many digits as any model has experts; "007" would be a second name of 7
            if not (number.isascii() and number.isdecimal() and len(number) < 7 and str(int(number)) == number):
                continue
            expert = int(number)
        if f".{within}".endswith(f".{names.within}"):
            return Located(within[: -len(names.within)].rstrip("."), names, expert, names.parts.index(last))
    return None


def is_among_experts(name: str) -> bool:
    """Does the name of a tensor or module say that it belongs to the experts of a block?"""
    return any(name.startswith(f"{within}.") or f".{within}." in name for within in _WITHIN)
