"""The driver for checkpoints on disk: a Neuron-ready state dict in one pass over the bytes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import Checkpoint, Decision, WeightJob, open_checkpoint
from ..codes.formats import HALF
from ..codes.kernel import Counts, translate
from ..errors import CheckpointError, listing
from ..host.cache import cached, keep
from ..options import Options
from ..plan import ALL, Plan, Recipe, Verdict, recipe_for
from ..plan.slices import Slices
from .checks import add_up, check_weights, is_unscaled, laid_out_overflow, new_scales
from .cut import load_slices
from .finish import finished
from .layout import check_layout, prepare_layout
from .report import Report, make_report
from .state_dict import rescale_by

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..options import OptionKeywords

log = logging.getLogger("neuron_fp8_loader")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A loaded checkpoint.

    Attributes:
        state_dict: name -> CPU tensor, in the order of the files.
        plan: what was known of it from its headers.
        report: what was done, with counts.
        metadata: the safetensors metadata of the files read.
    """

    state_dict: dict[str, torch.Tensor]
    plan: Plan
    report: Report
    metadata: dict[str, str]


def load_state_dict(
    path: str | os.PathLike[str],
    *,
    slices: Slices | None = None,
    verdict: Verdict | None = None,
    **options: Unpack[OptionKeywords],
) -> dict[str, torch.Tensor]:
    """Load an FP8 checkpoint Neuron-ready: every e4m3fn weight fits +-240 and its scale makes up for it.

    Args:
        path: a directory, a ``.safetensors`` or ``.bin`` file, or an index file.
        slices: the part of each tensor that this process needs; only these bytes are read and kept (columns by whole
            rows, through a small buffer). A mapping, tensor name or shell pattern -> (dim, start, stop), or a function
            (name, shape) -> (dim, start, stop); None leaves a tensor whole. The scale of an FP8 weight is cut with
            its weight. Each part has the bytes that it has in ``load_state_dict(path, always=True)``.
        verdict: which weights are rescaled. A rank that reads a part cannot tell whether the whole weight fits, and
            all ranks must agree: by default every weight that has a scale is, as with ``always=True``. For the bytes
            of a load without ``always``, give all ranks the ``verdict`` of one ``tools.scan.scan_checkpoint(path)``
            of the whole checkpoint, with the same options (it can be pickled and sent).
        **options: see ``Options``.

    Returns:
        name -> CPU tensor. FP8 weights stay float8_e4m3fn, scales keep dtype and shape; all else is as on disk.

    Raises:
        Fp8LoaderError: the checkpoint is damaged, ambiguous, or cannot be made safe for a Neuron device.
        OptionError: slices that cannot be made, with the names and shapes of their tensors: out of range, empty, of no
            tensor, or through a block of scales (``layout="per_channel"`` and ``dequantize`` take those).
    """
    return load_checkpoint(path, slices=slices, verdict=verdict, **options).state_dict


def load_file(
    path: str | os.PathLike[str], device: str | int | torch.device = "cpu", **options: Unpack[OptionKeywords]
) -> dict[str, torch.Tensor]:
    """Drop-in for ``safetensors.torch.load_file``: the tensors of one shard, Neuron-ready.

    A pair may reach into a sibling shard, found through the index beside it. What is decided there (does the weight
    fit?) is decided as for the whole checkpoint, so shards that are loaded one by one go together.

    Args, Returns, Raises: as ``load_state_dict``, for one file; ``device`` is where the tensors go once rescaled.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file; load_file takes one .safetensors file")
    loaded = load_checkpoint(path, **options).state_dict
    return {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in loaded.items()}


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    slices: Slices | None = None,
    verdict: Verdict | None = None,
    **options: Unpack[OptionKeywords],
) -> LoadedCheckpoint:
    """``load_state_dict``, with the plan and a report of what was done. Same arguments and errors."""
    begin = time.perf_counter()
    chosen = Options.of(options)
    checkpoint = open_checkpoint(path)
    recipe = recipe_for(checkpoint, chosen)
    plan = recipe.plan
    for warning in plan.warnings:
        log.warning("%s: %s", plan.source, warning)
    if slices is None and verdict is None:
        state_dict, report = load_by(checkpoint, recipe, chosen)
    else:
        state_dict, report = load_slices(checkpoint, recipe, chosen, slices or {}, ALL if verdict is None else verdict)
    report.seconds = time.perf_counter() - begin
    log.info("%s: %s", plan.source, report.summary())
    return LoadedCheckpoint(state_dict, plan, report, dict(checkpoint.metadata))


def load_by(checkpoint: Checkpoint, recipe: Recipe, options: Options) -> tuple[dict[str, torch.Tensor], Report]:
    """Load the selected files of a checkpoint by a recipe for the whole of it."""
    names = [info.name for info in checkpoint.selected_tensors()]
    mapped = checkpoint.source.mapped()
    if mapped is not None:
        # all of them, even for one shard of several: right, but not fast; such files are not made to be read in parts
        state_dict, report = rescale_by(mapped, recipe, options, inplace=False)
        if checkpoint.selected != frozenset(checkpoint.files):
            state_dict = {recipe.steps[name].out: state_dict[recipe.steps[name].out] for name in names}
        return state_dict, report
    return _Load(checkpoint, recipe, recipe.within(names), options).run()


class _Load:
    """One load: ``whole`` is the recipe of the checkpoint, ``recipe`` the part of it that is read."""

    def __init__(self, checkpoint: Checkpoint, whole: Recipe, recipe: Recipe, options: Options) -> None:
        self.checkpoint, self.whole, self.recipe, self.options = checkpoint, whole, recipe, options
        self.threads, self.source = options.thread_count(), checkpoint.source

    def run(self) -> tuple[dict[str, torch.Tensor], Report]:
        recipe = self.recipe
        self._check_together()
        self._check_unscaled_first()
        decisions = self._decisions()
        jobs = {s.name: self._job(s.group, s.action, s.table, decisions) for s in recipe.weights}
        infos = [recipe.plan.tensors[name] for name in recipe.steps]
        tensors, counts = self.source.read(infos, jobs, self.threads, self.options.progress)
        check_weights(recipe, counts)
        verdict = self._verdict(decisions, counts)
        scales = new_scales(recipe, tensors, verdict)
        check_layout(recipe, tensors)
        prepared = prepare_layout(recipe, tensors, scales, self.threads, inplace=True)
        made = scales | prepared.carry_out(self.threads)
        report = make_report(recipe, self.options, tensors, counts, verdict, scales, prepared.fidelity)
        return finished(recipe, tensors, made), report

    def _check_together(self) -> None:
        torn = self.whole.torn(self.recipe.steps)
        if torn:
            raise CheckpointError(
                f"{self.recipe.plan.source}: layout and dequantize need a weight and its scale together; load the "
                f"directory instead of one shard, {listing('pair', torn)} in different shards"
            )

    def _check_unscaled_first(self) -> None:
        """Weights without a scale pass if they fit, which only their bytes tell: read them before all the rest."""
        if self.recipe.what.unscaled != "error":
            return
        infos = [self.recipe.plan.tensors[step.name] for step in self.recipe.weights if is_unscaled(step)]
        seen: list[tuple[str, Counts]] = []
        self.source.visit(infos, lambda name, piece: seen.append((name, translate(piece, None, HALF))), self.threads)
        check_weights(self.recipe, add_up([info.name for info in infos], seen))

    def _decisions(self) -> dict[str, Decision]:
        """For each group that this load touches: is it settled already that its weights are translated?"""
        plan, here = self.recipe.plan, self.recipe.steps
        decisions = {step.group: Decision(self.recipe.what.always) for step in here.values() if step.group}
        for scale, decision in decisions.items():
            # a scale without its weight, or weights read apart: the whole group decides, wherever it lies
            apart = [plan.tensors[pair.weight] for pair in plan.by_scale[scale] if pair.weight not in here]
            if apart and not decision.convert:
                decision.convert = self.source.find_overflow(apart, self.recipe.table)
        return decisions

    @staticmethod
    def _job(group: str, action: str, table: Any, decisions: Mapping[str, Decision]) -> WeightJob:
        if action != "translate":
            return WeightJob(table)
        return WeightJob(table, decisions[group] if group else Decision(convert=True))

    def _verdict(self, decisions: Mapping[str, Decision], counts: Mapping[str, Counts]) -> Verdict:
        groups = frozenset(scale for scale, decision in decisions.items() if decision.convert)
        overflow = bool(groups) or laid_out_overflow(self.recipe, counts)
        if overflow and not self.recipe.what.always:
            keep(_fact(self.checkpoint), True, _FACT_BYTES)
        elif not overflow and any(step.role == "activation scale" for step in self.recipe.steps.values()):
            overflow = self._others_overflow()
        return Verdict(groups, overflow)

    def _others_overflow(self) -> bool:
        """Does any weight of the checkpoint that is not read here overflow? A fact of the files: found once."""
        here = self.recipe.steps
        others = [self.whole.plan.tensors[s.name] for s in self.whole.scaled_weights if s.name not in here]
        if not others:
            return False

        def look() -> bool:
            return bool(self.source.find_overflow(others, self.whole.table))

        return cached(_fact(self.checkpoint), look, _FACT_BYTES)


_FACT_BYTES = 1 << 10


def _fact(checkpoint: Checkpoint) -> tuple[object, ...]:
    return "overflows", checkpoint.fingerprint
