"""Ctrl-C at any moment: memory that is changed in place is changed whole, and work not begun is left."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from support import codes, frozen, halved, same_bytes

from neuron_fp8_loader import rescale_state_dict
from neuron_fp8_loader.host import parallel
from neuron_fp8_loader.host.signals import uninterrupted


def given() -> dict[str, torch.Tensor]:
    """A state dict of every kind of change: two pairs, strided ones, float8_e4m3fnuz, and one to be dequantized."""
    made: dict[str, torch.Tensor] = {}
    for name in ("a", "b", "gone"):
        made[f"{name}.weight"] = codes([[0x7E, 0x10], [0x78, 0xFE]])
        made[f"{name}.weight_scale"] = torch.ones(2, 1)
    made["t.weight"] = codes([[0x7E, 0x10, 0x01], [0x78, 0xFE, 0x02]]).t()
    made["t.weight_scale"] = torch.ones(3, 1)
    made["z.weight"] = codes([[0x10, 0x20]]).view(torch.uint8).view(torch.float8_e4m3fnuz)
    return made


def state_of(tensors: dict[str, torch.Tensor]) -> str:
    """``"before"``, ``"after"`` or what is wrong."""
    before = frozen(given())
    if list(tensors) == list(before) and all(same_bytes(tensors[n], t) for n, t in before.items()):
        return "before"
    for name in ("a", "b", "t"):
        if not same_bytes(tensors[f"{name}.weight"], halved(before[f"{name}.weight"])):
            return f"{name}.weight is not halved"
        if not torch.equal(tensors[f"{name}.weight_scale"], before[f"{name}.weight_scale"] * 2):
            return f"{name}.weight_scale is not doubled"
    if tensors["gone.weight"].dtype != torch.bfloat16 or "gone.weight_scale" in tensors:
        return "gone is still there"
    return "after" if tensors["z.weight"].dtype == torch.float8_e4m3fn else "z is still fnuz"


@contextmanager
def interrupted_at(moment: int) -> Iterator[list[int]]:
    """Raise SIGINT as the ``moment``-th line of the driver, or of what it shares memory with, begins."""
    seen = [0]
    files = {
        sys.modules[f"neuron_fp8_loader.{m}"].__file__ for m in ("load.state_dict", "host.sharing", "load.finish")
    }

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            seen[0] += 1
            if seen[0] == moment:
                signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(None)


def convert(tensors: dict[str, torch.Tensor], threads: int = 1) -> None:
    rescale_state_dict(tensors, inplace=True, dequantize=["gone"], threads=threads)


def test_in_place_is_whole_or_not_at_all() -> None:
    with interrupted_at(0) as lines:
        convert(given())
    assert lines[0] > 300
    ends: dict[str, int] = {}
    for moment in range(1, lines[0], max(1, lines[0] // 70)):
        tensors = given()
        with pytest.raises(KeyboardInterrupt), interrupted_at(moment):
            convert(tensors)
        end = state_of(tensors)
        ends[end] = ends.get(end, 0) + 1
    assert set(ends) == {"before", "after"}, ends
    assert min(ends.values()) > 10  # interrupted in both of its halves


def test_in_place_from_another_thread() -> None:
    """The same, at moments of a clock."""
    tensors = {f"{n}.weight": codes([[0x7E] * 256] * 64) for n in range(40)}
    tensors |= {f"{n}.weight_scale": torch.ones(1) for n in range(40)}
    begin = time.perf_counter()
    convert_all = {name: t.clone() for name, t in tensors.items()}
    rescale_state_dict(convert_all, inplace=True, threads=3)
    lasts, interrupts = time.perf_counter() - begin, 0
    for step in range(25):
        mine = {name: t.clone() for name, t in tensors.items()}
        hit = threading.Timer(lasts * step / 20, lambda: os.kill(os.getpid(), signal.SIGINT))
        try:
            hit.start()
            rescale_state_dict(mine, inplace=True, threads=3)
            hit.join()
            time.sleep(1)  # the signal has been sent: it arrives
        except KeyboardInterrupt:
            interrupts += 1
        hit.join()
        changed = {name: not same_bytes(t, tensors[name]) for name, t in mine.items()}
        assert len(set(changed.values())) == 1, f"half converted: {changed}"
    assert interrupts == 25


def test_a_second_call_changes_nothing_more() -> None:
    tensors = given()
    with interrupted_at(0) as lines:
        convert(given())
    with pytest.raises(KeyboardInterrupt), interrupted_at(lines[0] - 40):
        convert(tensors)
    assert state_of(tensors) == "after"
    rescale_state_dict(tensors, inplace=True)
    assert state_of(tensors) == "after"


# -- putting signals off ----------------------------------------------------------------------------------------


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    done = []

    def block() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_every_handler_is_called_and_is_back_in_its_place() -> None:
    called = []

    def handler(number: int, _: FrameType | None) -> None:
        called.append(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGUSR1, signal.SIGALRM)}
    try:
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGALRM)
                signal.raise_signal(signal.SIGUSR1)
            assert called == []
        assert called == [signal.SIGALRM, signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def test_an_error_of_the_block_passes() -> None:
    with pytest.raises(ValueError, match="of the block"), uninterrupted():
        raise ValueError("of the block")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_enter_as_they_are() -> None:
    seen: list[object] = []

    def work() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


# -- threads ----------------------------------------------------------------------------------------------------


def test_an_interrupt_while_threads_are_started_leaves_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    start, done = threading.Thread.start, []

    def interrupted_start(thread: threading.Thread) -> None:
        start(thread)
        signal.raise_signal(signal.SIGINT)

    def work(job: int) -> None:
        time.sleep(0.001)
        done.append(job)

    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        parallel.run(range(5000), work, 8)
    assert len(done) < 2500
    assert threading.active_count() == before


@pytest.mark.parametrize("given", [0, 2])
def test_where_there_are_no_more_threads(monkeypatch: pytest.MonkeyPatch, given: int) -> None:
    start, left, done = threading.Thread.start, [given], []

    def limited_start(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited_start)
    parallel.run(range(1000), done.append, 8)
    assert sorted(done) == list(range(1000))


def test_an_error_in_another_thread_is_the_callers(tmp_path: Path) -> None:
    caller = threading.current_thread()
    met = threading.Barrier(2, timeout=20)

    def work(job: int) -> None:
        if job < 2:
            met.wait()
        if threading.current_thread() is not caller:
            raise OSError(f"job {job}")
        time.sleep(0.001)

    with pytest.raises(OSError, match="job"):
        parallel.run(range(1000), work, 2)
