"""Python's collector: off in bounded stages, and on again whatever happens; and how little there is for it to see."""

from __future__ import annotations

import cProfile
import gc
import os
import signal
import threading
import time

import pytest
import torch
from support import codes, save

from neuron_fp8_loader import load_file, load_state_dict
from neuron_fp8_loader.checkpoint import open_checkpoint
from neuron_fp8_loader.errors import Fp8LoaderError
from neuron_fp8_loader.host import cache, collector
from neuron_fp8_loader.host.collector import uncollected
from neuron_fp8_loader.options import Options
from neuron_fp8_loader.plan import recipe_for


def tensors(count: int) -> dict[str, torch.Tensor]:
    made = {f"m.{i}.weight": codes([[0x7E, 0x10]]) for i in range(count)}
    return made | {f"m.{i}.weight_scale": torch.ones(1) for i in range(count)}


def test_it_is_off_within_and_on_after():
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyboardInterrupt), uncollected():
        raise KeyboardInterrupt
    assert gc.isenabled()


def test_where_the_caller_has_it_off_it_stays_off(tmp_path):
    file = save(tmp_path / "model.safetensors", tensors(2))
    gc.disable()
    try:
        load_file(file)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_threads_share_the_switch():
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with uncollected():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    with uncollected():
        pass
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_a_child_has_it_as_it_was():
    with uncollected():
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() and collector._inside == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("bad", [True, False])
def test_a_load_leaves_it_on(tmp_path, bad):
    made = tensors(3)
    if bad:
        made["m.0.weight"] = codes([[0x7F, 0]])
    save(tmp_path / "model.safetensors", made)
    try:
        load_state_dict(tmp_path)
    except Fp8LoaderError:
        assert bad
    assert gc.isenabled()


def test_few_objects_a_tensor(tmp_path):
    """Headers, plan and recipe of two sizes: what one tensor more costs the collector."""

    def tracked(count: int) -> int:
        directory = tmp_path / str(count)
        directory.mkdir()
        save(directory / "model.safetensors", tensors(count))
        cache.forget()
        gc.collect()
        before = len(gc.get_objects())
        checkpoint = open_checkpoint(directory)
        recipe = recipe_for(checkpoint, Options())
        gc.collect()
        assert len(recipe.steps) == 2 * count
        return len(gc.get_objects()) - before

    small, large = tracked(500), tracked(1500)
    a_tensor = (large - small) / 2000
    assert a_tensor < 4  # a header, a step, and what a pair and its group take


def test_a_short_load_is_not_collected_within(tmp_path):
    save(tmp_path / "model.safetensors", tensors(2000))
    seen: list[str] = []
    gc.callbacks.append(note := lambda phase, info: seen.append(phase))
    try:
        gc.collect()
        assert seen  # the callback works
        seen.clear()
        loaded = load_state_dict(tmp_path)
    finally:
        gc.callbacks.remove(note)
    assert len(loaded) == 4000
    assert seen.count("start") <= 2  # before it, and after


def test_few_calls_a_tensor(tmp_path):
    """What Python does for one pair more, counted: with 100,000 tensors it is most of the time."""

    def calls(count: int) -> int:
        directory = tmp_path / str(count)
        directory.mkdir()
        save(directory / "model.safetensors", tensors(count))
        profile = cProfile.Profile()
        profile.runcall(load_state_dict, directory, threads=1)
        return sum(entry.callcount for entry in profile.getstats())

    calls(10)  # imports and tables
    small, large = calls(500), calls(1500)
    assert (large - small) / 2000 < 150


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_at_many_moments_leave_it_on():
    """A timer's signals come in the middle of entering and leaving."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    landed = 0
    try:
        for turn in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, 5e-6 + (turn % 50) * 4e-7)
                for _ in range(100):
                    with uncollected():
                        pass
                time.sleep(0.001)
            except KeyboardInterrupt:
                landed += 1
            assert gc.isenabled()
            assert collector._inside == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert landed
