"""Prints the table of docs/models.md, from a run of the real NxD Inference on a CPU.

    NXD_SRC=... NXDI_SRC=... MINIMAX_SRC=... python -W ignore -m tests.integrations.moe_matrix [TP [FAMILY ...]]

Each cell is a checkpoint that is made, loaded under the flag, sharded, and held row by row against its float32 twin.
"""

from __future__ import annotations

import sys
from collections.abc import Collection

from neuron_fp8_loader import Fp8LoaderError
from tests.integrations.real_moe import MX_BLOCKS, TYPES, checkpoint, shards, twin, worst

ROWS = [
    ("qwen3_moe", "channel", False),
    ("qwen3_moe", "tensor", False),
    ("qwen3_moe", "block", False),
    ("qwen3_moe", "mx", False),
    ("mixtral", "channel", False),
    ("mixtral", "tensor", False),
    ("mixtral", "block", False),
    ("mixtral", "mx", False),
    ("llama4", "channel", False),
    ("llama4", "block", False),
    ("llama4", "channel", True),
    ("llama4", "block", True),
    ("dbrx", "tensor", False),
    ("dbrx", "channel", False),
    ("dbrx", "block", False),
    ("dbrx", "mx", False),
    ("deepseek_v3", "channel", False),
    ("deepseek_v3", "tensor", False),
    ("deepseek_v3", "block", False),
    ("glm_moe_dsa", "channel", False),
    ("glm_moe_dsa", "block", False),
    ("qwen3_5_moe", "channel", False),
    ("qwen3_5_moe", "block", False),
    ("mixtral_contrib", "channel", False),
    ("mixtral_contrib", "block", False),
    ("minimax_m2", "channel", False),
    ("minimax_m2", "tensor", False),
    ("minimax_m2", "block", False),
]
FORMS = {"channel": "a row", "tensor": "a matrix", "block": "128x128", "mx": "MX 1x32"}


def cell(family: str, form: str, stack: bool, kind: str, tp: int) -> str:
    """Least dB of any expert's output row, and of any row of the other FP8 layers; or that it is refused."""
    fp8, plain = checkpoint(family, form, stack)
    given = MX_BLOCKS if (form, kind) == ("mx", "blockwise") else TYPES[kind]
    try:
        ranks = shards(family, fp8, tp, **given)
    except Fp8LoaderError:
        return "refused"
    found = worst(ranks, twin(family, plain, tp))
    experts = [v for n, v in found.items() if ".expert_mlps." in n]
    others = [v for n, v in found.items() if ".expert_mlps." not in n]
    return f"{min(experts):.0f} / {f'{min(others):.0f}' if others else 'bf16'}"


def floats(family: str, form: str, stack: bool, tp: int) -> str:
    """``quantized=False``, everything dequantized: is each value the checkpoint's, rounded to bfloat16 once?"""
    fp8, plain = checkpoint(family, form, stack)
    try:
        ranks = shards(family, fp8, tp, quantized=False, fp8_rescale={"dequantize": ["*"]})
    except Fp8LoaderError:
        return "refused"
    both = list(zip(ranks, twin(family, plain, tp), strict=True))
    same = all(r.keys() == t.keys() and all(r[n].equal(t[n].to(r[n].dtype)) for n in t) for r, t in both)
    return "exact" if same else "wrong"


def main(tp: int, families: Collection[str]) -> None:
    print(f"| family | experts on disk | a scale for | {' | '.join(TYPES)} | bf16 |")
    print("|---" * (4 + len(TYPES)) + "|")
    for family, form, stack in (row for row in ROWS if not families or row[0] in families):
        cells = [*(cell(family, form, stack, kind, tp) for kind in TYPES), floats(family, form, stack, tp)]
        lying = "stacked" if stack else "one below another" if family == "dbrx" else "one by one"
        print(f"| {family} | {lying} | {FORMS[form]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2, sys.argv[2:])
