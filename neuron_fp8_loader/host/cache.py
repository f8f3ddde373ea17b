"""What is kept between loads: headers, plans and facts of files that have not changed. Bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

LIMIT = 256 << 20
"""Bytes, as estimated by those who keep something."""

Value = TypeVar("Value")

_lock = threading.Lock()
_kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
_total = 0


def cached(key: Hashable, make: Callable[[], Value], nbytes: int | Callable[[Value], int]) -> Value:
    """The value kept under ``key``, or that of ``make()``, which is kept.

    Args:
        key: must name what the value was made from (device, inode, size, time and digest of a file, not its path).
        make: makes the value; an exception is not kept.
        nbytes: about how much memory the value takes, or a function that tells it from the value.
    """
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            value: Value = _kept[key][0]
            return value
    value = make()
    keep(key, value, nbytes(value) if callable(nbytes) else nbytes)
    return value


def keep(key: Hashable, value: object, nbytes: int) -> None:
    """Keep a value, in place of one kept under the same key; what was not asked for longest makes room."""
    global _total
    if nbytes > LIMIT:
        return
    with _lock:
        _total += nbytes - _kept.pop(key, (None, 0))[1]
        _kept[key] = value, nbytes
        while _total > LIMIT:
            _total -= _kept.popitem(last=False)[1][1]


def forget() -> None:
    """Empty the cache."""
    global _total
    with _lock:
        _kept.clear()
        _total = 0
