"""Elementwise torch work in pieces so small that torch does each on the calling thread.

From 32768 elements on (``at::internal::GRAIN_SIZE``, ATen/Parallel.h) torch hands elementwise work to a pool of
threads of its own. A process forked after that hangs in its first parallel operation, for the pool's threads are
not in the child; and a pool for each of our threads is many more than there are cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

GRAIN = 1 << 15


def spans(length: int) -> Iterator[slice]:
    """``length`` elements in pieces of at most ``GRAIN``."""
    for start in range(0, length, GRAIN):
        yield slice(start, min(start + GRAIN, length))


def rows_at_once(columns: int) -> int:
    """How many rows of a matrix are at most ``GRAIN`` elements; 1 where a single row is more."""
    return max(1, GRAIN // max(1, columns))


def mapped(work: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``work`` on each element: a new contiguous tensor of ``dtype`` and of the tensor's shape."""
    out = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    if tensor.numel() <= GRAIN:
        return out.copy_(work(tensor))
    if tensor.is_contiguous():
        flat, target = tensor.view(-1), out.view(-1)
        for piece in spans(tensor.numel()):
            target[piece].copy_(work(flat[piece]))
    else:  # such as an expanded scale
        for part, target in zip(tensor, out, strict=True):
            target.copy_(mapped(work, part, dtype))
    return out


def count(work: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> int:
    """How many elements ``work`` says True of."""
    if tensor.numel() <= GRAIN:
        return int(work(tensor).sum())
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        return sum(int(work(flat[piece]).sum()) for piece in spans(tensor.numel()))
    return sum(count(work, part) for part in tensor)
