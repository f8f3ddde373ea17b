"""What a backend is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .model import Case, Tensors


class Missing(Exception):
    """What a backend needs is not here: text for the user, with what to do."""


@dataclass(frozen=True)
class Outcome:
    """One compiled and executed model.

    Attributes:
        logits: float32 [tokens, vocabulary].
        compile_s: seconds from model to executable, a first execution included where the compiler is lazy.
        run_s: median seconds of one execution.
        details: what else is worth printing.
    """

    logits: torch.Tensor
    compile_s: float
    run_s: float
    details: dict[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """A way to compile and run the model.

    Attributes:
        name: in tables and JSON.
        tolerance: largest error of a logit that passes, relative to the largest logit, where rounding is expected.
        exact: computes the same operations with the same rounding whichever FP8 type the weights have, so that a
            case without rounded codes must come out equal.
    """

    name: str
    tolerance: float
    exact: bool

    def require(self) -> None:
        """Raise Missing where it cannot run."""

    def versions(self) -> dict[str, str]:
        """Versions of the compiler and the runtime."""

    def reference(self, case: Case) -> torch.Tensor:
        """Logits of the checkpoint read as e4m3fn, float32 [tokens, vocabulary]."""

    def run(self, case: Case, tensors: Tensors) -> Outcome:
        """Compile the model with these tensors and run it."""


def timed_runs(work: Callable[[], Any], repeats: int = 10) -> float:
    """Median seconds of an execution, after one to warm up."""
    work()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
