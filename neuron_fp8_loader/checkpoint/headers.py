"""What the headers of files say of their tensors. No weight data is read."""

from __future__ import annotations

import hashlib
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from ..codes.formats import E4M3FN, E4M3FNUZ
from ..errors import CheckpointError, Shown
from ..host.cache import cached
from ..host.memory import needing
from .bin import load_bin
from .given import refuse_stand_in
from .info import TensorInfo, describe
from .regular import Stamp, check_unchanged, opened, parse_json, read_at, remembered
from .remote import RemotePath

_LONGEST = 100_000_000  # safetensors refuses longer ones
_LARGEST = 2**63 - 1  # torch's sizes and strides are int64
_BYTES_A_TENSOR = 400  # of a header, about

# safetensors' names of dtypes -> (torch's name, bits an element)
_DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("bool", 8), "U8": ("uint8", 8), "I8": ("int8", 8), "U16": ("uint16", 16), "I16": ("int16", 16),
    "U32": ("uint32", 32), "I32": ("int32", 32), "U64": ("uint64", 64), "I64": ("int64", 64),
    "F16": ("float16", 16), "BF16": ("bfloat16", 16), "F32": ("float32", 32), "F64": ("float64", 64),
    "C64": ("complex64", 64), "F8_E4M3": ("float8_e4m3fn", 8), "F8_E5M2": ("float8_e5m2", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8), "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8), "F4": ("float4_e2m1fn_x2", 4),
}  # fmt: skip
_NAMES = {torch_name: name for name, (torch_name, _bits) in _DTYPES.items()}


def safetensors_name(dtype: str) -> str:
    """safetensors' name of a dtype, ``"F8_E4M3"``, by torch's."""
    return _NAMES[dtype]


@dataclass(frozen=True)
class Header:
    """The header of one file.

    Attributes:
        tensors: in the order of their data.
        metadata: the safetensors metadata.
        stamp: of the file that was read.
        digest: of the header with its length; empty for a ``.bin`` file.
    """

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    stamp: Stamp
    digest: bytes = b""

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        return _BYTES_A_TENSOR * len(self.tensors)


def digest_of(file: Path, known: Stamp) -> bytes:
    """The digest of a file's header, which is read only if it was not before, or the file is quite new."""
    if file.suffix == ".bin":
        return b""

    def make() -> bytes:
        with opened(file) as (handle, now):
            return hashlib.sha256(_raw(file, handle, now)).digest()

    return remembered("digest", file, known, make, 300)


def read_header(file: Path, known: Stamp, digest: bytes) -> Header:
    """The header of a ``.safetensors`` or ``.bin`` file.

    Args:
        file: the file.
        known, digest: its stamp and ``digest_of`` it.

    Raises:
        CheckpointError: no regular file, cut short, damaged, or with what torch cannot hold; file and tensor named.
    """
    if file.suffix == ".bin":
        return remembered("header", file, known, lambda: _of_bin(file, known), lambda header: header.nbytes)
    key = ("header", str(file), known, digest)
    return cached(key, lambda: _of_safetensors(file, known, digest), lambda header: header.nbytes)


def _raw(file: Path, handle: int, known: Stamp) -> bytes:
    """The header with the 8 bytes of its length; cut short where that promises more than there is."""
    begin = read_at(file, handle, 0, min(64, known.size))
    refuse_stand_in(file, begin)
    length = min(int.from_bytes(begin[:8], "little"), _LONGEST, max(0, known.size - 8))
    return begin[:8] + read_at(file, handle, 8, length)


def _refused(file: Path, error: Exception) -> CheckpointError:
    unknown = re.search(r"unknown variant `(\w+)`", str(error))
    if unknown and unknown[1] in _DTYPES:  # F8_E4M3FNUZ came with 0.8
        return CheckpointError(
            f"{file}: safetensors {safetensors.__version__} does not know the dtype {unknown[1]}, which it has; "
            "pip install --upgrade safetensors"
        )
    return CheckpointError(
        f"{file}: not a complete safetensors file ({error}); if it was downloaded, download it again"
    )


def _of_safetensors(file: Path, known: Stamp, digest: bytes) -> Header:
    with opened(file) as (handle, now):
        raw = _raw(file, handle, now)
    with needing(known.size, Shown(file)):
        try:
            # its own parser is the judge of what is sound: names, offsets end to end, no byte left over
            with (
                _in_full(file, raw, known) as here,
                safetensors.safe_open(here, framework="pt", device="cpu") as parsed,
            ):
                count = len(parsed.keys())
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            if "(os error 12)" in str(error):  # it maps the whole file
                raise MemoryError(str(error)) from error
            raise _refused(file, error) from error
    content = parse_json(file, raw[8:])
    check_unchanged(file, known)  # else one of them saw another file
    if hashlib.sha256(raw).digest() != digest:
        raise CheckpointError(f"{file}: was written to while it was read; load again")
    metadata = content.pop("__metadata__", None) or {}
    tensors = _tensors(file, content, len(raw))
    if len(tensors) != count:
        raise CheckpointError(f"{file}: the header has {count} tensors for safetensors and {len(tensors)} for us")
    end = tensors[-1].offset + tensors[-1].nbytes if tensors else len(raw)
    if end != known.size:
        raise CheckpointError(f"{file}: the header ends at byte {end}, the file at {known.size}")
    return Header(tuple(tensors), metadata, known, digest)


@contextmanager
def _in_full(file: Path, raw: bytes, known: Stamp) -> Iterator[str]:
    """A local file with this header, as long as the file is: itself, or for one in a store a hollow one."""
    if not isinstance(file, RemotePath):
        yield str(file)
        return
    with tempfile.NamedTemporaryFile(prefix="neuron-fp8-") as hollow:
        hollow.write(raw)
        hollow.truncate(known.size)
        hollow.flush()
        yield hollow.name


def _tensors(file: Path, content: Mapping[str, Any], begin: int) -> list[TensorInfo]:
    position, found = begin, []
    # empty tensors begin where the next one does; by name, since their order in the header is that of a hash table
    for name, entry in sorted(content.items(), key=lambda item: (item[1]["data_offsets"], item[0])):
        start, end = entry["data_offsets"]
        if start + begin != position:
            raise CheckpointError(
                f"{file}: {Shown(name)} begins at byte {start} of the data, not at {position - begin}"
            )
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{file}: {Shown(name)} has an unknown dtype {entry['dtype']!r}; a newer version may know it"
            )
        dtype, bits = _DTYPES[entry["dtype"]]
        shape = tuple(entry["shape"])
        if end == start and math.prod(max(1, length) for length in shape) * bits > _LARGEST:
            raise CheckpointError(f"{file}: {Shown(name)} has the shape {list(shape)}, which is too large for torch")
        if bits == 4:
            if not shape or shape[-1] % 2:
                raise CheckpointError(
                    f"{file}: {Shown(name)} is F4 of shape {list(shape)}; two values share a byte, so the last "
                    "dimension must be even"
                )
            shape = (*shape[:-1], shape[-1] // 2)
        found.append(TensorInfo(name, dtype, shape, end - start, file, position))
        position += end - start
    return found


def _of_bin(file: Path, known: Stamp) -> Header:
    loaded = load_bin(file, known, device="meta")
    for name, value in loaded.items():
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        if any(isinstance(t, torch.Tensor) and t.dtype in (E4M3FN, E4M3FNUZ) for t in inner):
            raise CheckpointError(
                f"{file}: {name!r} is a {type(value).__name__} with FP8 tensors inside, not a tensor; save the state "
                "dict itself"
            )
    return Header(
        tuple(describe(name, t, file) for name, t in loaded.items() if isinstance(t, torch.Tensor)), {}, known
    )
