"""A checkpoint: its files and their headers, what its config declares, and the source of its bytes."""

from .bin import load_bin
from .files import Checkpoint, open_checkpoint
from .given import existing, existing_file
from .info import TensorInfo, describe
from .pieces import Decision, WeightJob
from .ranges import Range
from .regular import check_unchanged
from .source import Fill, Source

__all__ = [
    "Checkpoint",
    "Decision",
    "Fill",
    "Range",
    "Source",
    "TensorInfo",
    "WeightJob",
    "check_unchanged",
    "describe",
    "existing",
    "existing_file",
    "load_bin",
    "open_checkpoint",
]
