"""A checkpoint on disk: its files, and what their headers say. No weight data is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError, Shown, listing
from ..host.cache import cached
from .fetch import pump
from .find import find
from .given import existing
from .headers import Header, digest_of, read_header
from .index import Index
from .info import TensorInfo
from .regular import Stamp, stamp
from .remote import RemotePath
from .remote_source import RemoteSource
from .source import BinSource, SafetensorsSource, Source

_BYTES_A_TENSOR = 400


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint and the headers of all its tensors, in the order of the files.

    Attributes:
        path: what was opened.
        files: all files.
        selected: those whose tensors are wanted: one of ``files`` if ``path`` named a shard. The others are there for
            pairing only.
        tensors: every tensor's header.
        by_file: the same, a file at a time.
        metadata: of the selected files.
        index: the index file, if there is one.
        stamps: what each file was when its header was read.
        digests: of the headers of ``files``; the same ones mean the same tensors at the same places.
    """

    path: Path
    files: tuple[Path, ...]
    selected: frozenset[Path]
    tensors: Mapping[str, TensorInfo]
    by_file: Mapping[Path, tuple[TensorInfo, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    index: Path | None = None
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    digests: tuple[bytes, ...] = ()

    @property
    def directory(self) -> Path:
        """Where its configs are: beside the index, or in the directory given, even if shards lie in a folder of it."""
        if self.index is not None:
            return self.index.parent
        return self.files[0].parent

    @property
    def is_bin(self) -> bool:
        return self.files[0].suffix == ".bin"

    @property
    def is_remote(self) -> bool:
        """Does it lie in a store?"""
        return isinstance(self.files[0], RemotePath)

    @property
    def is_part(self) -> bool:
        """Is it one shard of several?"""
        return len(self.selected) < len(self.files)

    @property
    def source(self) -> Source:
        """Where the bytes come from."""
        if self.is_remote:
            return RemoteSource(self.stamps)
        return BinSource(self.files, self.stamps) if self.is_bin else SafetensorsSource(self.stamps)

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Equal for checkpoints of the same files that have not changed since."""
        return _fingerprint(self.stamps, self.digests)

    def selected_tensors(self) -> list[TensorInfo]:
        return [info for file in self.files if file in self.selected for info in self.by_file[file]]


def open_checkpoint(path: str | os.PathLike[str], *, download: bool = False, headers_only: bool = False) -> Checkpoint:
    """Read the headers of a checkpoint.

    Headers are kept between calls: where the files are what they were, opening the next shard of a set costs a look
    at the size and time of every file, and no more.

    Args:
        path: a directory (``model.safetensors``, an index with its shards, or ``pytorch_model.bin``), a single
            ``.safetensors`` or ``.bin`` file, or an index file. A single file that an index beside it lists is
            opened with its sibling shards, so that pairs that reach across shards are found. Or one of these in a
            store, or a repository of the Hub: see ``existing``.
        download, headers_only: as ``existing`` takes them.

    Raises:
        CheckpointError: nothing there, files missing or left over, or index and shards disagree; all at once.
        OptionError: ``path`` is no path.
    """
    path = existing(path, download=download, headers_only=headers_only)
    try:
        index, files = find(path)
        if index is not None:
            index.check_files()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed: {error.strerror}") from error
    stamps = {file: stamp(file) for file in files}
    digests = tuple(_digests(stamps))
    key = ("checkpoint", _fingerprint(stamps, digests), index and (str(index.path), index.stamp))
    whole = cached(key, lambda: _Whole(path, index, stamps, digests), lambda whole: whole.nbytes)
    selected = frozenset([path]) if path in stamps else frozenset(files)
    metadata = {key: text for file in files if file in selected for key, text in whole.metadata[file].items()}
    at = index.path if index else None
    return Checkpoint(path, files, selected, whole.tensors, whole.by_file, metadata, at, stamps, digests)


def _digests(stamps: Mapping[Path, Stamp]) -> list[bytes]:
    """Of all headers, in the order of the files; from a store they come all at once."""
    if not isinstance(next(iter(stamps)), RemotePath):
        return [digest_of(file, known) for file, known in stamps.items()]
    if any(file.suffix == ".bin" for file in stamps):
        raise CheckpointError(
            f"{next(iter(stamps))}: .bin files are pickled, and read from a directory only; download them, or take "
            "the checkpoint's safetensors files"
        )
    found: dict[Path, bytes] = {}
    pump(list(stamps), lambda file: digest_of(file, stamps[file]), found.__setitem__)
    return [found[file] for file in stamps]


def _fingerprint(stamps: Mapping[Path, Stamp], digests: tuple[bytes, ...]) -> tuple[object, ...]:
    return (tuple((str(file), known) for file, known in stamps.items()), digests)


class _Whole:
    """All headers of a checkpoint together, found to fit each other. Raises CheckpointError where they do not."""

    def __init__(
        self, path: Path, index: Index | None, stamps: Mapping[Path, Stamp], digests: tuple[bytes, ...]
    ) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.by_file: dict[Path, tuple[TensorInfo, ...]] = {}
        self.metadata: dict[Path, Mapping[str, str]] = {}
        problems: list[str] = []
        for (file, known), digest in zip(stamps.items(), digests, strict=True):
            header: Header = read_header(file, known, digest)
            self.by_file[file], self.metadata[file] = header.tensors, header.metadata
            for info in header.tensors:
                first = self.tensors.setdefault(info.name, info)
                if first is not info:
                    problems.append(f"{info.name} is in {first.file and first.file.name} and again in {file.name}")
        if index is not None:
            problems += index.compare(self.by_file)
        if problems:
            advice = f"\nIf {Shown(index.path.name)} belongs to other files, move it away." if index else ""
            raise CheckpointError(
                f"{index.path if index else path}: the shards do not fit together, "
                f"{listing('problem', problems)}{advice}"
            )

    @property
    def nbytes(self) -> int:
        return _BYTES_A_TENSOR * len(self.tensors)
