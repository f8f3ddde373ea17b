"""A checkpoint: its files and their headers, what its config declares, and the source of its bytes."""

from .bin import load_bin
from .files import Checkpoint, open_checkpoint
from .info import TensorInfo, describe
from .ranges import Range
from .reader import Decision, WeightJob
from .source import Source

__all__ = [
    "Checkpoint",
    "Decision",
    "Range",
    "Source",
    "TensorInfo",
    "WeightJob",
    "describe",
    "load_bin",
    "open_checkpoint",
]
