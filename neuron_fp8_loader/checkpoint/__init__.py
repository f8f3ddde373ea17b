"""A checkpoint: its files and their headers, what its config declares, and the source of its bytes."""

from .bin import load_bin
from .files import Checkpoint, open_checkpoint
from .given import existing, existing_file
from .headers import safetensors_name
from .info import TensorInfo, describe
from .pieces import Decision, WeightJob
from .ranges import Range
from .regular import check_unchanged
from .remote import URL, RemotePath, exists
from .source import Fill, Source

__all__ = [
    "URL",
    "Checkpoint",
    "Decision",
    "Fill",
    "Range",
    "RemotePath",
    "Source",
    "TensorInfo",
    "WeightJob",
    "check_unchanged",
    "describe",
    "existing",
    "existing_file",
    "exists",
    "load_bin",
    "open_checkpoint",
    "safetensors_name",
]
