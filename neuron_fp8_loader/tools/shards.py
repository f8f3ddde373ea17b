"""Writing one converted shard: same names, same order, same layout, in bounded memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.files import TensorInfo, load_bin
from ..host.memory import as_bytes, buffer
from ..load.parts import Parts, batches
from ..options import Options
from ..plan.pairs import Plan

NOTE = "neuron_fp8_loader"
"""The metadata key that tells of the conversion."""


def dtype_after(info: TensorInfo, plan: Plan, options: Options) -> str | None:
    """safetensors' name of the dtype that a tensor is converted to, None where it keeps its own."""
    if info.name in plan.fnuz:
        return "F8_E4M3"
    if options.unscaled == "dequantize" and info.name in plan.unscaled:
        return "BF16"
    return None


def nbytes_after(infos: Iterable[TensorInfo], plan: Plan, options: Options) -> int:
    """How long the data of these tensors is once converted."""
    return sum(info.nbytes * (2 if dtype_after(info, plan, options) == "BF16" else 1) for info in infos)


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A name to write under; renamed to ``target`` if the block succeeds, removed if it does not."""
    temporary = target.with_name(target.name + ".partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(
    target: Path,
    infos: Sequence[TensorInfo],
    parts: Parts,
    plan: Plan,
    options: Options,
    note: str,
    advance: Callable[[int], None],
) -> None:
    """Write the tensors of one ``.safetensors`` file, converted.

    Args:
        target: its new name.
        infos: its tensors, in the order of their data.
        parts: loads them.
        plan, options: as the rest of the export.
        note: goes into the metadata under ``NOTE``.
        advance: called with the bytes read so far since the last call.

    Raises:
        Fp8LoaderError: as ``load_state_dict``; OSError: the disk is full, or the like.
    """
    source = infos[0].file
    assert source is not None
    header = _header(source)
    metadata = {**header.pop("__metadata__", {}), NOTE: note}
    longer = {info.name for info in infos if dtype_after(info, plan, options) == "BF16"}
    if longer:  # keep every tensor aligned to its element size
        infos = sorted(infos, key=lambda info: -_element_size(info, longer))
    entries: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for info in infos:
        dtype = dtype_after(info, plan, options)
        end = position + nbytes_after([info], plan, options)
        entries[info.name] = {
            "dtype": dtype or header[info.name]["dtype"],
            "shape": header[info.name]["shape"],
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with beside(target) as temporary, open(temporary, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for batch in batches(infos):
            for info, tensor in zip(batch, parts.load(batch).values(), strict=True):
                flat = as_bytes(tensor.contiguous())
                handle.write(buffer(flat))
                advance(info.nbytes)


def write_bin(target: Path, infos: Sequence[TensorInfo], parts: Parts, advance: Callable[[int], None]) -> None:
    """Write one ``.bin`` file, converted. Memory holds what changes; the rest is mapped. Errors as above."""
    source = infos[0].file
    assert source is not None
    state: dict[str, Any] = load_bin(source)
    for batch in batches(infos):
        state |= parts.load(batch)
        advance(sum(info.nbytes for info in batch))
    with beside(target) as temporary:
        torch.save(state, temporary)


def _header(file: Path) -> dict[str, Any]:
    """The raw header; the file has been opened by safetensors before, so it is sound."""
    with open(file, "rb") as handle:
        content: dict[str, Any] = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return content


def _element_size(info: TensorInfo, longer: set[str]) -> int:
    return 2 if info.name in longer else max(1, info.nbytes // max(1, info.numel))
