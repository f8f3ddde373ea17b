"""Signals that wait until a piece of work is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off every signal that has a handler in Python (Ctrl-C among them) until the block has ended.

    Handlers run in the main thread and may raise anywhere in it: halfway through changes that belong together. In
    other threads, where no handler runs, the block is entered as it is. Signals that end the process at once
    (SIGKILL, or any that has no handler) do so here too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    for number in map(int, signal.valid_signals()):
        handler = signal.getsignal(number)
        if callable(handler):
            handlers[number] = handler
    waiting: list[tuple[int, FrameType | None]] = []
    over = False

    def put_off(number: int, frame: FrameType | None) -> None:
        if over:  # a handler raised before all of them were back in their places
            handlers[number](number, frame)
        else:
            waiting.append((number, frame))

    try:
        for number in handlers:
            signal.signal(number, put_off)
        yield
    finally:
        over = True
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in waiting:
            handlers[number](number, frame)
