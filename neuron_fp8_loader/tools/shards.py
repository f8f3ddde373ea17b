"""Writing one converted shard: same names, same order, same layout, in bounded memory."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..checkpoint import TensorInfo, load_bin
from ..errors import Fp8LoaderError
from ..host.memory import as_bytes, buffer
from ..load.parts import Parts, batches
from ..plan import Recipe, Step
from .copying import Form, metadata_after, written

NOTE = "neuron_fp8_loader"
"""The metadata key that tells of the conversion."""


_BITS = {"float32": 32, "bfloat16": 16, "float8_e4m3fn": 8}  # of the dtypes that tensors are converted to
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}


def nbytes_after(infos: Iterable[TensorInfo], recipe: Recipe) -> int:
    """How long the data of these tensors is once converted."""
    return sum(_nbytes(info, recipe.steps[info.name]) for info in infos)


def _nbytes(info: TensorInfo, step: Step) -> int:
    if step.action == "drop":
        return 0
    if (step.dtype, step.shape) == (info.dtype, info.shape):
        return info.nbytes
    bits = _BITS[step.dtype] if step.dtype != info.dtype else 8 * info.nbytes // info.numel
    return math.prod(step.shape) * bits // 8


PARTIAL = ".partial"
"""What the name of a file ends in until it is whole."""


class ExportError(Fp8LoaderError):
    """An export cannot begin or go on: OUT is not fit for it, or the disk is too small."""


@dataclass(frozen=True)
class Target:
    """A file of an export.

    Attributes:
        out: the directory of the export; it may be a link itself.
        relative: where in it; nothing on the way may be a link.
    """

    out: Path
    relative: Path

    @property
    def path(self) -> Path:
        return self.out / self.relative

    def is_there(self) -> bool:
        """Is it written already? Raises ExportError where a link leads away from ``out``."""
        for directory in list(self.relative.parents)[:-1]:
            if (self.out / directory).is_symlink():
                raise _led_away(self.out / directory)
        return self.path.is_file() and not self.path.is_symlink()

    @contextmanager
    def directory(self) -> Iterator[int]:
        """A descriptor of its directory, which is made where it is missing."""
        self.out.mkdir(parents=True, exist_ok=True)
        handle, at = os.open(self.out, _DIRECTORY), self.out
        try:
            for part in self.relative.parent.parts:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=handle)
                at = at / part
                try:
                    below = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
                except OSError as error:
                    raise _led_away(at) from error
                os.close(handle)
                handle = below
            yield handle
        finally:
            os.close(handle)


_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def _led_away(directory: Path) -> ExportError:
    return ExportError(
        f"{directory}: is a link or no directory, and an export writes nowhere but below the directory it was given; "
        "remove it, or give another directory"
    )


@contextmanager
def beside(target: Target) -> Iterator[BinaryIO]:
    """A new file to write to, renamed to ``target`` if the block succeeds and removed if it does not.

    The file is made by this call: what a killed run left under its name is removed first, and a link that somebody
    planted there, or for a directory on the way, is not followed.

    Raises:
        ExportError: a directory on the way is a link or none.
    """
    name = target.relative.name
    temporary = name + PARTIAL
    with target.directory() as directory:

        def remove() -> None:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=directory)

        remove()
        how = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:  # an interrupt may come when the file is there and os.open has not returned
            handle = os.open(temporary, how, 0o666, dir_fd=directory)
            with open(handle, "w+b") as file:
                yield file
                file.flush()
                os.fsync(handle)
            os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            remove()


def copy_beside(source: Path, target: Target) -> None:
    """Copy a file as it is, by way of ``beside``."""
    with open(source, "rb") as old, beside(target) as new:
        shutil.copyfileobj(old, new)


def write_safetensors(
    target: Target,
    infos: Sequence[TensorInfo],
    parts: Parts,
    form: Form,
    note: str,
    advance: Callable[[int], None],
) -> None:
    """Write the tensors of one ``.safetensors`` file, converted.

    Args:
        target: where it goes.
        infos: its tensors, in the order of their data.
        parts: loads them.
        form: what becomes of them, and under which names.
        note: goes into the metadata under ``NOTE``.
        advance: called with the bytes read so far since the last call.

    Raises:
        Fp8LoaderError: as ``load_state_dict``; OSError: the disk is full, or the like.
    """
    source, recipe = infos[0].file, form.recipe
    assert source is not None
    header = _header(source)
    metadata = {**metadata_after(header.pop("__metadata__", None) or {}, form), NOTE: note}
    infos = [info for info in infos if recipe.steps[info.name].action != "drop"]
    sizes = {info.name: _nbytes(info, recipe.steps[info.name]) for info in infos}
    if any(sizes[info.name] != info.nbytes for info in infos):  # keep every tensor aligned to its element size
        infos = sorted(infos, key=lambda info: -(sizes[info.name] // max(1, math.prod(recipe.steps[info.name].shape))))
    entries: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for info in infos:
        step, own = recipe.steps[info.name], header[info.name]
        end = position + sizes[info.name]
        entries[step.out] = {
            "dtype": own["dtype"] if step.dtype == info.dtype else _NAMES[step.dtype],
            "shape": own["shape"] if step.shape == info.shape else list(step.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with beside(target) as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for batch in batches(infos):
            loaded = parts.load(batch)
            for info in batch:
                flat = as_bytes(loaded.pop(info.name).contiguous())
                handle.write(buffer(flat))
                advance(info.nbytes)


def write_bin(
    target: Target, infos: Sequence[TensorInfo], parts: Parts, form: Form, advance: Callable[[int], None]
) -> None:
    """Write one ``.bin`` file, converted. Memory holds what changes; the rest is mapped. Errors as above."""
    source = infos[0].file
    assert source is not None
    state: dict[str, Any] = load_bin(source)
    for batch in batches(infos):
        loaded = parts.load(batch)
        state |= loaded
        for info in batch:
            if info.name not in loaded:  # the scale of a dequantized weight
                del state[info.name]
        advance(sum(info.nbytes for info in batch))
    names = written(form.recipe.steps)
    with beside(target) as handle:
        torch.save({names.get(name, name): value for name, value in state.items()}, handle)


def _header(file: Path) -> dict[str, Any]:
    """The raw header; the file has been opened by safetensors before, so it is sound."""
    with open(file, "rb") as handle:
        content: dict[str, Any] = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return content
