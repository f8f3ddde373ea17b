"""A checkpoint on disk: which files it is made of, and what their headers say. No weight data is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors
import torch

from ..codes.formats import E4M3FN, E4M3FNUZ
from ..errors import CheckpointError, listing
from .bin import load_bin
from .info import TensorInfo, describe
from .source import BinSource, SafetensorsSource, Source

_INDEX_SUFFIX = ".index.json"
_SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_INDEXES = tuple(name + _INDEX_SUFFIX for name in _SINGLE)
_BIN = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<ext>\.safetensors|\.bin)$")

_LONGEST_HEADER = 100_000_000  # safetensors refuses longer ones

# safetensors' names of dtypes -> (torch's name, bits an element)
_DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 8), "U8": ("uint8", 8), "I8": ("int8", 8), "U16": ("uint16", 16), "I16": ("int16", 16),
    "U32": ("uint32", 32), "I32": ("int32", 32), "U64": ("uint64", 64), "I64": ("int64", 64),
    "F16": ("float16", 16), "BF16": ("bfloat16", 16), "F32": ("float32", 32), "F64": ("float64", 64),
    "C64": ("complex64", 64), "F8_E4M3": ("float8_e4m3fn", 8), "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8), "F4": ("float4_e2m1fn_x2", 4),
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """The files of a checkpoint and the headers of all its tensors, in the order of the files.

    ``selected`` is a subset of ``files`` when the path named one shard: the others are there for pairing only.
    ``digests`` are of the headers of ``files``, in which the same ones mean the same tensors at the same places.
    """

    path: Path
    files: tuple[Path, ...]
    selected: frozenset[Path]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    index: Path | None = None
    digests: tuple[bytes, ...] = ()

    @property
    def directory(self) -> Path:
        return self.files[0].parent

    @property
    def is_bin(self) -> bool:
        return self.files[0].suffix == ".bin"

    @property
    def source(self) -> Source:
        """Where the bytes come from."""
        return BinSource(self.files) if self.is_bin else SafetensorsSource()

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Equal for checkpoints of the same files that have not changed since."""
        status = [file.stat() for file in self.files]
        return (self.files, self.digests, tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns) for s in status))

    def selected_tensors(self) -> list[TensorInfo]:
        return [info for info in self.tensors.values() if info.file in self.selected]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        path: a directory (``model.safetensors``, an index with its shards, or ``pytorch_model.bin``), a single
            ``.safetensors`` or ``.bin`` file, or an index file. A single file that an index beside it lists is
            opened with its sibling shards, so that pairs that reach across shards are found.

    Raises:
        CheckpointError: nothing there, files missing or left over, or index and shards disagree; all at once.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    index, files = _find(path)
    if len({file.suffix for file in files}) > 1:
        raise CheckpointError(f"{index}: lists files of several formats; expected .safetensors or .bin throughout")
    selected = (
        frozenset([path]) if path.is_file() and path.name.endswith((".safetensors", ".bin")) else frozenset(files)
    )
    weight_map = _read_index(index) if index else None
    if weight_map is not None:
        _check_shards(index, weight_map, files)  # type: ignore[arg-type]
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    problems: list[str] = []
    digests: list[bytes] = []
    for file in files:
        infos, meta, digest = _headers(file)
        digests.append(digest)
        if file in selected:
            metadata.update(meta)
        for info in infos:
            first = tensors.setdefault(info.name, info)
            if first is not info:
                problems.append(f"{info.name} is in {_name(first.file)} and again in {file.name}")
    if weight_map is not None:
        problems += _compare(weight_map, tensors)
    if problems:
        raise CheckpointError(f"{index or path}: the shards do not fit together, {listing('problem', problems)}")
    return Checkpoint(path, tuple(files), selected, tensors, metadata, index, tuple(digests))


def _find(path: Path) -> tuple[Path | None, list[Path]]:
    """The index, if there is one, and the files of the checkpoint."""
    if path.is_dir():
        for single in _SINGLE:
            if (path / single).is_file():
                return _own_index(path / single), [path / single]
        index = _index_in(path)
        if index:
            return index, _listed(index)
        shards = sorted(path.glob("*.safetensors"))
        if len(shards) > 1 or (shards and _SHARD.match(shards[0].name)):
            _require_one_set(path, shards)
        if not shards:
            shards = [path / name for name in _BIN if (path / name).is_file()][:1]
        if not shards:
            raise CheckpointError(
                f"{path}: no checkpoint here; expected *.safetensors, *.safetensors.index.json or pytorch_model.bin"
            )
        return None, shards
    if path.name.endswith(_INDEX_SUFFIX):
        return path, _listed(path)
    if path.suffix not in (".safetensors", ".bin"):
        raise CheckpointError(f"{path}: expected a directory, a .safetensors or .bin file, or an index (.index.json)")
    for index in sorted(path.parent.glob("*" + _INDEX_SUFFIX)):
        if path.name in _read_index(index).values():
            return index, _listed(index)
    return None, [path]


def _own_index(file: Path) -> Path | None:
    """The index of a checkpoint of one file; one that lists shards is left over from another form of it."""
    index = file.with_name(file.name + _INDEX_SUFFIX)
    return index if index.is_file() and set(_read_index(index).values()) == {file.name} else None


def _index_in(directory: Path) -> Path | None:
    found = sorted(directory.glob("*.safetensors" + _INDEX_SUFFIX))
    if not any(
        directory.glob("*.safetensors")
    ):  # else an index of .bin files is left over: they are often not fetched
        found = found or sorted(directory.glob("*.bin" + _INDEX_SUFFIX))
    named = [index for index in found if index.name in _INDEXES]
    choice = named or found
    if len(choice) > 1:
        raise CheckpointError(
            f"{directory}: {len(choice)} indexes ({', '.join(i.name for i in choice)}); give the path of one of them"
        )
    return choice[0] if choice else None


def _require_one_set(directory: Path, shards: list[Path]) -> None:
    """Several files and no index: only a complete numbered set tells by itself that it is one checkpoint."""
    parts = [_SHARD.match(shard.name) for shard in shards]
    sets = {(m["stem"], m["count"]) for m in parts if m}
    if len(sets) != 1 or None in parts:
        raise CheckpointError(
            f"{directory}: {len(shards)} .safetensors files and no index; give the path of one file. "
            f"There are {', '.join(s.name for s in shards[:5])}{' ...' if len(shards) > 5 else ''}"
        )
    count = int(next(iter(sets))[1])
    if len(shards) != count:
        there = {int(m["number"]) for m in parts if m}
        missing = sorted(set(range(1, count + 1)) - there)
        raise CheckpointError(f"{directory}: {count - len(shards)} of {count} shards missing: {_ranges(missing)}")


def _ranges(numbers: list[int]) -> str:
    return ", ".join(f"{n:05d}" for n in numbers[:10]) + (" ..." if len(numbers) > 10 else "")


def _read_index(index: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
        weight_map = content["weight_map"]
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in weight_map.items()):
            raise TypeError("weight_map must map tensor names to file names")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a checkpoint index ({type(error).__name__}: {error})") from error
    for name in set(weight_map.values()):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{index}: lists {name!r}, which lies outside its directory")
    return dict(weight_map)


def _listed(index: Path) -> list[Path]:
    files = sorted(index.parent / name for name in set(_read_index(index).values()))
    if not files:
        raise CheckpointError(f"{index}: lists no tensors")
    return files


def _check_shards(index: Path, weight_map: Mapping[str, str], files: list[Path]) -> None:
    problems = [f"missing shard {f.name}" for f in files if not f.is_file()]
    sets = {(m["stem"], m["count"], m["ext"]) for f in files if (m := _SHARD.match(f.name))}
    listed = {f.name for f in files}
    for other in sorted(index.parent.iterdir()):
        match = _SHARD.match(other.name)
        if match and (match["stem"], match["count"], match["ext"]) in sets and other.name not in listed:
            problems.append(f"extra shard {other.name}, of the same set but not in the index")
    if problems:
        raise CheckpointError(f"{index}: index and files disagree, {listing('problem', problems)}")


def _compare(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> list[str]:
    problems = []
    for name, file in weight_map.items():
        info = tensors.get(name)
        if info is None:
            problems.append(f"the index places {name} in {file}, which does not hold it")
        elif _name(info.file) != file.rpartition("/")[2]:
            problems.append(f"the index places {name} in {file}; it is in {_name(info.file)}")
    problems += [f"{n} is in {_name(i.file)} but not in the index" for n, i in tensors.items() if n not in weight_map]
    return problems


def _name(file: Path | None) -> str:
    return file.name if file else "memory"


def _headers(file: Path) -> tuple[list[TensorInfo], dict[str, str], bytes]:
    """The tensors and the metadata of a file, and a digest that is another once its header has changed."""
    if file.suffix == ".bin":
        return _bin_headers(file), {}, b""
    try:
        with open(file, "rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            header = raw.read(min(int.from_bytes(raw.read(8), "little"), _LONGEST_HEADER))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(header + size.to_bytes(8, "little")).digest()
    return *_safetensors_headers(file, digest), digest


@lru_cache(maxsize=1024)  # shards loaded one by one look at the headers of all their siblings each time
def _safetensors_headers(file: Path, _digest: bytes) -> tuple[list[TensorInfo], dict[str, str]]:
    try:
        with open(file, "rb") as raw:
            position = 8 + int.from_bytes(raw.read(8), "little")
        infos = []
        with safetensors.safe_open(str(file), framework="pt", device="cpu") as handle:
            # the parser has checked that the tensors lie end to end, in this order, up to the end of the file
            for name in handle.offset_keys():
                part = handle.get_slice(name)
                dtype, bits = _DTYPES[part.get_dtype()]
                shape = tuple(part.get_shape())
                nbytes = math.prod(shape) * bits // 8
                if bits == 4:
                    shape = (*shape[:-1], shape[-1] // 2)
                infos.append(TensorInfo(name, dtype, shape, nbytes, file, position))
                position += nbytes
            # the parser's order of empty tensors, which all begin where the next one does, is another in every run
            infos.sort(key=lambda info: (info.offset, info.nbytes > 0, info.name))
            metadata = dict(handle.metadata() or {})
    except KeyError as error:
        raise CheckpointError(f"{file}: unknown dtype {error} in the header; a newer version may know it") from error
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{file}: not a complete safetensors file ({error}); if it was downloaded, download it again"
        ) from error
    if position != file.stat().st_size:
        raise CheckpointError(f"{file}: the header ends at byte {position}, the file at {file.stat().st_size}")
    return infos, metadata


def _bin_headers(file: Path) -> list[TensorInfo]:
    loaded = load_bin(file, device="meta")
    for name, value in loaded.items():
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        if any(isinstance(t, torch.Tensor) and t.dtype in (E4M3FN, E4M3FNUZ) for t in inner):
            raise CheckpointError(
                f"{file}: {name!r} is a {type(value).__name__} with FP8 tensors inside, not a tensor; save the state "
                "dict itself"
            )
    return [describe(name, t, file) for name, t in loaded.items() if isinstance(t, torch.Tensor)]
