"""Which files a path stands for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from ..errors import CheckpointError, printable
from .given import nothing_in, require_format
from .index import SHARD, SUFFIX, Index
from .remote import exists

_SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_BIN = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
_INDEXES = tuple(name + SUFFIX for name in (*_SINGLE, *_BIN))


def find(path: Path) -> tuple[Index | None, tuple[Path, ...]]:
    """The index, if there is one, and the files of the checkpoint.

    Args:
        path: an existing directory, or a regular file.

    Raises:
        CheckpointError: nothing there, or several checkpoints; an index that cannot be read.
    """
    if path.is_dir():
        return _in_directory(path)
    if path.name.endswith(SUFFIX):
        index = Index(path)
        return index, index.files
    require_format(path)
    beside = _index_of(path)
    return (beside, beside.files) if beside else (None, (path,))


def _in_directory(path: Path) -> tuple[Index | None, tuple[Path, ...]]:
    for single in (path / name for name in _SINGLE):
        if exists(single):
            return _own_index(single), (single,)
    shards = sorted(path.glob("*.safetensors"))
    index = _index_in(path, shards)
    if index:
        return index, index.files
    if len(shards) > 1 or (shards and SHARD.match(shards[0].name)):
        _require_one_set(path, shards)
    shards = shards or [path / name for name in _BIN if exists(path / name)][:1]
    if not shards:
        raise CheckpointError(f"{path}: {nothing_in(path)}")
    return None, tuple(shards)


def _own_index(file: Path) -> Index | None:
    """The index of a checkpoint of one file; one that lists shards is left over from another form of it."""
    path = file.with_name(file.name + SUFFIX)
    if not exists(path):
        return None
    index = Index(path)
    return index if index.files == (file,) else None


def _index_of(file: Path) -> Index | None:
    """The index that lists a file: one beside it, or else one in the directory above, for shards in a folder.

    An index that cannot be read is passed over where it is another one's: not for a numbered shard, whose partners
    are known from the index alone, nor where it bears the file's name.
    """
    for directory in dict.fromkeys((file.parent, file.parent.parent)):
        found = []
        for path in sorted(directory.glob("*" + SUFFIX)):
            try:
                index = Index(path)
            except CheckpointError:
                if directory == file.parent and (SHARD.match(file.name) or path.name == file.name + SUFFIX):
                    raise
                continue
            if file in index.files and not _is_left_over(index, file):
                found.append(index)
        chosen = [index for index in found if index.path.name in _INDEXES] or found
        if len({index.files for index in chosen}) > 1:
            raise CheckpointError(
                f"{file}: is listed by {len(chosen)} indexes, of different files "
                f"({_names(index.path for index in chosen)}); give the path of one of them, or move the other away"
            )
        if chosen:
            return chosen[0]
    return None


def _is_left_over(index: Index, file: Path) -> bool:
    """Does it list the file among others of which none is there? A file that is not numbered is whole without them."""
    others = [other for other in index.files if other != file]
    return bool(others) and not SHARD.match(file.name) and not any(exists(other) for other in others)


def _index_in(directory: Path, shards: Sequence[Path]) -> Index | None:
    found = sorted(directory.glob("*.safetensors" + SUFFIX))
    if not shards:  # else an index of .bin files is left over: they are often not fetched
        found = found or sorted(directory.glob("*.bin" + SUFFIX))
        shards = [directory / name for name in _BIN if exists(directory / name)]
    named = [path for path in found if path.name in _INDEXES]
    indexes = [Index(path) for path in named or found]
    if shards:  # one that lists none of the files that are there belongs to files that are not
        indexes = [index for index in indexes if any(exists(file) for file in index.files)]
    if len(indexes) > 1:
        raise CheckpointError(
            f"{directory}: {len(indexes)} indexes ({_names(index.path for index in indexes)}); give the path of one "
            "of them"
        )
    return indexes[0] if indexes else None


def _require_one_set(directory: Path, shards: Sequence[Path]) -> None:
    """Several files and no index: only a complete numbered set tells by itself that it is one checkpoint."""
    parts = [SHARD.match(shard.name) for shard in shards]
    sets = {(m["stem"], m["count"]) for m in parts if m}
    if len(sets) != 1 or None in parts:
        raise CheckpointError(
            f"{directory}: {len(shards)} .safetensors files and no index; give the path of one file. "
            f"There are {_names(shards[:5])}{' ...' if len(shards) > 5 else ''}"
        )
    count, there = int(next(iter(sets))[1]), {int(m["number"]) for m in parts if m}
    if count < 1 or max(there) > count:
        raise CheckpointError(
            f"{directory}: there are shards numbered {_some(sorted(there))} of {count}; expected 1 to {count}, or an "
            "index"
        )
    first = 0 if 0 in there else 1  # some number from 0 on
    missing = (n for n in range(first, count + first) if n not in there)
    if len(there) != len(shards) or len(there) != count:
        raise CheckpointError(f"{directory}: {count - len(there)} of {count} shards missing: {_some(missing)}")
    if next(missing, None) is not None:
        raise CheckpointError(f"{directory}: the shards are numbered both from 0 and to {count}; give an index")


def _some(numbers: Iterable[int]) -> str:
    first = list(islice(numbers, 11))
    return ", ".join(f"{n:05d}" for n in first[:10]) + (" ..." if len(first) > 10 else "")


def _names(files: Iterable[Path]) -> str:
    return ", ".join(printable(file.name) for file in files)
