"""Requests for bytes that come over a network: large ranges, many under way at once."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..errors import OptionError
from ..host.memory import allocate
from ..host.signals import uninterrupted
from .info import TensorInfo
from .remote import RemotePath

REQUEST = 16 << 20
"""Bytes of a request: a connection gives some 90 MB/s after some 30 ms, so smaller ones would wait more than read."""

GAP = 1 << 20
"""Bytes between two ranges that are sooner read than skipped by another request."""

REQUESTS_ENV = "NEURON_FP8_LOADER_REQUESTS"

Job = TypeVar("Job")
Got = TypeVar("Got")
Take = Callable[[int, torch.Tensor], None]
"""``take(offset, part)``: bytes of a run of a tensor, from ``offset`` in it on; not to be written to, nor kept."""


def requests_at_once() -> int:
    """How many requests are under way at once. Raises OptionError for a malformed environment variable."""
    text = os.environ.get(REQUESTS_ENV, "").strip()
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise OptionError(f"{REQUESTS_ENV}={text}: expected a whole number from 1 up")
        return int(text)
    return min(128, max(16, 2 * (os.cpu_count() or 1)))


def pump(jobs: Sequence[Job], get: Callable[[Job], Got], take: Callable[[Job, Got], None]) -> None:
    """``take(job, get(job))`` for every job, as many at once as there may be requests.

    ``get`` waits for others: after an error or an interrupt those under way are left to themselves, their results
    dropped. ``take`` works in the caller's memory, so it is waited for.
    """
    queue, changed, errors = iter(jobs), threading.Condition(), list[BaseException]()
    left, taking, over = len(jobs), 0, False

    def end(error: BaseException | None, taken: int) -> None:
        nonlocal left, taking
        with changed:
            errors.extend([error] if error is not None else [])
            taking -= taken
            left -= taken
            changed.notify_all()

    def work() -> None:
        nonlocal taking
        while True:
            with changed:
                job = queue if over else next(queue, queue)
            if job is queue:
                return
            try:
                got = get(job)  # type: ignore[arg-type]
                with changed:
                    if over:
                        return
                    taking += 1
            except BaseException as error:
                end(error, 0)
                return
            try:
                take(job, got)  # type: ignore[arg-type]
            except BaseException as error:
                end(error, 1)
                return
            del got
            end(None, 1)

    threads = daemons(min(len(jobs), requests_at_once()), work)
    try:
        if jobs and not threads:
            work()
        with changed:
            changed.wait_for(lambda: errors or not left)
    finally:
        over = True
        with uninterrupted(), changed:
            changed.wait_for(lambda: not taking)
    if errors:
        raise errors[0]


def daemons(count: int, work: Callable[[], None]) -> int:
    """Start threads that do not keep the interpreter from ending; how many the system gave."""
    for number in range(count):
        try:
            threading.Thread(target=work, name=f"neuron-fp8-get_{number}", daemon=True).start()
        except (RuntimeError, MemoryError):
            return number
    return count


@dataclass
class Piece:
    """A run of bytes of a file, and what is done with its parts: (begin, end in the file, what)."""

    file: RemotePath
    start: int
    end: int
    parts: list[tuple[int, int, Callable[[torch.Tensor], None]]] = field(default_factory=list)


def cut(wanted: Iterable[tuple[TensorInfo, int, int, Take]]) -> list[Piece]:
    """Requests for parts of tensors: neighbours and near neighbours together, in the order of the files."""
    done: list[Piece] = []
    for info, start, end, take in sorted(wanted, key=lambda w: (str(w[0].file), w[0].offset + w[1])):
        file, at, last = info.file, info.offset + start, info.offset + end
        assert isinstance(file, RemotePath)
        while at < last:
            piece = done[-1] if done else None
            new = piece is None or piece.file != file or not piece.start <= at <= piece.end + GAP
            if piece is None or new or at >= piece.start + REQUEST:
                piece = Piece(file, at, at)
                done.append(piece)
            stop = min(last, piece.start + REQUEST)
            piece.parts.append((at, stop, _from(take, at - info.offset - start)))
            piece.end = max(piece.end, stop)
            at = stop
    return done


def _from(take: Take, offset: int) -> Callable[[torch.Tensor], None]:
    return lambda part: take(offset, part)


# -- buffers of others as tensors ----------------------------------------------------------------------------------


class _Buffer(ctypes.Structure):  # Py_buffer, of the stable ABI since Python 3.11 and the same before
    _fields_ = (
        ("buf", ctypes.c_void_p), ("obj", ctypes.py_object), ("len", ctypes.c_ssize_t), ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int), ("ndim", ctypes.c_int), ("format", ctypes.c_char_p), ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p), ("suboffsets", ctypes.c_void_p), ("internal", ctypes.c_void_p),
    )  # fmt: skip


@contextmanager
def view(data: Any) -> Iterator[torch.Tensor]:
    """uint8 [length] over a buffer that may be read-only, of which torch would warn: it must not be written to."""
    held = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), ctypes.byref(held), 0)
    try:
        if not held.len:
            yield allocate(0)
            return
        yield torch.frombuffer((ctypes.c_ubyte * held.len).from_address(held.buf), dtype=torch.uint8)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(held))
