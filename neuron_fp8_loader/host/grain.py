"""Elementwise torch work in pieces so small that torch does each on the calling thread.

From 32768 elements on (``at::internal::GRAIN_SIZE``, ATen/Parallel.h) torch hands elementwise work to a pool of
threads of its own. A process forked after that hangs in its first parallel operation, for the pool's threads are
not in the child; and a pool for each of our threads is many more than there are cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

GRAIN = (1 << 15) - 1


def rows_at_once(columns: int) -> int:
    """How many rows of a matrix are at most ``GRAIN`` elements; 1 where a single row is more."""
    return max(1, GRAIN // max(1, columns))


def entries(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``table[index]`` for a table of one dimension; indexing itself starts torch's threads, however small."""
    return table.index_select(0, index.reshape(-1).long()).view(index.shape)


def copy_matrix(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a matrix of any strides into another of its shape."""
    rows, columns = source.shape
    for top in range(0, rows, rows_at_once(columns)):
        some = slice(top, top + rows_at_once(columns))
        for left in range(0, columns, GRAIN):
            target[some, left : left + GRAIN].copy_(source[some, left : left + GRAIN])


def mapped(work: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``work`` on each element: a new contiguous tensor of ``dtype`` and of the tensor's shape."""
    out = torch.empty(tensor.shape, dtype=dtype, device="cpu")
    for piece, target in zip(_pieces(tensor), _pieces(out), strict=True):
        target.copy_(work(piece))
    return out


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in memory of its own."""
    if tensor.numel() <= GRAIN:
        return tensor.detach().clone(memory_format=torch.contiguous_format)
    return mapped(torch.Tensor.detach, tensor, tensor.dtype)


def count(work: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> int:
    """How many elements ``work`` says True of."""
    return sum(int(work(piece).sum()) for piece in _pieces(tensor))


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views that together are the tensor, along its first dimensions: the same for all tensors of one shape."""
    if tensor.numel() <= GRAIN:
        yield tensor
        return
    inner = tensor.numel() // len(tensor)
    if inner > GRAIN:
        for part in tensor:
            yield from _pieces(part)
    else:
        yield from tensor.split(rows_at_once(inner))
