"""The rows of weights, a stripe at a time: from files, or from memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import TensorInfo
from ..errors import CheckpointError
from ..host.memory import buffer
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


@contextmanager
def from_files(files: set[Path]) -> Iterator[Fetch]:
    """Stripes of tensors in these safetensors files.

    Raises:
        CheckpointError: a file cannot be read, or ends early.
    """
    with ExitStack() as stack:
        handles = {file: _open(file, stack) for file in files}

        def fetch(stripe: Stripe, out: torch.Tensor) -> None:
            info, memory = stripe.info, buffer(out)
            assert info.file is not None
            offset = info.offset + stripe.start
            while memory:
                try:
                    got = os.preadv(handles[info.file], [memory], offset)
                except OSError as error:
                    text = f"{info.file}: reading at byte {offset} failed: {error.strerror}"
                    raise CheckpointError(text) from error
                if got == 0:
                    text = f"{info.file}: ends at byte {offset}, in the data of {info.name}; was it truncated?"
                    raise CheckpointError(text)
                offset, memory = offset + got, memory[got:]

        yield fetch


def _open(file: Path, stack: ExitStack) -> int:
    try:
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened: {error.strerror}") from error
    stack.callback(os.close, handle)
    return handle


def from_memory(tensors: Mapping[str, Any]) -> Fetch:
    """Stripes of tensors in memory, which need not be contiguous."""

    def fetch(stripe: Stripe, out: torch.Tensor) -> None:
        tensor = tensors[stripe.info.name]
        matrix = tensor[stripe.matrix] if tensor.dim() == 3 else tensor
        out.view(tensor.dtype).view(stripe.rows, stripe.columns).copy_(matrix[stripe.first : stripe.last])

    return fetch
