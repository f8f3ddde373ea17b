"""A safetensors file that does not lie on this machine, as ``safetensors.safe_open`` gives one that does."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoint import Checkpoint, RemotePath, TensorInfo, safetensors_name
from ..errors import CheckpointError
from ..host.memory import allocate, as_bytes, shaped
from .index import Span, gathered, selectors
from .strips import Seen, as_stored


class LazyFile:
    """The part of ``safetensors.safe_open`` that readers use, as on disk. Values are read when they are asked for.

    Args:
        checkpoint: of which the file is one.
        file: which.
        threads: how many copy at once; requests are as many as ever.

    Raises:
        CheckpointError: on reading, as ``Source`` does.
    """

    def __init__(self, checkpoint: Checkpoint, file: RemotePath, threads: int) -> None:
        self._source, self._threads = checkpoint.source, threads
        self._infos = {info.name: info for info in checkpoint.by_file[file]}
        self._metadata, self._file = dict(checkpoint.metadata), file

    def __enter__(self) -> LazyFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def keys(self) -> list[str]:
        return sorted(self._infos)

    def offset_keys(self) -> list[str]:
        return list(self._infos)

    def metadata(self) -> dict[str, str] | None:
        return self._metadata or None

    def get_tensor(self, name: str) -> torch.Tensor:
        info = self._info(name)
        return self._source.read([info], {}, self._threads)[0][name]

    def get_slice(self, name: str) -> LazySlice:
        return LazySlice(self, self._info(name))

    def _info(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise CheckpointError(f"{self._file}: has no tensor {name}")
        return self._infos[name]

    def _part(self, info: TensorInfo, index: Any) -> torch.Tensor:
        def read(where: list[Span], out: torch.Tensor) -> None:
            raw = as_bytes(out) if out.is_contiguous() else allocate(out.nbytes)
            self._source.read_ranges(as_stored(info, None, tuple(where), raw, Seen()), self._threads)
            if not out.is_contiguous():
                out.copy_(shaped(raw, out.dtype, tuple(out.shape)))

        return gathered(selectors(index, info.shape), info.torch_dtype, read)


class LazySlice:
    """One tensor of a ``LazyFile``: of an index, the rows that it names are read."""

    def __init__(self, owner: LazyFile, info: TensorInfo) -> None:
        self._owner, self._info = owner, info

    def get_shape(self) -> list[int]:
        return list(self._info.shape)

    def get_dtype(self) -> str:
        return safetensors_name(self._info.dtype)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._owner._part(self._info, index)
