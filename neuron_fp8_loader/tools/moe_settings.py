"""Degrees and batch size for a mixture of experts on NxD Inference, or why there are none.

What NxD checks, and where (neuronx_distributed and neuronx_distributed_inference, Neuron SDK 2.29):

- ``modules/moe_v2.py`` and ``modules/moe/moe_process_group.py``: the ranks of ``tp_degree`` are split into
  ``moe_ep_degree`` groups of ``moe_tp_degree``; with ``moe_ep_degree=1`` all ranks share each expert.
- ``parallel_layers/parallel_state.py`` and ``utils.py``: as many experts a group, as many rows or columns a rank.
- ``modules/moe/expert_mlps_v2.py``: with expert parallelism a step of generation must be worth all experts, that is,
  batch size x experts a token is not less than the number of experts.
- ``modules/moe/blockwise.py``: the kernel for prompts takes a hidden size of 512 to 8192 in steps of 512.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..conventions.experts import locate
from ..errors import OptionError, listing
from ..plan import Plan

LEAST_BLOCK = 16
"""The smallest side of a block that the flag cuts a checkpoint's into."""

_ALL_RANKS = ("mixtral", "dbrx")
"""Model types whose experts NxD Inference builds by ``modules/moe.py``, which shares each among all ranks, whatever
``moe_tp_degree`` and ``moe_ep_degree`` say."""

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k", "moe_topk")
_STEP, _SMALLEST, _LARGEST = 512, 512, 8192


@dataclass(frozen=True)
class Experts:
    """The experts of a checkpoint, those of one block; all blocks are alike.

    Attributes:
        count: how many there are in a block.
        hidden, intermediate: of ``down_proj`` [hidden, intermediate].
        block: rows and columns of a scale block of ``down_proj``; None where its scales are no blocks.
        top_k: experts a token; None where config.json does not tell.
    """

    count: int
    hidden: int
    intermediate: int
    block: tuple[int, int] | None
    top_k: int | None


def experts_in(plan: Plan) -> Experts | None:
    """The FP8 experts of a checkpoint, told from their headers; None where there are none of a known family."""
    numbers: dict[str, int] = {}
    seen: Experts | None = None
    settings = dict(plan.declared.settings)
    top_k = next((settings[key] for key in _TOP_K if isinstance(settings.get(key), int)), None)
    for pair in plan.pairs:
        located = locate(pair.module)
        if located is None or located.part != len(located.names.parts) - 1:
            continue
        shape = plan.tensors[pair.weight].shape
        if len(shape) != (3 if located.expert is None else 2):
            continue
        numbers[located.block] = numbers.get(located.block, 0) + (shape[0] if located.expert is None else 1)
        if seen is None:
            rows, columns = shape[-2:]
            block = pair.granularity.block
            if pair.transposed:
                rows, columns, block = columns, rows, block and block[::-1]
            seen = Experts(0, rows, columns, block, top_k if top_k and top_k > 0 else None)
    if seen is None:
        return None
    return Experts(max(numbers.values()), seen.hidden, seen.intermediate, seen.block, seen.top_k)


def degrees(tp: int | None, moe_tp: int | None, moe_ep: int | None) -> tuple[int, int, int]:
    """``tp_degree``, ``moe_tp_degree`` and ``moe_ep_degree``, what is not given from the others.

    Raises:
        OptionError: they contradict one another, or are too few.
    """
    for name, value in (("tp_degree", tp), ("moe_tp_degree", moe_tp), ("moe_ep_degree", moe_ep)):
        if value is not None and value < 1:
            raise OptionError(f"{name}={value}: expected a whole number from 1 up")
    if tp is None:
        if moe_tp is None or moe_ep is None:
            raise OptionError("moe_tp_degree and moe_ep_degree need tp_degree beside them, of which they are parts")
        return moe_tp * moe_ep, moe_tp, moe_ep
    if moe_tp is None and moe_ep is None:
        return tp, tp, 1
    if moe_tp is None or moe_ep is None:
        name, given = ("moe_ep_degree", moe_ep) if moe_tp is None else ("moe_tp_degree", moe_tp)
        assert given is not None
        if tp % given:
            raise OptionError(f"{name}={given}: tp_degree={tp} is no multiple of it")
        return (tp, tp // given, given) if moe_tp is None else (tp, given, tp // given)
    if moe_tp * moe_ep != tp:
        raise OptionError(
            f"moe_tp_degree={moe_tp} x moe_ep_degree={moe_ep} is {moe_tp * moe_ep}, and tp_degree={tp}: NxD splits "
            f"the ranks of tp_degree into moe_ep_degree groups of moe_tp_degree, so expected a product of {tp}"
        )
    return tp, moe_tp, moe_ep


def moe_settings(
    plan: Plan, tp: int | None, moe_tp: int | None, moe_ep: int | None, *, blockwise: bool
) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments for ``MoENeuronConfig``, and what else to know.

    Args:
        plan: of the checkpoint.
        tp, moe_tp, moe_ep: degrees; None: not given.
        blockwise: are the blocks of the experts' scales kept?

    Raises:
        OptionError: NxD cannot do it; the text says what it could do.
    """
    model_type = dict(plan.declared.settings).get("model_type")
    if model_type in _ALL_RANKS and ((moe_ep or 1) > 1 or (tp and (moe_tp or tp) != tp)):
        raise OptionError(
            f"moe_tp_degree and moe_ep_degree: {plan.source} is a {model_type}, of which NxD Inference shares each "
            "expert among all ranks, whatever they say; leave them out"
        )
    experts = experts_in(plan)
    if experts is None:
        if moe_tp is not None or moe_ep is not None:
            raise OptionError(f"moe_tp_degree and moe_ep_degree: {plan.source} has no FP8 experts of a known family")
        return {}, []
    notes = [_why(blockwise)]
    if experts.hidden % _STEP or not _SMALLEST <= experts.hidden <= _LARGEST:
        notes.append(
            f"the experts' hidden size of {experts.hidden} is not one that NxD's kernel for prompts takes (multiples "
            f"of {_STEP} from {_SMALLEST} to {_LARGEST}): blockwise_matmul_config="
            '{"use_torch_block_wise": True} does without it'
        )
    if tp is None and moe_tp is None and moe_ep is None:
        return {}, notes
    tp, own, groups = degrees(tp, moe_tp, moe_ep)
    _check(plan, experts, own, groups, blockwise=blockwise)
    notes += _on_blocks(experts, own, groups) if blockwise else []
    given: dict[str, Any] = {"tp_degree": tp}
    if moe_tp is not None or moe_ep is not None:
        given |= {"moe_tp_degree": own, "moe_ep_degree": groups}
    if groups > 1:
        least = _least_batch(experts)
        if least is None:
            notes.append(
                "with expert parallelism, NxD wants a batch size x experts a token that is not less than the number "
                f"of experts ({experts.count}); config.json does not tell how many experts a token has"
            )
        else:
            given["batch_size"] = least
            notes.append(
                f"batch_size={least} is the least with expert parallelism: x {experts.top_k} experts a token, it is "
                f"worth all {experts.count}; NxD generates with no less"
            )
    return given, notes


def _why(blockwise: bool) -> str:
    reported = "reported for Kimi-K2 on a trn2.48xlarge: 13 to 24 tokens/s with a scale a row, 7 with blocks"
    if blockwise:
        return f"the experts' blocks are kept, which loses nothing; expert_wise is faster ({reported})"
    return f"a scale a row of each expert runs natively when tokens are generated ({reported})"


def _check(plan: Plan, experts: Experts, moe_tp: int, moe_ep: int, *, blockwise: bool) -> None:
    problems = []
    if experts.count % moe_ep:
        problems.append(
            f"moe_ep_degree={moe_ep}: {experts.count} experts cannot be split evenly; expected one of "
            f"{_divisors(experts.count)}"
        )
    if experts.intermediate % moe_tp:
        problems.append(
            f"moe_tp_degree={moe_tp}: an intermediate size of {experts.intermediate} cannot be split evenly; expected "
            "a divisor of it, with a larger moe_ep_degree"
        )
    elif blockwise and experts.block is not None:
        share, size = experts.intermediate // moe_tp, experts.block[1]
        if math.gcd(size, share) < min(size, LEAST_BLOCK):
            problems.append(
                f"moe_tp_degree={moe_tp}: a rank has {share} of {experts.intermediate} rows, which only blocks of "
                f"{math.gcd(size, share)} would cover; --experts expert_wise takes any size, or a larger "
                "moe_ep_degree leaves a rank more"
            )
    if problems:
        raise OptionError(f"{plan.source}: NxD cannot share its experts so, {listing('problem', problems)}")


def _on_blocks(experts: Experts, moe_tp: int, moe_ep: int) -> list[str]:
    if experts.block is None:
        return []
    notes, share, size = [], experts.intermediate // moe_tp, experts.block[1]
    if math.gcd(size, share) < size:
        notes.append(
            f"a rank's {share} of {experts.intermediate} rows are not whole blocks of {size}: the flag makes them "
            f"blocks of {math.gcd(size, share)} and repeats their scales, which is exact"
        )
    if moe_ep > 1:
        notes.append(
            "reported for Neuron SDK 2.29: its kernels for blocks gave wrong output with moe_ep_degree=2; compare a "
            "few prompts with expert_wise"
        )
    return notes


def _least_batch(experts: Experts) -> int | None:
    return None if experts.top_k is None else -(-experts.count // experts.top_k)


def _divisors(number: int) -> str:
    # no model has so many experts that the first divisors are not among these
    found = [n for n in range(1, min(number, 1 << 16) + 1) if number % n == 0]
    return ", ".join(map(str, found[:8])) + (" ..." if len(found) > 8 else "")
