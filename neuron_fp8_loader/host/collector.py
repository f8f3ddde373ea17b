"""Python's garbage collector, kept out of work that makes many objects and leaves no cycles."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .signals import uninterrupted

_lock = threading.Lock()
_inside = 0
_was_on = False


@contextmanager
def uncollected() -> Iterator[None]:
    """Let no collection begin within the block, which should last seconds at most and make what is kept.

    The collector goes through all objects whenever their number has grown by a quarter: for the headers and steps of
    100,000 tensors that is a third of the time, and finds nothing. The switch is the whole process's, so threads share
    it: the first to come in turns the collector off, the last to go turns it on again, however the blocks end. Where
    the caller has it off, it stays off; a process forked in between has it as it was.
    """
    global _inside, _was_on
    entered = False
    try:
        with uninterrupted(), _lock:  # an interrupt in between would leave it off
            if _inside == 0:
                _was_on = gc.isenabled()
                gc.disable()
            _inside += 1
            entered = True
        yield
    finally:
        with uninterrupted(), _lock:
            _inside -= entered
            if entered and _inside == 0 and _was_on:
                gc.enable()


def _forked() -> None:
    global _lock, _inside
    _lock = threading.Lock()  # a thread that is not in the child may have held it
    if _inside and _was_on:
        gc.enable()
    _inside = 0


os.register_at_fork(after_in_child=_forked)
