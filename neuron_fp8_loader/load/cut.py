"""A state dict of slices: of each tensor, the part that one rank needs."""

from __future__ import annotations

from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, listing
from ..options import Options
from ..plan import Recipe, Verdict
from ..plan.region import extent
from ..plan.slices import Slices, regions
from .regions import Regions, Wanted
from .report import Report, make_report


def load_slices(
    checkpoint: Checkpoint, recipe: Recipe, options: Options, slices: Slices, verdict: Verdict
) -> tuple[dict[str, torch.Tensor], Report]:
    """Load slices of the selected files of a checkpoint.

    Args:
        checkpoint, recipe, options: as ``files.load_by`` takes them.
        slices: which part of which tensor.
        verdict: which weights are translated.

    Returns:
        the state dict, and a report of the parts: ``nbytes`` is what was read.

    Raises:
        OptionError: cuts that cannot be made.
        CheckpointError, WeightError, ScaleError: as ``load_state_dict``, for what is looked at.
    """
    driver = Regions(checkpoint, recipe, verdict, options)
    parts = regions(recipe, slices)
    names = [info.name for info in checkpoint.selected_tensors()]
    torn = recipe.torn(frozenset(names))
    if torn:
        raise CheckpointError(
            f"{recipe.plan.source}: layout and dequantize need a weight and its scale together; load the directory "
            f"instead of one shard, {listing('pair', torn)} in different shards"
        )
    wanted = {name: Wanted(parts[name]) for name in names if name in parts}
    loaded = driver.load(wanted)
    seen, steps = loaded.seen, recipe.steps
    report = make_report(recipe, options, loaded.tensors, seen.counts, verdict, loaded.scales, seen.fidelity)
    report.nbytes = loaded.nbytes
    report.weights = [w._replace(numel=torch.Size(extent(parts[w.name])).numel()) for w in report.weights]
    out: dict[str, Any] = {steps[name].out: tensor for name, tensor in loaded.tensors.items()}
    mapped = checkpoint.source.mapped() or {}  # there, what is no tensor comes as it is
    out |= {name: value for name, value in mapped.items() if name not in recipe.plan.tensors}
    return out, report
