"""What the hand-written preprocess scripts make of a checkpoint, worked out here from what is known of them.

They multiply codes and divide scales by 240/448, which rounds nine codes in ten, where scales are kept (blocks of
experts, rows, matrices); where blocks become rows, a row is dequantized, divided by its amax / 240 and rounded.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

from tests.support import e4m3fn

Tensors = dict[str, torch.Tensor]
_ROUND = np.float32(240 / 448)


def scripted(first: Tensors, exact: Tensors, form: str, kind: str) -> Tensors:
    """The values of a script's weights, float32, by the names of ``exact``.

    Args:
        first: the FP8 checkpoint.
        exact: its weights as weight x scale; other tensors are taken over.
        form: what a scale covers, see ``moe_checkpoints.FORMS``.
        kind: the type of the experts' layers. All other layers take one scale a row.
    """
    done = dict(exact)
    for name, weight in first.items():
        if weight.dtype != torch.float8_e4m3fn:
            continue
        to_rows = form in ("block", "mx") and (".experts." not in name or kind != "blockwise")
        value = exact[name].numpy()
        if to_rows:
            step = (np.abs(value).max(axis=1, keepdims=True) / np.float32(240)).astype(np.float32)
            step[step == 0] = 1
            codes = _rounded(value / step)
            done[name] = torch.from_numpy(codes * step)
        else:
            codes = e4m3fn(weight).astype(np.float32)
            ratio = np.divide(_rounded(codes * _ROUND) / _ROUND, codes, out=np.ones_like(codes), where=codes != 0)
            done[name] = torch.from_numpy(value * ratio)
    return done


def _rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(ml_dtypes.float8_e4m3).astype(np.float32)
