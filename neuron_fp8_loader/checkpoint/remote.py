"""Files that do not lie on this machine: their names as paths, what is known of them, and the little that is read of
them before their data: indexes, configs, headers."""

from __future__ import annotations

import fnmatch
import os
import re
import stat
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path, PosixPath
from typing import Any, Protocol, TypeVar

from ..errors import CheckpointError

HEAD = 256 << 10
"""Bytes that are asked for first of a file: most headers of 5 GB shards are shorter."""

USUAL = tuple(stem + end for stem in ("model.safetensors", "diffusion_pytorch_model.safetensors")
              for end in ("", ".index.json"))  # fmt: skip
"""What a checkpoint is known by where directories cannot be listed."""

Value = TypeVar("Value")

URL = re.compile(r"(s3|gs|az|https?|hf):/+", re.IGNORECASE)
_COLLAPSED = re.compile(r"^([A-Za-z0-9]+):/(?=[^/])")


class Backend(Protocol):
    """One bucket, host or repository. Keys are names below the root, without a leading slash.

    All methods raise CheckpointError; FileNotFoundError for what is not there; PermissionError, with what to do, where
    listing or reading is not allowed.
    """

    lists: bool
    """Can it list a directory? If not, files are found by name alone."""

    def listed(self, directory: str) -> tuple[list[Entry], list[str]]:
        """What lies in a directory: the files, and the names of the directories."""

    def entry(self, key: str) -> Entry:
        """One file."""

    def get(self, key: str, known: Entry, start: int, end: int) -> Any:
        """Bytes ``start`` to ``end`` of the file that is known, as a buffer; an error if it is another by now."""


@dataclass
class Entry:
    """A file in a store.

    Attributes:
        name: its last part.
        size: in bytes.
        tag: its ETag; empty where the store gives none.
        modified_ns: when it was written last; 0 where the store does not say.
        head: the bytes of its beginning that were read so far.
    """

    name: str
    size: int
    tag: str = ""
    modified_ns: int = 0
    head: bytes = field(default=b"", repr=False)


class Store:
    """A backend, and what it holds as far as anyone asked."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.forget()

    def forget(self) -> None:
        """Look anew the next time."""
        self.listings: dict[str, tuple[dict[str, Entry], list[str]]] = {}
        self._found: dict[str, Entry | None] = {}
        self.denied = ""
        """Why nothing could be listed, if it was not allowed."""

    def directory(self, key: str) -> tuple[dict[str, Entry], list[str]]:
        """The files in a directory by name, and the names of directories; the usual names if it cannot be listed."""
        if not self.backend.lists or self.denied:
            head = f"{key}/" if key else ""
            known = {name: self.find(head + name) for name in USUAL}
            return {name: entry for name, entry in known.items() if entry is not None}, []
        listing = self.listings.get(key)
        if listing is None:
            files, directories = list[Entry](), list[str]()
            try:
                files, directories = _aside(lambda: self.backend.listed(key))
            except FileNotFoundError:
                pass
            except PermissionError as error:  # its files may be readable all the same
                self.denied = str(error)
                return self.directory(key)
            listing = self.listings[key] = {entry.name: entry for entry in files}, directories
        return listing

    def find(self, key: str) -> Entry | None:
        """A file, if it is there."""
        directory, _, name = key.rpartition("/")
        if self.backend.lists and not self.denied:
            files, _ = self.directory(directory)
            if not self.denied:
                return files.get(name)
        found = self._found
        if key not in found:
            try:
                found[key] = _aside(lambda: self.backend.entry(key))
            except FileNotFoundError:
                found[key] = None
            except PermissionError as error:  # S3 says so of what is not there, too, to those who may not list
                found[key], self.denied = None, str(error)
        return found[key]


def _aside(work: Callable[[], Value]) -> Value:
    """Do it, in the main thread so that an interrupt does not wait for the store: it is left to itself then."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    done: Future[Value] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="neuron-fp8-ask", daemon=True).start()
    return done.result()


_stores: dict[Hashable, Store] = {}
_SETTINGS = ("AWS_", "GOOGLE_", "AZURE_", "HF_")
_openers: dict[str, Callable[[str], Backend]] = {}


def register(scheme: str, opener: Callable[[str], Backend]) -> None:
    """Let URLs of a scheme be opened: ``opener`` takes the root, such as ``s3://bucket``."""
    _openers[scheme] = opener


class RemotePath(PosixPath):
    """The path of a file or directory in a store: ``s3://bucket/key``.

    A path as any other, of which names, parents and siblings are taken as ever. What looks at files looks into the
    store; the system's own functions find nothing under such a name, so nothing local can be read in its stead.
    """

    def __str__(self) -> str:
        return _COLLAPSED.sub(r"\1://", super().__str__(), count=1)

    def __reduce__(self) -> Any:
        return type(self), (str(self),)

    @property
    def scheme(self) -> str:
        return self.parts[0].rstrip(":").lower()

    @property
    def _root_parts(self) -> int:
        return 3 if self.scheme == "hf" else 2  # hf://org/name

    @property
    def root_url(self) -> str:
        """The bucket, host or repository."""
        return f"{self.scheme}://{'/'.join(self.parts[1 : self._root_parts])}"

    @property
    def key(self) -> str:
        """The name below the root; empty for the root itself."""
        return "/".join(self.parts[self._root_parts :])

    @property
    def store(self) -> Store:
        # a child of fork has none of its parent's connections; and who has set a region or keys has set them for now
        settings = tuple((name, value) for name, value in os.environ.items() if name.startswith(_SETTINGS))
        key = os.getpid(), self.root_url, settings
        if key not in _stores:
            _stores[key] = Store(_openers[self.scheme](self.root_url))
        return _stores[key]

    @property
    def entry(self) -> Entry:
        """What is known of the file. Raises CheckpointError if it is not there."""
        found = self.store.find(self.key) if self.key else None
        if found is None:
            raise CheckpointError(f"{self}: there is no such object")
        return found

    def exists(self, **_: Any) -> bool:
        if self.suffix in (".safetensors", ".bin", ".json"):
            return self.is_file() or self.is_dir()
        return self.is_dir() or self.is_file()  # else what lies beside a prefix would be listed for nothing

    def is_file(self, **_: Any) -> bool:
        return bool(self.key) and self.store.find(self.key) is not None

    def is_dir(self, **_: Any) -> bool:
        if not self.key:
            return True
        store, parts = self.store, self.key.rpartition("/")
        if parts[0] in store.listings:
            return parts[2] in store.listings[parts[0]][1]
        files, directories = store.directory(self.key)
        return bool(files or directories)

    def iterdir(self) -> Iterator[RemotePath]:  # type: ignore[override]
        files, directories = self.store.directory(self.key)
        return iter([self / name for name in (*files, *directories)])

    def glob(self, pattern: str, **_: Any) -> Iterator[RemotePath]:  # type: ignore[override]
        """Files and directories whose name matches; of "a/*", those of ``self / "a"``."""
        head, _slash, last = pattern.rpartition("/")
        place = self / head if head else self
        return iter(path for path in place.iterdir() if fnmatch.fnmatchcase(path.name, last))

    def stat(self, **_: Any) -> os.stat_result:
        return os.stat_result((stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, self.entry.size, 0, 0, 0))

    def resolve(self, strict: bool = False) -> RemotePath:
        return self

    def read_text(self, encoding: str | None = None, errors: str | None = None, **_: Any) -> str:
        return self.read(0, self.entry.size).decode(encoding or "utf-8", errors or "strict")

    def get(self, known: Entry, start: int, end: int) -> Any:
        """A range of the file that is known, exactly; as a buffer."""
        try:
            backend = self.store.backend
            found = _aside(lambda: backend.get(self.key, known, start, end))
        except FileNotFoundError as error:
            raise CheckpointError(f"{self}: is gone since it was found; load again") from error
        except PermissionError as error:
            raise CheckpointError(str(error)) from error
        if len(found) != end - start:
            raise CheckpointError(
                f"{self}: the store gave {len(found)} bytes for a range of {end - start} from byte {start} on; was "
                "the object cut short, or is something between that changes responses?"
            )
        return found

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the beginning of the file, fewer where it ends before; what was read is kept until the next look.

        One request for a header or a config, two for a long header.
        """
        entry = self.entry
        head, end = entry.head, min(entry.size, offset + length)
        if end > len(head):  # another thread may read the same: either makes the same of it
            entry.head = head + bytes(self.get(entry, len(head), min(entry.size, max(end, HEAD))))
        return entry.head[offset:end]


def exists(path: Path) -> bool:
    """``os.path.exists``, for files in a store as well."""
    return path.exists() if isinstance(path, RemotePath) else os.path.exists(path)


def names_in(directory: Path) -> list[str]:
    """``os.listdir``, for a directory in a store as well."""
    if isinstance(directory, RemotePath):
        return [path.name for path in directory.iterdir()]
    return os.listdir(directory)
