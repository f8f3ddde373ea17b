"""The NEON path, cross-compiled and run by an emulator where both are at hand."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from support import ROOT

COMPILER = shutil.which("aarch64-linux-gnu-gcc")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
NATIVE = ROOT / "neuron_fp8_loader" / "codes" / "_native"
SOURCES = [NATIVE / "codes_neon.c", NATIVE / "codes_portable.c", ROOT / "tests" / "native" / "check_neon.c"]


@pytest.mark.skipif(not COMPILER or not EMULATOR, reason="needs aarch64-linux-gnu-gcc and qemu-aarch64")
@pytest.mark.parametrize("optimize", ["-O0", "-O3"])
def test_against_a_plain_loop(tmp_path, optimize):
    program = tmp_path / "check_neon"
    command = [COMPILER, optimize, "-std=c11", "-Wall", "-Wextra", "-Werror", "-static", f"-I{NATIVE}"]
    subprocess.run([*command, *map(str, SOURCES), "-o", str(program)], check=True, timeout=120)
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" checks\n")
