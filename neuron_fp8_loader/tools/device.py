"""What a Neuron device makes of each FP8 code: one small linear layer, compiled and run twice.

The compiler's flag and the calls are those of ``benchmarks/neuron_compile``, which runs a whole model.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from glob import glob
from typing import Any

import torch

from ..codes.device import platform
from ..errors import printable
from .settings import ENVIRONMENT

DEVICES = "/dev/neuron[0-9]*"

FP8_ARGS = "--internal-hlo2tensorizer-options='--experimental-unsafe-fp8e4m3fn-as-fp8e4m3'"
"""Without it the compiler refuses float8_e4m3fn on trn1, inf2 and trn2 (NCC_EVRF051); trn3 takes no such flag."""

_COLUMNS = 128
_FITS = range(0x78)
_ABOVE = range(0x78, 0x7F)

Run = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
"""Compile a module and run it on one input: (module, bfloat16 [1, 128]) -> [1, 256]."""


class Codes(torch.nn.Module):
    """A linear layer [256, 128] whose row r holds code r (of ``codes``; else 0) in its first column, zeros after it.

    A row by itself, so that a NaN stays in its own output.
    """

    def __init__(self, codes: range) -> None:
        super().__init__()
        bits = torch.zeros(256, _COLUMNS, dtype=torch.uint8)
        for code in codes:
            bits[code, 0], bits[code | 0x80, 0] = code, code | 0x80
        self.register_buffer("weight", bits.view(torch.float8_e4m3fn))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [1, 128]; returns [1, 256]."""
        return torch.nn.functional.linear(x, self.get_buffer("weight").to(x.dtype))


@dataclass(frozen=True)
class Reading:
    """What was seen.

    Attributes:
        subnormals: codes 0x01 to 0x07: ``"kept"``, ``"flushed"`` or ``"wrong"``.
        wrong: how many of the normal codes up to 240, of 224 with both signs, had another value.
        above: code 0x78, 256 to a GPU: ``"inf"``, ``"nan"``, ``"256"``, another value, or ``"refused"`` where the
            runtime gave an error instead.
    """

    subnormals: str
    wrong: int
    above: str

    @property
    def right(self) -> bool:
        """Is everything that the loader relies on so?"""
        return not self.wrong and self.subnormals != "wrong"

    def describe(self) -> str:
        """One line."""
        values = "right" if not self.wrong else f"WRONG for {self.wrong} of 224 codes"
        how = "refused by the runtime" if self.above == "refused" else f"read as {self.above}"
        kind = "e4m3fn, nothing to rescale" if self.above == "256" else "IEEE e4m3, as fp8_rescale expects"
        text = f"subnormals {self.subnormals}; code 0x78 {how}; values up to 240 {values}"
        return f"{text}: {kind}" if self.right else text


def read_codes(run: Run) -> Reading:
    """Run the layer, first with the codes that every reading agrees on, then with those above 240."""
    x = torch.zeros(1, _COLUMNS, dtype=torch.bfloat16)
    x[0, 0] = 1
    seen = run(Codes(_FITS), x).detach().float().cpu().reshape(256)
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = codes.view(torch.float8_e4m3fn).float()
    magnitude = codes.int() & 0x7F
    small = (magnitude > 0) & (magnitude < 0x08)
    normal = (magnitude >= 0x08) & (magnitude < 0x78)
    if torch.equal(seen[small], wanted[small]):
        subnormals = "kept"
    else:
        subnormals = "wrong" if seen[small].ne(0).any() else "flushed"
    wrong = int(seen[normal].ne(wanted[normal]).sum())
    try:
        above = run(Codes(_ABOVE), x).detach().float().reshape(256)[0x78].item()
    except RuntimeError:  # "status=1003 message=Numerical Error" is what the Neuron runtime says of NaN
        return Reading(subnormals, wrong, "refused")
    return Reading(subnormals, wrong, f"{above:g}")


def missing() -> tuple[str, str] | None:
    """(what is missing for a run, what to do); None where a device and its packages are there."""
    if not glob(DEVICES):
        return (
            "no Neuron device: there is no /dev/neuron0, so nothing was run",
            "run it on a trn1, inf2, trn2 or trn3 instance with the driver loaded (neuron-ls lists the devices)",
        )
    os.environ.update(ENVIRONMENT)  # read when torch_neuronx is imported
    try:
        importlib.import_module("torch_neuronx")
    except Exception as error:
        return f"torch_neuronx cannot be imported ({printable(str(error))})", "install Neuron's torch-neuronx"
    return None


def neuron(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``Run`` on the device: ``torch_neuronx.trace``, or ``torch.compile`` where only the native stack is."""
    torch_neuronx: Any = importlib.import_module("torch_neuronx")
    args = "--auto-cast=none -O1" + ("" if platform() == "trn3" else f" {FP8_ARGS}")
    with torch.no_grad():
        if hasattr(torch_neuronx, "trace"):
            with tempfile.TemporaryDirectory(prefix="neuron-fp8-doctor-") as workdir:
                traced = torch_neuronx.trace(
                    module, (x,), compiler_workdir=workdir, compiler_args=args, inline_weights_to_neff=False
                )
                result: torch.Tensor = traced(x)
                return result.cpu()
        flags = os.environ.get("NEURON_CC_FLAGS", "")
        if args not in flags:
            os.environ["NEURON_CC_FLAGS"] = f"{flags} {args}".strip()
        os.environ["TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION"] = "1"  # never the CPU in secret
        compiled = torch.compile(module.to("neuron"), backend="neuron", fullgraph=True, dynamic=False)
        answer: torch.Tensor = compiled(x.to("neuron"))
        return answer.cpu()
