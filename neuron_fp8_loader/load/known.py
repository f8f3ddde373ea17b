"""Weights that were read and counted here and have not been changed since: the last look may pass them over.

A tensor is known by itself (held weakly), by where its memory lies, by torch's count of changes in place, and by a
fingerprint of a part of its bytes, for what changes memory behind torch's back: ``.data``, ``.numpy()``.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..codes.formats import E4M3FN
from ..codes.kernel import Counts
from ..host.memory import as_bytes, buffer
from ..plan import Recipe, Verdict

WORTH = 1 << 20
"""Bytes: a smaller weight is looked at as quickly as it is remembered."""

_SAMPLES = 64  # of as many bytes each


class _Known(NamedTuple):
    tensor: weakref.ref[torch.Tensor]
    shape: torch.Size
    version: int
    fingerprint: int
    nan: int


_known: dict[int, _Known] = {}  # by address


def remember(recipe: Recipe, state_dict: Mapping[str, Any], counts: Mapping[str, Counts], verdict: Verdict) -> None:
    """Remember the e4m3fn weights of a load that fit +-240 for certain.

    Args:
        recipe: what was done.
        state_dict: what came out, in memory that nobody else had before.
        counts: what each weight held on disk.
        verdict: which were translated.
    """
    headers = recipe.plan.tensors
    for step in recipe.weights:
        if headers[step.name].nbytes < WORTH:
            continue
        tensor, seen = state_dict.get(step.out), counts.get(step.name)
        done = step.action == "requantize" or (step.action == "translate" and verdict.applies(step))
        if seen is None or step.place is not None or not isinstance(tensor, torch.Tensor):
            continue
        if tensor.dtype == E4M3FN and (done or not seen.above):
            _remember(tensor, seen.nan)


def nan_of(tensor: torch.Tensor) -> int | None:
    """How many NaN codes a weight holds of which it is known that all others fit +-240; None: it must be looked at."""
    if tensor.device.type != "cpu" or tensor.numel() < WORTH:
        return None
    known = _known.get(tensor.data_ptr())
    own = known.tensor() if known is not None else None
    if known is None or own is None or own.data_ptr() != tensor.data_ptr():
        return None
    if tensor.dtype != E4M3FN or tensor.shape != known.shape or not tensor.is_contiguous():
        return None
    same = own._version == known.version and _fingerprint(tensor) == known.fingerprint
    return known.nan if same else None


def _remember(tensor: torch.Tensor, nan: int) -> None:
    if tensor.is_inference() or not tensor.is_contiguous():
        return  # torch does not count changes there
    address = tensor.data_ptr()

    def forget(gone: weakref.ref[torch.Tensor]) -> None:
        known = _known.get(address)
        if known is not None and known.tensor is gone:
            del _known[address]

    _known[address] = _Known(weakref.ref(tensor, forget), tensor.shape, tensor._version, _fingerprint(tensor), nan)


def _fingerprint(tensor: torch.Tensor) -> int:
    raw = as_bytes(tensor)
    step = (raw.numel() - _SAMPLES) // (_SAMPLES - 1)  # the first and the last bytes are among them
    samples = raw.as_strided((_SAMPLES, _SAMPLES), (step, 1)).contiguous().view(-1)
    return hash(bytes(buffer(samples)))
