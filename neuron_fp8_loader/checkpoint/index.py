"""Index files: which tensor is in which shard."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from ..errors import CheckpointError, listing
from .info import TensorInfo
from .regular import LONGEST_INDEX, read_json, remembered, stamp
from .remote import exists, names_in

SUFFIX = ".index.json"
SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<ext>\.safetensors|\.bin)$")

_BYTES = 250  # a tensor of a weight map, about


class Index:
    """An index file. What it says is kept between loads until the file is another.

    Attributes:
        path: where it is.
        stamp: of the file that was read.
        files: the shards that it lists, sorted.

    Raises:
        CheckpointError: it cannot be read, is no index, lists nothing, files elsewhere or of several formats.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.stamp = path, stamp(path)
        self.files = remembered("index", path, self.stamp, self._listed, lambda files: 200 * len(files))

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """tensor -> name of its file."""
        return remembered("weight map", self.path, self.stamp, lambda: _read(self.path), lambda m: _BYTES * len(m))

    def _listed(self) -> tuple[Path, ...]:
        files = tuple(sorted(self.path.parent / name for name in set(self.weight_map.values())))
        if not files:
            raise CheckpointError(f"{self.path}: lists no tensors")
        if len({file.suffix for file in files}) > 1:
            raise CheckpointError(
                f"{self.path}: lists files of several formats; expected .safetensors or .bin throughout"
            )
        return files

    def check_files(self) -> None:
        """Raise CheckpointError for shards that are missing, or left over from another version of the set."""
        problems = [f"missing shard {file.name}" for file in self.files if not exists(file)]
        sets = {(m["stem"], m["count"], m["ext"]) for file in self.files if (m := SHARD.match(file.name))}
        listed = {file.name for file in self.files}
        for other in sorted(names_in(self.path.parent)):
            match = SHARD.match(other)
            if match and (match["stem"], match["count"], match["ext"]) in sets and other not in listed:
                problems.append(f"extra shard {other}, of the same set but not in the index")
        if problems:
            raise CheckpointError(f"{self.path}: index and files disagree, {listing('problem', problems)}")

    def compare(self, by_file: Mapping[Path, Iterable[TensorInfo]]) -> list[str]:
        """Where it and the headers of the shards contradict each other, one text each."""
        places, absent = self.weight_map, dict(self.weight_map)
        file_name = {place: place.rpartition("/")[2] for place in set(places.values())}
        elsewhere, unlisted = [], []
        for file, infos in by_file.items():
            here = file.name
            for info in infos:
                place = places.get(info.name)
                absent.pop(info.name, None)
                if place is None:
                    unlisted.append(f"{info.name} is in {here} but not in the index")
                elif file_name[place] != here:
                    elsewhere.append(f"the index places {info.name} in {place}; it is in {here}")
        nowhere = [f"the index places {name} in {place}, which does not hold it" for name, place in absent.items()]
        return [*nowhere, *elsewhere, *unlisted]


def _read(index: Path) -> dict[str, str]:
    content = read_json(index, LONGEST_INDEX, "a checkpoint index")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f'{index}: not a checkpoint index: expected an object with "weight_map"')
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: not a checkpoint index: {tensor!r} is mapped to {name!r}, not to a file")
    for name in set(weight_map.values()):
        parts = Path(name).parts
        if not parts or "\0" in name or Path(name).is_absolute() or ".." in parts:
            raise CheckpointError(f"{index}: lists {name!r}, which lies outside its directory")
    return weight_map
