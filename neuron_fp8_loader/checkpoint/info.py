"""What a header says of one tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import CheckpointError, Shown


# a checkpoint may have 100,000, and a frozen dataclass takes three times as long to make
class TensorInfo(NamedTuple):
    """What a header says of one tensor.

    Attributes:
        name: its key.
        dtype: torch's name of the dtype, e.g. ``"float8_e4m3fn"``.
        shape: as torch will have it.
        nbytes: length of its data.
        file: the file it is in; None for a tensor in memory.
        offset: where its data begins in the file; -1 in a ``.bin`` file or in memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path | None = None
    offset: int = -1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself. Raises CheckpointError where this torch does not know it."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(
                f"{self.file}: {Shown(self.name)} is {self.dtype}, which torch {torch.__version__} does not have; "
                "install a newer torch"
            )
        return dtype


def describe(name: str, tensor: torch.Tensor, file: Path | None = None) -> TensorInfo:
    """The header that a tensor in memory would have."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorInfo(name, dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size(), file)
