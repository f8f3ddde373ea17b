"""Reads that fail: what disks, network file systems and other processes do to a file while it is read.

Everything that the package reads of a checkpoint with its own hands (headers, indexes, configs, data) goes through
``os.preadv``, or in native code through ``preadv``; ``Faulty`` stands in for both.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

import pytest
from hooked import can_hook, hook

from neuron_fp8_loader.checkpoint import reader

WAYS = ("native", "python")
"""How data is read; tests of what both promise set ``way``."""

way = "native"

Read = Callable[[int, Sequence[memoryview], int], int]
Fault = Callable[[Read, int, Sequence[memoryview], int], int]
"""A fault is called in place of a read, as ``fault(real, descriptor, buffers, offset)``."""


class Faulty:
    """Counts reads, and makes some of them go wrong.

    Args:
        monkeypatch: pytest's.
        fault: what happens.
        at: at which read, counted from 0; None for every one.
        data_only: count and hit only reads beyond the first ``data_only`` bytes of a file (its header).
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fault: Fault | None = None, at: int | None = None, data_only: int = 0
    ) -> None:
        self.reads: list[tuple[str, int, int]] = []
        """(file, offset, bytes) of each read that succeeded."""
        self._real, self._fault, self._at, self._begin, self._count = os.preadv, fault, at, data_only, 0
        monkeypatch.setattr(os, "preadv", self)
        if way == "native" and can_hook():
            hook(monkeypatch, self)
        else:
            monkeypatch.setattr(reader, "reads_natively", lambda: False)

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        file = os.readlink(f"/proc/self/fd/{descriptor}")
        hit = False
        if offset >= self._begin:
            hit = self._fault is not None and self._at in (None, self._count)
            self._count += 1
        read = self._fault if hit else None
        got = read(self._real, descriptor, buffers, offset) if read else self._real(descriptor, buffers, offset)
        self.reads.append((file, offset, got))
        return got

    def read_of(self, file: os.PathLike[str], begin: int = 0) -> int:
        """How many bytes of this file were read, beyond the first ``begin``."""
        own = (entry for entry in self.reads if entry[0] == os.path.realpath(file))
        return sum(max(0, offset + got - max(offset, begin)) for _, offset, got in own)


def failing(number: int) -> Fault:
    """The system says no: ``errno.EIO``, ``errno.EAGAIN``, ``errno.ESTALE``, ..."""

    def fault(real: Read, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(number, os.strerror(number))

    return fault


def interrupted() -> Fault:
    """A signal comes before the first byte, once: the next read succeeds."""
    seen: set[tuple[int, int]] = set()

    def fault(real: Read, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if (descriptor, offset) not in seen:
            seen.add((descriptor, offset))
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        return real(descriptor, buffers, offset)

    return fault


def short(limit: int) -> Fault:
    """At most ``limit`` bytes a read."""

    def fault(real: Read, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return real(descriptor, [buffers[0][:limit]], offset)

    return fault


def before(event: Callable[[], object]) -> Fault:
    """Something happens to the file just before it is read: cut, replaced, written to."""

    def fault(real: Read, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        event()
        return real(descriptor, buffers, offset)

    return fault
