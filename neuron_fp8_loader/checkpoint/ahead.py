"""Reading ahead, for those who take a few bytes of a file in a store at a time."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .fetch import cut, daemons, requests_at_once, view
from .info import TensorInfo
from .remote import RemotePath


def _nothing(_offset: int, _part: torch.Tensor) -> None:
    pass


class Ahead:
    """Reads ahead of those who take a few bytes at a time, in about the order of the files.

    A run of bytes is given up once all of it was taken; who wants it again has it fetched again. No more runs are held
    than there may be requests.
    """

    def __init__(self, get: Callable[[RemotePath, int, int], Any], infos: list[TensorInfo]) -> None:
        self._get = get
        self._pieces = cut((info, 0, info.nbytes, _nothing) for info in infos)
        self._of_file: dict[Path, list[int]] = {}
        for number, piece in enumerate(self._pieces):
            self._of_file.setdefault(piece.file, []).append(number)
        self._left = [sum(end - start for start, end, _ in piece.parts) for piece in self._pieces]
        self._held: dict[int, Any] = {}  # piece -> its bytes, or an error; None while they are under way
        self._ahead: set[int] = set()
        self._changed, self._over = threading.Condition(), False
        self._slots = threading.Semaphore(requests_at_once())
        self._queue = iter(range(len(self._pieces)))

    def __enter__(self) -> Ahead:
        daemons(min(len(self._pieces), requests_at_once()), self._work)
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._over = True
            self._held.clear()
            self._changed.notify_all()
        self._slots.release(requests_at_once())

    def _work(self) -> None:
        while True:
            self._slots.acquire()
            with self._changed:
                number = next((n for n in self._queue if n not in self._held and self._left[n] > 0), None)
                if number is None or self._over:
                    return
                self._held[number] = None
                self._ahead.add(number)
            self._bring(number)

    def _bring(self, number: int) -> None:
        piece, got = self._pieces[number], None
        try:
            got = self._get(piece.file, piece.start, piece.end)
        except BaseException as error:
            got = error
        with self._changed:
            if not self._over:
                self._held[number] = got
            self._changed.notify_all()

    def fill(self, info: TensorInfo, start: int, out: torch.Tensor) -> None:
        """As ``Source.opened`` says."""
        assert info.file is not None
        begin, end = info.offset + start, info.offset + start + out.numel()
        numbers = self._of_file[info.file]
        for number in numbers[max(0, bisect_right(numbers, begin, key=lambda n: self._pieces[n].start) - 1) :]:
            piece = self._pieces[number]
            a, b = max(begin, piece.start), min(end, piece.end)
            if piece.start >= end:
                break
            if a < b:
                with view(self._bytes_of(number)) as data:
                    out[a - begin : b - begin].copy_(data[a - piece.start : b - piece.start])
                self._took(number, b - a)

    def _bytes_of(self, number: int) -> Any:
        while True:
            with self._changed:
                if self._over:
                    raise CheckpointError(f"{self._pieces[number].file}: reading was given up")
                got = self._held.get(number)
                if isinstance(got, BaseException):
                    raise got
                if got is not None:
                    return got
                if number in self._held:
                    self._wait()
                    continue
                self._held[number] = None
            if not daemons(1, partial(self._bring, number)):
                self._bring(number)

    def _wait(self) -> None:
        try:
            self._changed.wait()
        except BaseException:  # an interrupt: the others need not wait for the store either
            self._over = True
            self._changed.notify_all()
            raise

    def _took(self, number: int, nbytes: int) -> None:
        with self._changed:
            self._left[number] -= nbytes
            if self._left[number] <= 0:
                self._held.pop(number, None)
                if number in self._ahead:
                    self._ahead.remove(number)
                    self._slots.release()
