"""The C kernels, called from C: one suite, compiled once for each instruction set, emulated where it is not ours."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
from support import ROOT

NATIVE = ROOT / "neuron_fp8_loader" / "codes" / "_native"
SOURCES = sorted(p for p in NATIVE.glob("*.c") if p.name not in ("module.c", "module_read.c", "arguments.c"))
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
HOST = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
CROSS = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
ON_X86, ON_ARM = (platform.machine() in names for names in (("x86_64", "AMD64"), ("aarch64", "arm64")))


Objects = Callable[[list[str]], list[str]]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Objects:
    """The kernels, compiled by a command: they are the same for all tests that have it in common."""

    @cache
    def made(compiler: tuple[str, ...]) -> list[str]:
        directory = tmp_path_factory.mktemp("objects")
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for done in threads.map(
                lambda c: subprocess.run([*compiler, "-c", c], timeout=120, cwd=directory), SOURCES
            ):
                done.check_returncode()
        return [str(directory / source.with_suffix(".o").name) for source in SOURCES]

    return lambda compiler: made(tuple(compiler))


def command(path: str) -> tuple[list[str], list[str]]:
    """The compiler for a path, and what runs its programs here."""
    if path == "neon" and not ON_ARM:
        if not CROSS or not EMULATOR:
            pytest.skip("needs aarch64-linux-gnu-gcc and qemu-aarch64")
        return [CROSS, "-static"], [EMULATOR]
    if not HOST or (path == "avx2" and not ON_X86):
        pytest.skip(f"no compiler for {path} here")
    return [HOST], []


@pytest.mark.parametrize("optimize", ["-O0", "-O3"])
@pytest.mark.parametrize("path", ["portable", "avx2", "neon"])
@pytest.mark.parametrize("what", ["check_codes.c", "check_requantize.c"])
def test_against_plain_loops(tmp_path: Path, objects: Objects, what: str, path: str, optimize: str) -> None:
    compiler, runner = command(path)
    compiler += [optimize, "-std=c11", "-ffp-contract=off", *WARNINGS, f"-I{NATIVE}"]
    program, check = tmp_path / "check", ROOT / "tests" / "native" / what
    linked = [f"-DPATH={path}", str(check), *objects(compiler), "-o", str(program), "-lm"]
    subprocess.run([*compiler, *linked], check=True, timeout=120)
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 77:
        pytest.skip(f"this CPU has no {path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" checks\n")
