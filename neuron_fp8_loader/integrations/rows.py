"""The rows of an FP8 weight [out, in], wherever and however it lies: some of their bytes, or what stands for all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch

from ..host.memory import as_bytes, buffer

_GROUPS, _GROUP = 4, 8  # of a sample, about: so many groups of columns a row, that side by side, as memory has them
_CHUNK = 2**20  # bytes of rows looked at at once, or a row


def as_rows(matrix: torch.Tensor) -> list[bytes]:
    """The rows of a contiguous uint8 matrix."""
    raw, width = buffer(as_bytes(matrix)), matrix.shape[1]
    return [bytes(raw[start : start + width]) for start in range(0, matrix.numel(), width)]


def digests_of(weight: torch.Tensor, rows: Sequence[int]) -> Iterator[bytes]:
    """The SHA-256 of each of these rows, which are in rising order."""
    for _, part in _parts(weight, rows):
        raw, width = buffer(as_bytes(part)), part.shape[1]
        for start in range(0, part.numel(), width):
            yield hashlib.sha256(raw[start : start + width]).digest()


def zeros_in(weight: torch.Tensor, samples: list[bytes]) -> list[int]:
    """The rows that are zeros, of either sign. Only those of which the sample is are read."""
    found: list[int] = []
    for rows, part in _parts(weight, [n for n, sample in enumerate(samples) if not sample.strip(b"\0\x80")]):
        largest = (part & 0x7F).amax(dim=1).tolist()
        found += [n for n, code in zip(rows, largest, strict=True) if code == 0]
    return found


def _parts(weight: torch.Tensor, rows: Sequence[int]) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
    """(numbers, uint8 [some, width], contiguous) of these rows, which are in rising order."""
    raw, most = weight.view(torch.uint8), max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(rows), most):
        some = rows[start : start + most]
        side_by_side = some[-1] - some[0] == len(some) - 1
        part = raw[some[0] : some[-1] + 1] if side_by_side else raw[torch.tensor(some, device="cpu")]
        yield some, part.contiguous()


def sample_of(weight: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns], a copy: groups of columns all over a weight [rows, width], wherever and however it lies.

    A group is one access to memory: looking at every weight must cost little beside reading it.
    """
    raw, width = weight.view(torch.uint8), weight.shape[1]
    step = max(1, width // _GROUP // _GROUPS)
    aligned = raw.storage_offset() % _GROUP == 0 and raw.stride(0) % _GROUP == 0 and raw.data_ptr() % _GROUP == 0
    if width >= _GROUP and width % _GROUP == 0 and raw.stride(1) == 1 and aligned:
        groups = raw.view(torch.int64)[:, ::step]
        return groups.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    first = torch.arange(0, max(1, width // _GROUP), step, device="cpu") * _GROUP
    columns = (first[:, None] + torch.arange(min(_GROUP, width), device="cpu")).flatten()
    return raw[:, columns].contiguous()  # index_select would copy a weight that is not contiguous
