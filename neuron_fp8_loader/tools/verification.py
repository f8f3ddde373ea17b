"""What a verification found, and what it reads by other means than the loader."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors
import torch

from ..checkpoint import Checkpoint
from ..host.parallel import progress
from ..options import Options
from .arithmetic import Bytes, as_bytes
from .compare import WeightCheck, sqnr_db

_CHUNK = 1 << 20


@dataclass
class Verification:
    """What a verification found.

    Attributes:
        source: the checkpoint; ``against``: the original it was compared with, "" if it was rescaled in memory.
        weights: one check an FP8 weight.
        identical: how many other tensors came through byte for byte.
        problems: what is wrong, one text each; empty: all is well.
        notes: what is worth knowing and not wrong.
        activation_factors: new / old of static activation and KV scales: (least, largest), None without any.
        seconds: how long it took.
        stack: which one the load was for, "" for none.
    """

    source: str
    against: str = ""
    weights: list[WeightCheck] = field(default_factory=list)
    identical: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    activation_factors: tuple[float, float] | None = None
    seconds: float = 0.0
    stack: str = ""

    @property
    def ok(self) -> bool:
        """Nothing is wrong. Look at ``weights`` too: of a checkpoint without FP8 weights that says little."""
        return not self.problems and not any(weight.problem for weight in self.weights)

    @property
    def numel(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @property
    def changed(self) -> int:
        """Values that differ at all."""
        return sum(weight.changed for weight in self.weights)

    @property
    def sqnr_db(self) -> float:
        """Over all FP8 weights together."""
        return sqnr_db(sum(w.signal for w in self.weights), sum(w.noise for w in self.weights))

    @property
    def worst(self) -> WeightCheck | None:
        """The weight with the least SQNR."""
        return min(self.weights, key=lambda weight: weight.sqnr_db, default=None)

    @property
    def factors(self) -> dict[float | None, int]:
        """Scale factor -> how many weights have it. None: the scales' layout changed."""
        found: dict[float | None, int] = {}
        for weight in self.weights:
            factor = None if weight.factor is None else tidy(weight.factor)
            found[factor] = found.get(factor, 0) + 1
        return found


class Original:
    """Tensors as they are on disk, read by safetensors or torch themselves; from a store by our own source."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._stack = checkpoint, ExitStack()
        self._mapped = checkpoint.source.mapped()
        self._open: dict[Any, Any] = {}

    def __enter__(self) -> Original:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, name: str) -> torch.Tensor:
        mapped = self._mapped
        if mapped is not None:
            found: torch.Tensor = mapped[name].detach()
            return found
        info = self._checkpoint.tensors[name]
        file = info.file
        if self._checkpoint.is_remote:
            return self._checkpoint.source.read([info], {}, 1)[0][name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safetensors.safe_open(str(file), "pt", "cpu"))
        found = self._open[file].get_tensor(name)
        return found


def progress_of(checkpoint: Checkpoint, options: Options) -> Any:
    return progress("verifying", sum(info.nbytes for info in checkpoint.tensors.values()), options.progress)


def overflows(codes: Bytes) -> bool:
    """Is any code 256..448?"""
    for at in range(0, codes.size, _CHUNK):
        magnitudes = codes[at : at + _CHUNK] & 0x7F
        if bool(((magnitudes > 0x77) & (magnitudes < 0x7F)).any()):
            return True
    return False


def check_identical(result: Verification, name: str, old: torch.Tensor, new: torch.Tensor) -> None:
    if old.dtype == new.dtype and old.shape == new.shape and np.array_equal(as_bytes(old), as_bytes(new)):
        result.identical += 1
    else:
        result.problems.append(f"{name}: {new.dtype} {list(new.shape)} differs from the original's {old.dtype}")


def tidy(factor: float) -> float:
    """A factor found, freed of the rounding of its scale: 448/240 as bf16 or fp32 has it is 448/240."""
    for known in (1.0, 2.0, 0.5, 448 / 240, 240 / 448):
        if abs(factor / known - 1) <= 2.0**-8:
            return known
    return factor
