"""The driver for a few tensors at a time, by a verdict that is known: bounded memory for checkpoints of any size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from ..checkpoint import Checkpoint, Decision, TensorInfo, WeightJob
from ..codes.requantize import Fidelity
from ..errors import OptionError
from ..host.memory import needing
from ..options import Options
from ..plan import Recipe, Step, Verdict
from .checks import check_weights, new_scales
from .finish import as_codes
from .layout import check_layout, prepare_layout

BATCH = 256 << 20
"""Bytes that ``batches`` puts together."""


class Parts:
    """Loads any tensors of a checkpoint as ``load_state_dict`` would give them.

    Args:
        checkpoint: the whole that they are part of.
        recipe: what becomes of each of its tensors.
        verdict: which weights are translated (``Scan.verdict``). Since that is settled, pairs may be torn apart: a
            weight in one part, its scale in another. A pair that is requantized or dequantized is read together for
            either of them; its row scales are kept, so that its weight is requantized once.
        options: ``threads``; the rest is in the recipe.

    Raises:
        OptionError: ``experts="fused"``, which needs all experts of a block at once.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, verdict: Verdict, options: Options) -> None:
        refuse_fused(options, "loading a checkpoint in parts")
        self._checkpoint, self._recipe, self._verdict = checkpoint, recipe, verdict
        self._threads = options.thread_count()
        self._row_scales: dict[str, torch.Tensor] = {}
        self.fidelity: dict[str, Fidelity] = {}
        """What requantizing cost, by weight, of what has been loaded so far."""

    def step(self, name: str) -> Step:
        """What becomes of a tensor."""
        return self._recipe.steps[name]

    def load(self, infos: Sequence[TensorInfo]) -> dict[str, torch.Tensor]:
        """name on disk -> CPU tensor, in the order of ``infos``; without scales that are dropped.

        Raises:
            CheckpointError, WeightError, ScaleError: as ``load_state_dict``.
        """
        wanted = [self._recipe.steps[info.name] for info in infos]
        part = self._recipe.within(self._needed(wanted))
        headers = [part.plan.tensors[name] for name in part.steps]
        jobs = {step.name: self._job(step) for step in part.weights}
        with needing(sum(info.nbytes for info in headers), part.plan.source):
            return self._read(part, headers, jobs, wanted)

    def _read(
        self, part: Recipe, headers: Sequence[TensorInfo], jobs: dict[str, WeightJob], wanted: list[Step]
    ) -> dict[str, torch.Tensor]:
        tensors, counts = self._checkpoint.source.read(headers, jobs, self._threads)
        check_weights(part, counts)
        scales = new_scales(part, tensors, self._verdict)
        check_layout(part, tensors)
        prepared = prepare_layout(part, tensors, scales, self._threads)
        tensors = tensors | scales | prepared.carry_out(self._threads)
        self.fidelity |= prepared.fidelity
        self._row_scales |= {s.name: tensors[s.name] for s in part.doing("requantize", role="scale")}
        tensors |= self._row_scales
        return {s.name: as_codes(s, tensors[s.name]) for s in wanted if s.action != "drop"}

    def _needed(self, wanted: Iterable[Step]) -> dict[str, None]:
        """The names of ``wanted``, and of the other half of each pair that is laid out together."""
        names: dict[str, None] = {}
        for step in wanted:
            if step.name in self._row_scales or step.action == "drop":
                continue
            names[step.name] = None
            if step.pair is not None and step.action in ("requantize", "dequantize"):
                names |= {step.pair.weight: None, step.pair.scale: None}
        return names

    def _job(self, step: Step) -> WeightJob:
        assert step.table is not None  # every weight has one
        translated = step.action == "translate" and self._verdict.applies(step)
        return WeightJob(step.table, Decision(True) if translated else None)


def refuse_fused(options: Options, what: str) -> None:
    """Raise OptionError for ``experts="fused"`` where experts do not come together, and for ``qkv="split"``."""
    if options.qkv != "keep":
        raise OptionError(
            f'qkv="{options.qkv}": {what} goes tensor by tensor and does not split any; load_state_dict does'
        )
    if options.experts != "keep":
        raise OptionError(
            f'experts="{options.experts}": {what} does not stack experts; load_state_dict and rescale_state_dict do. '
            "For a copy on disk: safetensors.torch.save_file(load_state_dict(...), file)"
        )


def batches(infos: Iterable[TensorInfo], limit: int = BATCH) -> Iterator[list[TensorInfo]]:
    """Neighbouring tensors of up to ``limit`` bytes together; a larger one by itself."""
    batch: list[TensorInfo] = []
    nbytes = 0
    for info in infos:
        if batch and nbytes + info.nbytes > limit:
            yield batch
            batch, nbytes = [], 0
        batch.append(info)
        nbytes += info.nbytes
    if batch:
        yield batch
