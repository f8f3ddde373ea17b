"""Putting files into the page cache, taking them out again, and looking how much of them is there."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_CHUNK = 1 << 22


def can_drop() -> bool:
    """Does this system let an ordinary process drop a file from the page cache?"""
    return hasattr(os, "posix_fadvise")


def warm(files: Iterable[Path]) -> None:
    """Read the files, so that their pages are cached."""
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.read(_CHUNK):
                pass


def drop(files: Iterable[Path]) -> None:
    """Drop the files' pages. Dirty pages cannot be dropped, so they are written out first."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def cached(files: Iterable[Path]) -> float | None:
    """The fraction of the files' pages that is in the page cache; None where the system does not tell."""
    try:
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (AttributeError, OSError):
        return None
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    present = pages = 0
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as handle, mmap.mmap(handle.fileno(), size, mmap.MAP_PRIVATE) as mapping:
            seen = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
            first = ctypes.c_char.from_buffer(mapping)
            status = mincore(ctypes.addressof(first), size, seen)
            del first  # it would keep the mapping from being closed
        if status != 0:
            return None
        present += sum(page & 1 for page in seen.raw)
        pages += len(seen.raw)
    return present / pages if pages else 1.0
