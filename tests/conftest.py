"""What holds for the whole suite: which tests depend on the kernel's path, and the signals that tests may rely on."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from support import can_save

hypothesis.settings.register_profile("house", deadline=None)  # no test asserts a time
hypothesis.settings.load_profile("house")

HERE = Path(__file__).parent

KERNEL_PATH = (
    "test_conventions.py",
    "test_experts.py",
    "test_kernel.py",
    "test_layout.py",
    "test_load.py",
    "test_load_cases.py",
    "test_properties.py",
    "test_reader.py",
    "test_report.py",
    "test_requantize.py",
    "test_rescale.py",
    "test_safe_open.py",
    "test_sharing.py",
    "test_slices.py",
    "test_traps.py",
    "cli/test_cli_verify.py",
)
"""Whose tests look at bytes or counts that the kernel made: `make test` runs them on every path, the rest once.
(test_kernel, test_histogram and test_requantize go through the paths by themselves where they can.)"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files = {HERE / name for name in KERNEL_PATH}
    gone = sorted(str(file.relative_to(HERE)) for file in files if not file.is_file())
    if gone:
        raise pytest.UsageError(f"tests/conftest.py: KERNEL_PATH lists {', '.join(gone)}, which is not there")
    for item in items:
        if item.path in files:
            item.add_marker("kernel_path")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """Skip where the oldest supported releases stop: e8m0 came with torch 2.7, fnuz files with safetensors 0.8.

    A test that cannot make its input has shown nothing; with newer releases nothing is skipped here.
    """
    try:
        return (yield)
    except AttributeError as error:
        if hasattr(torch, "float8_e8m0fnu") or getattr(error, "name", None) != "float8_e8m0fnu":
            raise
        pytest.skip("this torch has no float8_e8m0fnu")
    except KeyError as error:
        if error.args != (torch.float8_e4m3fnuz,) or can_save(torch.float8_e4m3fnuz):
            raise
        pytest.skip("this safetensors cannot write float8_e4m3fnuz")


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> Iterator[None]:
    """Ctrl-C has its usual effect, in here and in processes started from here.

    A shell without job control starts what it puts in the background (``make test &``) with SIGINT ignored, and
    children inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
