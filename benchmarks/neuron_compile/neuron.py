"""The Neuron compiler and device: ``torch_neuronx.trace``, or ``torch.compile`` where only the native stack is.

API: ``torch_neuronx.trace(func, example_inputs, *_, input_output_aliases={}, compiler_workdir=None,
compiler_args=None, partitioner_config=None, inline_weights_to_neff=True, cpu_backend=False)`` (Neuron SDK
documentation, "PyTorch NeuronX Tracing API for Inference"); TorchNeuron's ``torch.compile(backend="neuron")``
(the same, "torch.compile on Neuron").
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import os
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .backend import Missing, Outcome, timed_runs
from .model import Case, Tensors

DEVICES = "/dev/neuron[0-9]*"
TORCH_DEVICE = "neuron"  # the native stack's

# read by the Neuron build of torch-xla when it is imported; NxD Inference's inference_demo.py sets both
ENVIRONMENT = {"XLA_HANDLE_SPECIAL_SCALAR": "1", "UNSAFE_FP8FNCAST": "1"}

# The compiler takes the FP8 flag only inside --internal-hlo2tensorizer-options; without it trn1, inf2 and trn2 stop at
# NCC_EVRF051, "Data type F8E4M3FN is not supported". NxD Inference (models/model_wrapper.py) passes the same string.
FP8_ARGS = "--internal-hlo2tensorizer-options='--experimental-unsafe-fp8e4m3fn-as-fp8e4m3'"
BASE_ARGS = "--auto-cast=none --model-type=transformer -O1"

_PACKAGES = (
    "neuronx-cc", "torch-neuronx", "torch-xla", "libneuronxla", "torch", "nki",
    "neuronx-distributed", "neuronx-distributed-inference",
)  # fmt: skip
_INDEX = "https://pip.repos.neuron.amazonaws.com"


def devices() -> list[str]:
    """The Neuron devices of this host."""
    return sorted(glob.glob(DEVICES))


def set_environment() -> None:
    """Set what the FP8 path needs. Call before torch_neuronx or torch_xla is imported."""
    os.environ.update(ENVIRONMENT)


def require_package(module: str, distribution: str) -> None:
    """Raise Missing where a Neuron package is not installed, or is the public index's empty placeholder."""
    if importlib.util.find_spec(module) is not None:
        return
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise Missing(
            f"{distribution} is not installed: pip install --extra-index-url {_INDEX} {distribution}"
        ) from None
    raise Missing(
        f"{distribution} {version} is installed but has no module {module}: the public index holds an empty "
        f"placeholder of that name. pip uninstall {distribution}, then "
        f"pip install --index-url {_INDEX} {distribution}"
    )


def neuron_versions() -> dict[str, str]:
    """Versions of the compiler, the frameworks, the runtime library and the driver, as far as they are there."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for library in glob.glob("/opt/aws/neuron/lib/libnrt.so"):
        found["runtime"] = Path(os.path.realpath(library)).name
    driver = Path("/sys/module/neuron/version")
    if driver.is_file():
        found["driver"] = driver.read_text(encoding="ascii", errors="replace").strip()
    return found


def platform() -> str:
    """``"trn1"``, ``"inf2"``, ``"trn2"``, ``"trn3"``, or ``""`` where it cannot be told."""
    named = os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE", "").strip()
    if named:
        return named
    try:
        utils = importlib.import_module("torch_neuronx.utils")
        return str(utils.get_platform_target())
    except Exception:  # absent, or it asks a device that is not there
        return ""


class Neuron:
    """The device, through whichever of the two stacks is installed.

    Args:
        compile_only: compile on the host, without a device (``cpu_backend=True``), and run nothing.
        target: what to compile for then: ``"trn1"``, ``"inf2"``, ``"trn2"``, ``"trn3"``.
    """

    name = "neuron"
    tolerance = 0.05
    exact = False

    def __init__(self, compile_only: bool = False, target: str | None = None) -> None:
        self.compile_only, self.target = compile_only, target

    def require(self) -> None:
        if not self.compile_only and not devices():
            raise Missing(
                f"no Neuron device: there is no {DEVICES}. Run this on a trn1, inf2, trn2 or trn3 instance with the "
                "driver loaded (neuron-ls lists the devices; package aws-neuronx-dkms), or compile without a device: "
                "--compile-only --target trn1"
            )
        set_environment()
        require_package("torch_neuronx", "torch-neuronx")
        if importlib.util.find_spec("neuronxcc") is None and shutil.which("neuronx-cc") is None:
            raise Missing(f"the compiler is missing: pip install --extra-index-url {_INDEX} neuronx-cc")
        if self.compile_only and self.native:
            raise Missing("--compile-only needs torch_neuronx.trace, which TorchNeuron (the native stack) has not")

    @property
    def native(self) -> bool:
        """Is only the native stack (TorchNeuron) there? It registers the device "neuron" and has no ``trace``."""
        return not hasattr(importlib.import_module("torch_neuronx"), "trace")

    @property
    def compiler_args(self) -> str:
        """What the compiler is given. Trn3 reads e4m3fn natively and takes no FP8 flag."""
        where = self.target if self.compile_only else platform()
        args = BASE_ARGS if where == "trn3" else f"{BASE_ARGS} {FP8_ARGS}"
        return f"{args} --target {self.target}" if self.target else args

    def versions(self) -> dict[str, str]:
        return {**neuron_versions(), "platform": self.target or platform() or "unknown"}

    def reference(self, case: Case) -> torch.Tensor:
        return case.reference()

    def run(self, case: Case, tensors: Tensors) -> Outcome:
        return self._compile(case, tensors) if self.native else self._trace(case, tensors)

    def _trace(self, case: Case, tensors: Tensors) -> Outcome:
        torch_neuronx = importlib.import_module("torch_neuronx")
        ids = case.ids.to(torch.int32)
        details: dict[str, Any] = {"stack": "torch_neuronx.trace", "compiler_args": self.compiler_args}
        with tempfile.TemporaryDirectory(prefix="neuron-fp8-compile-") as workdir, torch.no_grad():
            options: dict[str, Any] = {"cpu_backend": True} if self.compile_only else {}
            begin = time.perf_counter()
            traced = torch_neuronx.trace(
                case.llama(tensors),
                (ids,),
                compiler_workdir=workdir,
                compiler_args=self.compiler_args,
                # weights as inputs, as NxD has them: inlined, constants could be folded before the flag counts
                inline_weights_to_neff=False,
                **options,
            )
            compile_s = time.perf_counter() - begin
            if self.compile_only:
                return Outcome(torch.empty(0), compile_s, 0.0, details)
            logits = traced(ids)[0]
            seconds = timed_runs(lambda: traced(ids))
        return Outcome(logits.float().cpu(), compile_s, seconds, details)

    def _compile(self, case: Case, tensors: Tensors) -> Outcome:
        # the native stack compiles at the first call; its options go through the environment
        flags = os.environ.get("NEURON_CC_FLAGS", "")
        if self.compiler_args not in flags:
            os.environ["NEURON_CC_FLAGS"] = f"{flags} {self.compiler_args}".strip()
        os.environ["TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION"] = "1"  # never the CPU in secret
        torch._dynamo.reset()
        model, ids = case.llama(tensors).to(TORCH_DEVICE), case.ids.to(TORCH_DEVICE)
        with torch.no_grad():
            begin = time.perf_counter()
            compiled = torch.compile(model, backend="neuron", fullgraph=True, dynamic=False)
            logits = compiled(ids)[0].cpu()
            compile_s = time.perf_counter() - begin
            seconds = timed_runs(lambda: compiled(ids).cpu())
        details = {"stack": "torch.compile", "compiler_args": os.environ["NEURON_CC_FLAGS"]}
        return Outcome(logits.float(), compile_s, seconds, details)
