"""A checkpoint: its files and their headers, what its config declares, and the way its bytes are read."""

from .files import Checkpoint, TensorInfo, describe, load_bin, open_checkpoint
from .reader import Decision, WeightJob

__all__ = ["Checkpoint", "Decision", "TensorInfo", "WeightJob", "describe", "load_bin", "open_checkpoint"]
