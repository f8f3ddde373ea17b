"""Do the tests of what the ranks get see a scale that is not its weight's? Each mistake is made in our own result.

A mistake is: the scales of two experts, two rows, gate and up, the axes of a grid, or two modules, in one another's
place, on one rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch

from tests.integrations.at_hand import AT_HAND, Checkpoint
from tests.integrations.real_config import Row, at_hand, check, check_row, loaded, twin
from tests.integrations.real_moe import HALVED, REQUANTIZED, Ranks, checkpoint

Mistake = Callable[[torch.Tensor], torch.Tensor]


def halves(scale: torch.Tensor) -> torch.Tensor:
    gate, up = scale.chunk(2, dim=-1)
    return torch.cat([up, gate], dim=-1)


EXPERTS: dict[str, tuple[str, Mistake]] = {  # the weight; what happens to its scale [experts, in or 1, out]
    "two experts": ("gate_up_proj", lambda s: s[[1, 0, 2, 3]]),
    "two experts of down": ("down_proj", lambda s: s[[0, 1, 3, 2]]),
    "a row too far": ("gate_up_proj", lambda s: s.roll(1, dims=-1)),
    "a row too far of down": ("down_proj", lambda s: s.roll(1, dims=-1)),
    "gate and up": ("gate_up_proj", halves),
}
BLOCKS: dict[str, tuple[str, Mistake]] = {  # of scales [experts, in / block, out / block]
    **EXPERTS,
    "the axes": ("gate_up_proj", lambda s: s.transpose(1, 2).reshape(s.shape)),
    "a block too far along the inputs": ("gate_up_proj", lambda s: s.roll(1, dims=1)),
}
FAMILIES = ("qwen3_moe", "mixtral", "llama4", "deepseek_v3", "glm_moe_dsa", "qwen3_5_moe", "mixtral_contrib")
CASES: list[tuple[Row, str]] = [
    *(((family, form, False), "") for family in FAMILIES for form in ("channel", "block")),
    *(((family, "block", False), "blockwise") for family in (*FAMILIES, "dbrx")),  # dbrx has no scales of rows
    (("mixtral", "mx", False), "blockwise"),
    *((("llama4", form, True), "") for form in ("channel", "block")),
]


def mistaken(ranks: Ranks, name: str, mistake: Mistake) -> Ranks | None:
    """With a mistake in one tensor of the last rank; None where it changes no scale by more than half a step of FP8,
    for the codes may be the nearest with both then."""
    own = ranks[-1][name]
    changed = mistake(own)
    assert changed.shape == own.shape
    if bool(((changed / own).log2().abs().nan_to_num() <= math.log2(33 / 32)).all()):
        return None
    return [*ranks[:-1], {**ranks[-1], name: changed}]


@pytest.mark.parametrize(("row", "kind"), CASES)
def test_scales_of_experts(row: Row, kind: str) -> None:
    path, plain = checkpoint(*row)
    ranks = loaded(row[0], path, "--tp", 2, *(("--experts", kind) if kind else ()))
    twins = twin(row[0], plain, 2)
    check_row(row, kind, ranks, twins)
    for part, mistake in (BLOCKS if kind == "blockwise" else EXPERTS).values():
        name = next(n for n in sorted(ranks[-1]) if n.endswith(f".mlp_op.{part}.scale"))
        wrong = mistaken(ranks, name, mistake)
        assert wrong is not None
        with pytest.raises(AssertionError, match=re.escape(name.removesuffix("scale"))):
            check_row(row, kind, wrong, twins)


@pytest.mark.parametrize("found", [found for found in AT_HAND if found.family != "llama4"], ids=str)
def test_scales_of_real_checkpoints(found: Checkpoint) -> None:
    """Each module's scale is that of the next module of the same shape, or, where it has several values, a row off."""
    path, plain = at_hand(found)
    ranks, twins = loaded(found.family, path, "--tp", 2), twin(found.family, plain, 2)
    least = REQUANTIZED if found.requantized else HALVED
    names = [name for name in ranks[-1] if name.endswith("_proj.scale")]
    tried = 0
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        mistakes: list[Mistake] = [lambda scale: scale.roll(1, dims=0 if scale.dim() == 2 else -1)]
        if ranks[-1][other].shape == ranks[-1][name].shape:
            mistakes.append(lambda _, other=other: ranks[-1][other])  # type: ignore[misc]
        for mistake in mistakes:
            wrong = mistaken(ranks, name, mistake)
            if wrong is not None:
                tried += 1
                with pytest.raises(AssertionError, match=re.escape(name.removesuffix("scale"))):
                    check(wrong, twins, experts=least, others=least)
    assert tried >= len(names) // 2
