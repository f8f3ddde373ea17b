"""Torch on the CPU, FP8 bytes read as trn1, inf2 and trn2 read them. Always there."""

from __future__ import annotations

import torch

from neuron_fp8_loader import neuron_view

from .backend import Outcome, timed_runs
from .model import Case, Tensors


class Emulate:
    """``neuron_view`` in place of the cast of every FP8 weight."""

    name = "emulate"
    tolerance = 1e-3
    exact = True

    def require(self) -> None:
        return None

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def reference(self, case: Case) -> torch.Tensor:
        return case.reference()

    def run(self, case: Case, tensors: Tensors) -> Outcome:
        model = case.llama(tensors, neuron_view)
        with torch.no_grad():
            logits = model(case.ids)[0]
            seconds = timed_runs(lambda: model(case.ids), 3)
        return Outcome(logits, 0.0, seconds)
