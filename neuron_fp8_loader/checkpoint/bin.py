"""``.bin`` files: state dicts that torch pickles and maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .given import refuse_stand_in
from .regular import Stamp, check_unchanged, opened, read_at


def load_bin(file: Path, known: Stamp | None = None, *, device: str = "cpu") -> dict[str, Any]:
    """The state dict of a ``.bin`` file, mapped lazily; nothing but tensors and plain data is unpickled.

    Args:
        file: the file.
        known: what it was when its header was read.
        device: ``"meta"`` for headers alone.

    Raises:
        CheckpointError: not a file of plain tensors, or replaced since its header was read.
    """
    with opened(file) as (handle, now):
        refuse_stand_in(file, read_at(file, handle, 0, min(64, now.size)))
    try:
        try:
            loaded = torch.load(file, map_location=device, weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            loaded = torch.load(file, map_location=device, weights_only=True)  # written before torch 1.6
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line.strip() for line in lines if "WeightsUnpickler" in line), lines[0])  # not the advice
        raise CheckpointError(
            f"{file}: not a file of plain tensors, which is all that torch.load(weights_only=True) reads: {reason}\n"
            "Tensor subclasses (older torchao checkpoints) can be saved flattened, as safetensors, by their producer."
        ) from error
    check_unchanged(file, known or now)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{file}: holds a {type(loaded).__name__}, not a state dict")
    return dict(loaded)
