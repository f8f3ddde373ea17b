"""Running pieces of work on several threads, with a progress bar for loads that last."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

PIECE = 1 << 20
"""Bytes that one thread reads and translates at a time: small enough to be in cache still when translated."""

_SHOW_AFTER = 2.0  # seconds

Job = TypeVar("Job")


def run(jobs: Sequence[Job], work: Callable[[Job], None], threads: int) -> None:
    """Call ``work`` on every job, in order of the list, on up to ``threads`` threads. The first error ends it all."""
    threads = min(threads, len(jobs))
    if threads <= 1:
        for job in jobs:
            work(job)
        return
    queue, lock, stop = iter(jobs), threading.Lock(), threading.Event()

    def drain() -> None:
        while not stop.is_set():
            with lock:
                job = next(queue, None)
            if job is None:
                return
            try:
                work(job)
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(threads, thread_name_prefix="neuron-fp8") as pool:
        futures = [pool.submit(drain) for _ in range(threads)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()  # an interrupt too: the others finish their piece and leave
            raise


def pieces(nbytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the pieces of a run of bytes."""
    for start in range(0, nbytes, PIECE):
        yield start, min(start + PIECE, nbytes)


@contextmanager
def progress(what: str, total: int, show: bool | None) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(bytes)``. The bar is drawn on stderr if ``show``; with None only on a terminal and after 2 s."""
    if show is False or (show is None and not sys.stderr.isatty()):
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=total)
    begin, lock, drawn = time.monotonic(), threading.Lock(), threading.Event()

    def advance(nbytes: int) -> None:
        bar.advance(task, nbytes)
        if not drawn.is_set() and (show or time.monotonic() - begin > _SHOW_AFTER):
            with lock:
                if not drawn.is_set():
                    bar.start()
                    drawn.set()

    try:
        yield advance
    finally:
        bar.stop()
