"""Runs the real_*.py beside it where NXD_SRC and NXDI_SRC name checkouts of NxD and NxD Inference."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neuron_fp8_loader import kernel
from tests.support import ROOT, SHARED

CASES = [
    ("real_cases.py", "real_layouts.py", "real_qkv.py"),
    ("real_moe.py",),
    ("real_models.py",),
    ("real_logits.py",),
    ("real_moe_ep.py", "real_kernel.py"),
    ("real_mimo.py",),
    ("real_config.py", "real_mutations.py", "real_lists.py"),
    ("real_disable.py",),
]


@pytest.mark.parametrize("files", CASES)
def test_real_sources(files: tuple[str, ...]) -> None:
    for variable in ("NXD_SRC", "NXDI_SRC"):
        if not os.environ.get(variable):
            pytest.skip(f"{variable} is not set")
    if files == ("real_mimo.py",) and not os.environ.get("MIMO_SRC"):
        pytest.skip("MIMO_SRC is not set")
    if not (SHARED.parent / "nxdi_cpu" / "harness.py").is_file():
        pytest.skip("no shared nxdi_cpu harness")
    for package in ("transformers", "tenacity"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    if kernel.active != kernel.paths()[0]:
        pytest.skip("once is enough: the kernel paths give the same bytes")
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "NEURON_RT_NUM_CORES")}
    environment["OMP_NUM_THREADS"] = "1"  # tiny tensors: threads cost more than they save
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-x", "-p", "no:cacheprovider"]
    command += [str(Path(__file__).with_name(name)) for name in files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
