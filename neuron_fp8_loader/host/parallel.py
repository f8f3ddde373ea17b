"""Running pieces of work on several threads, with a progress bar for loads that last."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

from .signals import uninterrupted

if TYPE_CHECKING:
    from rich.progress import Progress

PIECE = 1 << 20
"""Bytes that one thread reads and translates at a time: small enough to be in cache still when translated."""

_SHOW_AFTER = 2.0  # seconds

Job = TypeVar("Job")


def run(jobs: Sequence[Job], work: Callable[[Job], None], threads: int) -> None:
    """Call ``work`` on every job, in order of the list, on up to ``threads`` threads, the caller's own among them.

    The first error, or an interrupt, ends it all: jobs that have not begun are left, those that have are waited for.
    Where the system gives no more threads, those that there are do all the work.
    """
    threads = min(threads, len(jobs))
    if threads <= 1:
        for job in jobs:
            work(job)
        return
    queue, lock, stop = iter(jobs), threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def drain() -> None:
        while not stop.is_set():
            with lock:
                job = next(queue, queue)  # a job may be None
            if job is queue:
                return
            work(job)  # type: ignore[arg-type]

    def help_out() -> None:
        try:
            drain()
        except BaseException as error:
            errors.append(error)
            stop.set()

    helpers: list[threading.Thread] = []
    try:
        with uninterrupted():  # an interrupt in between would lose sight of a thread
            _start(helpers, help_out, threads - 1)
        drain()
        for helper in helpers:
            helper.join()
    finally:
        stop.set()
        with uninterrupted():  # nothing may go on to work in memory and files that the caller is about to give up
            for helper in helpers:
                helper.join()
    if errors:
        raise errors[0]


def _start(helpers: list[threading.Thread], target: Callable[[], None], count: int) -> None:
    for number in range(count):
        helper = threading.Thread(target=target, name=f"neuron-fp8_{number}")
        try:
            helper.start()
        except (RuntimeError, MemoryError):  # "can't start new thread"
            return
        helpers.append(helper)


def pieces(nbytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the pieces of a run of bytes."""
    for start in range(0, nbytes, PIECE):
        yield start, min(start + PIECE, nbytes)


@contextmanager
def progress(what: str, total: int, show: bool | None) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(bytes)``. The bar is drawn on stderr if ``show``; with None only on a terminal and after 2 s,
    whether anything has been read by then or not.

    Work does not fail for want of a bar: where stderr is missing, closed or broken, none is seen.
    """
    stream = _Stream(sys.stderr)
    if show is False or (show is None and not stream.isatty()):
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(file=cast(IO[str], stream)), transient=True)
    task = bar.add_task(what, total=total)
    # by the clock: a slow disk, or one large tensor, may be long in coming to its first advance
    later = threading.Timer(_SHOW_AFTER, _start_quietly, [bar])
    later.daemon = True
    if show:
        bar.start()
    else:
        with suppress(RuntimeError):  # no more threads
            later.start()
    try:
        yield lambda nbytes: bar.advance(task, nbytes)
    finally:
        later.cancel()
        if later.ident is not None:
            later.join()  # what it has begun must be seen by stop
        bar.stop()


def _start_quietly(bar: Progress) -> None:
    with suppress(Exception):
        bar.start()


class _Stream:
    """As much of a text stream as rich uses, over one that may be None, closed, gone, or no stream at all."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "ascii"

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except Exception:
            return False

    def write(self, text: str) -> int:
        with suppress(Exception):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(Exception):
            self._stream.flush()

    def fileno(self) -> int:
        return int(self._stream.fileno())
