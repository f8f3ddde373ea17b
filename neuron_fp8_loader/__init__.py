"""GPU FP8 (e4m3fn) checkpoints on AWS Trainium and Inferentia: in memory, at reading speed."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import conventions
    from .codes import kernel
    from .codes.formats import neuron_view
    from .errors import (
        CheckpointError,
        Fp8LoaderError,
        HostMemoryError,
        OptionError,
        PlanError,
        ScaleError,
        WeightError,
    )
    from .integrations.model_builder import wrap_checkpoint_loader
    from .integrations.nxdi import disable, enable
    from .integrations.torch_module import rescale_on_load
    from .load.files import LoadedCheckpoint, load_checkpoint, load_file, load_state_dict
    from .load.report import Report
    from .load.slices import safe_open
    from .load.state_dict import rescale_state_dict
    from .options import Options
    from .plan import Plan, plan_checkpoint

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Fp8LoaderError",
    "HostMemoryError",
    "LoadedCheckpoint",
    "OptionError",
    "Options",
    "Plan",
    "PlanError",
    "Report",
    "ScaleError",
    "WeightError",
    "conventions",
    "disable",
    "enable",
    "kernel",
    "load_checkpoint",
    "load_file",
    "load_state_dict",
    "neuron_view",
    "plan_checkpoint",
    "rescale_on_load",
    "rescale_state_dict",
    "safe_open",
    "wrap_checkpoint_loader",
]

# Where each name is: imported when it is asked for, so that `neuron-fp8 --help` need not wait for torch
_NAMES = {
    "codes.formats": ("neuron_view",),
    "errors": (
        "CheckpointError",
        "Fp8LoaderError",
        "HostMemoryError",
        "OptionError",
        "PlanError",
        "ScaleError",
        "WeightError",
    ),
    "integrations.model_builder": ("wrap_checkpoint_loader",),
    "integrations.nxdi": ("disable", "enable"),
    "integrations.torch_module": ("rescale_on_load",),
    "load.files": ("LoadedCheckpoint", "load_checkpoint", "load_file", "load_state_dict"),
    "load.report": ("Report",),
    "load.slices": ("safe_open",),
    "load.state_dict": ("rescale_state_dict",),
    "options": ("Options",),
    "plan": ("Plan", "plan_checkpoint"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
_PARTS = ("checkpoint", "codes", "conventions", "errors", "host", "integrations", "load", "options", "plan")
_MODULES = {"kernel": "codes.kernel"} | {part: part for part in _PARTS}

if not TYPE_CHECKING:  # a checker knows the names from above, and tells of others

    def __getattr__(name: str) -> Any:
        part, home = _MODULES.get(name), _HOMES.get(name)
        if part is not None:
            value = import_module(f".{part}", __name__)
        elif home is not None:
            value = getattr(import_module(f".{home}", __name__), name)
        elif name in globals():  # another thread has just brought it
            return globals()[name]
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        _HOMES.pop(name, None)  # once here it is like any other attribute: it can be replaced and deleted
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
