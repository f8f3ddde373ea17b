"""The last look before weights are handed on: does an FP8 weight hold a code that a Neuron device cannot read?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import conventions
from ..codes.formats import E4M3FN, HALF
from ..codes.kernel import Counts
from ..errors import WeightError, listing
from ..host.memory import as_bytes
from ..host.sharing import is_plain, span
from ..load.checks import count_codes
from ..load.known import nan_of
from ..options import Options


def check_ready(state_dict: Mapping[str, Any], source: str, options: Options) -> None:
    """Raise WeightError, naming them, for float8_e4m3fn weights with codes above 240.

    Args:
        state_dict: name -> tensor, in any names; other values, tensors without data (meta, fake) and e4m3fn scales
            of NVFP4 weights are passed over.
        source: where it comes from, for the message.
        options: ``nan="keep"`` lets NaN codes through, which are NaN to a GPU too; nothing lets the others through.
    """
    weights = {name: t for name, t in state_dict.items() if is_weight(name, t, state_dict)}
    known = {name: nan_of(t) for name, t in weights.items()}  # a pass over memory that need not be
    flat = {name: _bytes(t) for name, t in weights.items() if known[name] is None}
    counts = count_codes(flat, dict.fromkeys(flat, HALF), options.thread_count())
    counts |= {name: Counts(nan=nan) for name, nan in known.items() if nan is not None}
    bad = [f"{name}: {c.above} codes above 240" for name, c in counts.items() if c.above]
    if options.nan == "error":
        bad += [f"{name}: {c.nan} NaN codes" for name, c in counts.items() if c.nan]
    if bad:
        raise WeightError(
            f"{source}: a Neuron device would read inf or NaN from {listing('float8_e4m3fn weight', bad)}\n"
            "They came by a way that was not rescaled, or have no scale that could be found. Load them with "
            "neuron_fp8_loader.load_state_dict, or pass their state dict through neuron_fp8_loader.rescale_state_dict."
        )


def is_weight(name: str, value: Any, state_dict: Mapping[str, Any]) -> bool:
    """Is this an e4m3fn weight on the CPU? Markers and scales of packed (NVFP4) weights are none."""
    if not isinstance(value, torch.Tensor) or value.dtype != E4M3FN or not is_plain(value):
        return False
    if conventions.is_marker(name, tuple(value.shape)):
        return False
    owners = (state_dict.get(owner) for owner in conventions.packed_owners(name))
    return not any(isinstance(owner, torch.Tensor) and _is_packed(owner) for owner in owners)


def _is_packed(tensor: torch.Tensor) -> bool:
    return str(tensor.dtype).removeprefix("torch.") in conventions.PACKED_DTYPES


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes in any order, without a copy where it covers its memory (transposed experts do)."""
    tensor = tensor.detach()
    if not tensor.is_contiguous():
        low, high = span(tensor)
        if high - low != tensor.numel():
            return as_bytes(tensor.contiguous())
        raw = torch.empty(0, dtype=torch.uint8, device="cpu")
        return raw.set_(tensor.untyped_storage(), low, (high - low,), (1,))
    return as_bytes(tensor)
