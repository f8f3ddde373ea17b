"""A checkpoint: its files and their headers, what its config declares, and the way its bytes are read."""

from .files import Checkpoint, TensorInfo, describe, load_bin, open_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "describe", "load_bin", "open_checkpoint"]
