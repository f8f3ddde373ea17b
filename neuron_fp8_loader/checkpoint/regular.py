"""Files as they lie on disk: regular ones only, known by what they are, read without trust in their length."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from ..errors import CheckpointError, printable
from ..host.cache import cached
from .remote import RemotePath

LONGEST_CONFIG = 64 << 20
LONGEST_INDEX = 1 << 30
"""Bytes of JSON that are read; the largest published files are a tenth of that."""

_SETTLED = 2_000_000_000  # ns: longer than any file system's clock takes to tick

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class Stamp(NamedTuple):
    """What a file is: another file, or the same one written to, has another stamp.

    ``ctime_ns`` is for what is kept between loads: a time of change cannot be set back. While a file is read it says
    too much, since renaming or linking a file changes it too. ``tag`` is the ETag of an object in a store, which says
    what its bytes are.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    tag: str = ""

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def is_settled(self) -> bool:
        """Was the last change so long ago that another one gives another stamp for sure?"""
        return bool(self.tag) or time.time_ns() - max(self.mtime_ns, self.ctime_ns) > _SETTLED


Value = TypeVar("Value")


def remembered(
    what: str, file: Path, known: Stamp, make: Callable[[], Value], nbytes: int | Callable[[Value], int]
) -> Value:
    """What follows from a file alone: kept between loads until the file is another, and while there is room.

    Args:
        what: which of the things that follow.
        file, known: the file, and its stamp from before ``make`` reads it.
        make, nbytes: as ``host.cache.cached`` takes them.
    """
    return cached((what, str(file), known), make, nbytes) if known.is_settled() else make()


def stamp(file: Path) -> Stamp:
    """The stamp of a regular file. Raises CheckpointError for anything else, without opening it."""
    if isinstance(file, RemotePath):
        entry = file.entry
        return Stamp(-1, 0, entry.size, entry.modified_ns, 0, entry.tag)
    try:
        status = os.stat(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read: {_reason(error)}") from error
    _require_regular(file, status)
    return Stamp.of(status)


def check_unchanged(file: Path, expected: Stamp) -> None:
    """Raise CheckpointError if another file lies at this path by now, or it was written to."""
    _require_same(file, stamp(file), expected)


@contextmanager
def opened(file: Path) -> Iterator[tuple[int, Stamp]]:
    """The descriptor of a regular file, for reading, and its stamp. Never waits, as opening a FIFO would.

    A file in a store has the descriptor -1, which ``read_at`` takes.
    """
    known = stamp(file)
    if isinstance(file, RemotePath):
        yield -1, known
        return
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened: {_reason(error)}") from error
    try:
        status = os.fstat(handle)
        _require_regular(file, status)
        yield handle, Stamp.of(status)
    finally:
        os.close(handle)


class Opened(Mapping[Path, int]):
    """Descriptors of several files, which must be those whose headers were read, and be so still in the end.

    Raises:
        CheckpointError: on entering, if a file is gone or was replaced since; on leaving, if one was written to.
    """

    def __init__(self, files: Iterable[Path], stamps: Mapping[Path, Stamp]) -> None:
        self._files, self._stamps = list(files), stamps
        self._handles: dict[Path, int] = {}

    def __enter__(self) -> Opened:
        try:
            for file in self._files:
                try:
                    self._handles[file] = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{file}: cannot be opened: {_reason(error)}") from error
            self._check()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._check()
        finally:
            self._close()

    def _check(self) -> None:
        for file, handle in self._handles.items():
            _require_same(file, Stamp.of(os.fstat(handle)), self._stamps[file])

    def _close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __getitem__(self, file: Path) -> int:
        return self._handles[file]

    def __iter__(self) -> Iterator[Path]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)


def fill(file: Path, handle: int, buffers: list[memoryview], offset: int) -> int:
    """Read into ``buffers`` from ``offset`` on, until they are full or the file ends.

    Returns:
        the number of bytes read.

    Raises:
        CheckpointError: the system cannot read the file.
    """
    total = 0
    while buffers:
        try:
            got = os.preadv(handle, buffers, offset + total)
        except InterruptedError:
            continue
        except OSError as error:
            raise failed(file, offset + total, error.errno or 0) from error
        if got == 0:
            break
        total += got
        full = 0
        while full < len(buffers) and got >= len(buffers[full]):
            got -= len(buffers[full])
            full += 1
        buffers = buffers[full:]
        if got:
            buffers = [buffers[0][got:], *buffers[1:]]
    return total


ENDED = -1
"""In the place of an errno: the file ended."""


def failed(file: Path, at: int, number: int, names: Iterable[str] = ()) -> CheckpointError:
    """The error for a read that failed at a byte of a file, of the data of tensors of these names."""
    if number == ENDED:
        data = ", ".join(map(printable, islice(names, 3)))
        return CheckpointError(f"{file}: ends at byte {at}, in the data of {data}; was it truncated?")
    return CheckpointError(f"{file}: reading at byte {at} failed: {os.strerror(number)}")


def read_at(file: Path, handle: int, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset`` on; fewer where the file ends before. Raises as ``fill``."""
    if isinstance(file, RemotePath):
        return file.read(offset, length)
    content = bytearray(length)
    got = fill(file, handle, [memoryview(content)] if length else [], offset)
    return bytes(content[:got])


def read_json(file: Path, limit: int, what: str = "JSON") -> Any:
    """The content of a JSON file of at most ``limit`` bytes; ``what`` it should be, for errors.

    Raises:
        CheckpointError: no regular file, too long, or not JSON.
    """
    with opened(file) as (handle, known):
        if known.size > limit:
            raise CheckpointError(f"{file}: {known.size} bytes, which is too long for what it should be")
        return parse_json(file, read_at(file, handle, 0, known.size), what)


def parse_json(file: Path, content: bytes, what: str = "JSON") -> Any:
    """JSON of whatever a file holds. Raises CheckpointError if it is none, or nested too deep to be meant."""
    try:
        return json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not {what} ({error})") from error
    except RecursionError as error:
        raise CheckpointError(f"{file}: not {what}: nested too deep to be meant") from error


def _require_regular(file: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in _KINDS if test(status.st_mode)), "something else")
        raise CheckpointError(f"{file}: is {kind}, where a file is expected")


def _require_same(file: Path, now: Stamp, expected: Stamp) -> None:
    if now[:4] != expected[:4]:
        what = "replaced" if now[:2] != expected[:2] else "written to"
        raise CheckpointError(f"{file}: was {what} while it was read; load again")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
