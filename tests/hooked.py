"""A build of the native module whose reads pass through Python, so that the same faults can be put into them."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import ROOT

from neuron_fp8_loader.codes import kernel

NATIVE = ROOT / "neuron_fp8_loader" / "codes" / "_native"


class _Part(ctypes.Structure):  # struct iovec
    _fields_ = (("at", ctypes.c_void_p), ("size", ctypes.c_size_t))


_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, ctypes.c_int, ctypes.POINTER(_Part), ctypes.c_int, ctypes.c_longlong, use_errno=True
)
_kept: list[Any] = []


@cache
def _build() -> tuple[ModuleType, ctypes.CDLL] | None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    include = Path(sysconfig.get_paths()["include"])
    if kernel._kernel is None or not compiler or not (include / "Python.h").is_file():
        return None
    directory = tempfile.mkdtemp(prefix="neuron-fp8-hooked-")
    made = Path(directory) / "_kernel.abi3.so"
    sources = [str(p) for p in (*NATIVE.glob("*.c"), ROOT / "tests" / "native" / "preadv.c")]
    try:
        flags = ["-std=c11", "-O0", "-fPIC", "-shared", "-ffp-contract=off", f"-I{include}", f"-I{NATIVE}"]
        hooked = [_object(compiler, flags, Path(directory), NATIVE / "read.c")]
        rest = [s for s in sources if not s.endswith("/read.c")]
        subprocess.run([compiler, *flags, *rest, *hooked, "-o", str(made), "-lm"], check=True, timeout=120)
        spec = importlib.util.spec_from_file_location("_kernel", made)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, ctypes.CDLL(str(made))
    finally:
        shutil.rmtree(directory)  # it is mapped


def _object(compiler: str, flags: Sequence[str], directory: Path, source: Path) -> str:
    made = directory / "read.o"
    flags = [flag for flag in flags if flag != "-shared"]
    subprocess.run([compiler, *flags, *_HOOKED, "-c", str(source), "-o", str(made)], check=True)
    return str(made)


_HOOKED = ("-Dpreadv=hooked_preadv", "-Dpreadv2=hooked_preadv2")


def can_hook() -> bool:
    """Is there a native module, and a compiler to build it with a hook?"""
    return kernel.reads_natively() and _build() is not None


def hook(monkeypatch: pytest.MonkeyPatch, read: Callable[[int, Sequence[memoryview], int], int]) -> None:
    """Have the native reader call ``read`` as Python's would call ``os.preadv``."""

    def called(handle: int, parts: Any, count: int, offset: int) -> int:
        buffers = [memoryview((ctypes.c_ubyte * parts[i].size).from_address(parts[i].at)) for i in range(count)]
        try:
            return read(handle, buffers, offset)
        except OSError as error:
            ctypes.set_errno(error.errno or 0)
            return -1

    _kept.append(_HOOK(called))  # a read may be under way when the test is over
    _pointer(library(monkeypatch)).value = ctypes.cast(_kept[-1], ctypes.c_void_p).value


def library(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """Use the build, its reads as they are; returns it, for what tests/native/preadv.c has to set."""
    built = _build()
    assert built is not None
    monkeypatch.setattr(kernel, "_kernel", built[0])
    _pointer(built[1]).value = None
    return built[1]


def _pointer(built: ctypes.CDLL) -> ctypes.c_void_p:
    return ctypes.c_void_p.in_dll(built, "preadv_hook")
