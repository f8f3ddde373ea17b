"""The rows of weights, a stripe at a time: from files, or from memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import Fill, TensorInfo
from ..host.parallel import PIECE

_TILE = 64  # rows that a line of the cache holds once they lie side by side


@dataclass(slots=True)
class Stripe:
    """Rows ``first`` to ``last`` of one matrix of a tensor (0 where it has one)."""

    info: TensorInfo
    matrix: int
    first: int
    last: int

    @property
    def rows(self) -> int:
        return self.last - self.first

    @property
    def columns(self) -> int:
        return self.info.shape[-1]

    @property
    def start(self) -> int:
        """Where its bytes begin in the tensor's."""
        return (self.matrix * self.info.shape[-2] + self.first) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        return self.info.nbytes // self.info.numel * self.columns

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


Fetch = Callable[[Stripe, torch.Tensor], None]
"""Fills uint8 [stripe.nbytes] with a stripe's bytes. Several threads may call it at once."""


def stripes(info: TensorInfo, whole: int = 1, nbytes: int = PIECE) -> Iterator[Stripe]:
    """Cut a matrix, or a stack of them, into stripes of up to ``nbytes``, each a multiple of ``whole`` rows."""
    if info.numel == 0:
        return
    rows, matrices = info.shape[-2], info.shape[0] if len(info.shape) == 3 else 1
    step = max(1, nbytes // Stripe(info, 0, 0, 0).row_bytes)
    if step >= _TILE:
        step -= step % _TILE
    step = max(whole, step - step % whole)
    for matrix in range(matrices):
        for first in range(0, rows, step):
            yield Stripe(info, matrix, first, min(first + step, rows))


def from_source(fill: Fill) -> Fetch:
    """Stripes of tensors of a checkpoint, from what ``Source.opened`` gives."""
    return lambda stripe, out: fill(stripe.info, stripe.start, out)


def from_memory(tensors: Mapping[str, Any]) -> Fetch:
    """Stripes of tensors in memory, which need not be contiguous."""

    def fetch(stripe: Stripe, out: torch.Tensor) -> None:
        tensor = tensors[stripe.info.name]
        matrix = tensor[stripe.matrix] if tensor.dim() == 3 else tensor
        out.view(tensor.dtype).view(stripe.rows, stripe.columns).copy_(matrix[stripe.first : stripe.last])

    return fetch
