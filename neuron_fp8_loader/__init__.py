"""GPU FP8 (e4m3fn) checkpoints on AWS Trainium and Inferentia: in memory, at reading speed."""

from . import conventions
from .codes import kernel
from .codes.formats import neuron_view
from .errors import CheckpointError, Fp8LoaderError, OptionError, PlanError, ScaleError, WeightError
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
