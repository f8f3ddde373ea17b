"""Python's garbage collector, kept out of work that makes many objects and leaves no cycles."""

from __future__ import annotations

import contextlib
import gc
import os
import threading

_lock = threading.Lock()
_inside = 0
_was_on = False


class uncollected:
    """Let no collection begin within the block, which should last seconds at most and make what is kept.

    The collector goes through all objects whenever their number has grown by a quarter: for the headers and steps of
    100,000 tensors that is a third of the time, and finds nothing. The switch is the whole process's, so threads share
    it: the first to come in turns the collector off, the last to go turns it on again, however the blocks end. Where
    the caller has it off, it stays off; a process forked in between has it as it was.
    """

    # a handler may raise after any call, and on the way into any function of Python: nothing is called between the
    # changes that belong together, and what may have been missed is done again

    _entered = False

    def __enter__(self) -> None:
        global _inside, _was_on
        try:
            with _lock:
                on = gc.isenabled()
                _inside += 1
                self._entered = True
                if _inside == 1:
                    _was_on = on
                    gc.disable()
        except BaseException:
            self._leave()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self._leave()
        except BaseException:
            self._leave()
            raise

    def __del__(self) -> None:  # an interrupt came before the first step of __exit__
        if self._entered:
            self._leave()

    def _leave(self) -> None:
        global _inside
        with _lock:
            if self._entered:
                self._entered = False
                _inside -= 1
                if _inside == 0 and _was_on:
                    gc.enable()


_SECONDS_OF_READING = 1 << 28  # bytes, at most; below, what the collector finds to do is most of the work


def uncollected_if_short(nbytes: int) -> contextlib.AbstractContextManager[object]:
    """``uncollected`` for a block that reads so many bytes, if that takes a few seconds at most."""
    return uncollected() if nbytes <= _SECONDS_OF_READING else contextlib.nullcontext()


def _forked() -> None:
    global _lock, _inside
    _lock = threading.Lock()  # a thread that is not in the child may have held it
    if _inside and _was_on:
        gc.enable()
    _inside = 0


os.register_at_fork(after_in_child=_forked)
