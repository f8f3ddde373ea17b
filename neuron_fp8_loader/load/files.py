"""Checkpoint in, Neuron-ready state dict out."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.files import Checkpoint, TensorInfo, load_bin, open_checkpoint
from ..checkpoint.reader import Decision, WeightJob, find_overflow, read, visit
from ..codes.formats import E4M3FN, FNUZ, HALF
from ..codes.kernel import Counts, translate
from ..errors import CheckpointError, listing
from ..options import Options
from ..plan.layout import Layout, check_layout, plan_layout, within
from ..plan.pairs import Plan, plan_for
from .report import Report
from .rules import (
    add_up,
    check_weights,
    dequantized,
    finish_layout,
    laid_out_overflow,
    make_report,
    new_scales,
)
from .state_dict import rescale_planned

log = logging.getLogger("neuron_fp8_loader")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A loaded checkpoint.

    Attributes:
        state_dict: name -> CPU tensor, in the order of the files.
        plan: what was to be done.
        report: what was done, with counts.
        metadata: the safetensors metadata of the files read.
    """

    state_dict: dict[str, torch.Tensor]
    plan: Plan
    report: Report
    metadata: dict[str, str]


def load_state_dict(path: str | os.PathLike[str], **options: Any) -> dict[str, torch.Tensor]:
    """Load an FP8 checkpoint Neuron-ready: every e4m3fn weight fits +-240 and its scale makes up for it.

    Args:
        path: a directory, a ``.safetensors`` or ``.bin`` file, or an index file.
        **options: see ``Options``.

    Returns:
        name -> CPU tensor. FP8 weights stay float8_e4m3fn, scales keep dtype and shape; all else is as on disk.

    Raises:
        Fp8LoaderError: the checkpoint is damaged, ambiguous, or cannot be made safe for a Neuron device.
    """
    return load_checkpoint(path, **options).state_dict


def load_file(
    path: str | os.PathLike[str], device: str | int | torch.device = "cpu", **options: Any
) -> dict[str, torch.Tensor]:
    """Drop-in for ``safetensors.torch.load_file``: the tensors of one shard, Neuron-ready.

    A pair may reach into a sibling shard, found through the index beside it; what is decided there (does the weight
    fit?) is decided as for the whole checkpoint, so shards loaded one by one go together.

    Args, Returns, Raises: as ``load_state_dict``, for one file; ``device`` is where the tensors go once rescaled.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file; load_file takes one .safetensors file")
    loaded = load_checkpoint(path, **options).state_dict
    return {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in loaded.items()}


def load_checkpoint(path: str | os.PathLike[str], **options: Any) -> LoadedCheckpoint:
    """``load_state_dict``, with the plan and a report of what was done. Same arguments and errors."""
    begin = time.perf_counter()
    chosen = Options.of(options)
    checkpoint = open_checkpoint(path)
    plan = plan_for(checkpoint)
    for warning in plan.warnings:
        log.warning("%s: %s", plan.source, warning)
    load = _load_bin if checkpoint.is_bin else _load_safetensors
    state_dict, report = load(checkpoint, plan, chosen)
    report.seconds = time.perf_counter() - begin
    log.info("%s: %s", plan.source, report.summary())
    return LoadedCheckpoint(state_dict, plan, report, dict(checkpoint.metadata))


def _load_safetensors(checkpoint: Checkpoint, plan: Plan, options: Options) -> tuple[dict[str, torch.Tensor], Report]:
    infos = checkpoint.selected_tensors()
    names = {info.name for info in infos}
    threads, table = options.thread_count(), options.table
    layout = plan_layout(plan, options)
    _check_together(layout, plan, names)
    _check_unscaled_first(plan, names, options)
    layout = within(layout, names)

    jobs = {name: WeightJob(HALF) for name in plan.unscaled}
    jobs |= {name: WeightJob(FNUZ, Decision(convert=True)) for name in plan.fnuz}
    decisions: dict[str, Decision] = {}  # by scale
    for group in plan.groups:
        if group[0].weight in layout.raw:
            jobs |= {pair.weight: WeightJob(HALF) for pair in group}
            continue
        decision = Decision(convert=options.always)
        decisions[group[0].scale] = decision
        jobs |= {pair.weight: WeightJob(table, decision) for pair in group}
        # a scale without its weight, or weights read apart: the whole group decides, wherever it lies
        apart = [plan.tensors[p.weight] for p in group if p.weight not in names]
        touched = not names.isdisjoint([group[0].scale, *(p.weight for p in group)])
        if apart and touched and not decision.convert:
            decision.convert = find_overflow(apart, table)

    here = {name: job for name, job in jobs.items() if name in names}
    tensors, counts = read(infos, here, threads, options.progress)
    check_weights(plan, counts, options)
    convert = {scale for scale, decision in decisions.items() if decision.convert}
    any_converted = (
        bool(convert) or laid_out_overflow(layout, counts, options) or _others_convert(plan, names, options)
    )
    scales = new_scales(plan, tensors, convert, any_converted, options)
    check_layout(layout, plan, tensors)
    weights = {name for name in here if plan.scale_of.get(name) in convert}
    report = make_report(plan, options, tensors, counts, weights, scales)
    tensors |= scales | {name: tensors[name].view(E4M3FN) for name in plan.fnuz if name in names}
    tensors |= dequantized(plan, tensors, options)
    return finish_layout(layout, tensors, report, inplace=True), report


def _check_together(layout: Layout, plan: Plan, names: Collection[str]) -> None:
    touched = [p for p in plan.pairs if p.weight in layout.raw or p.scale in layout.reshaped]
    apart = [f"{p.weight} / {p.scale}" for p in touched if (p.weight in names) != (p.scale in names)]
    if apart:
        raise CheckpointError(
            f"{plan.source}: layout and dequantize need a weight and its scale together; load the directory instead "
            f"of one shard, {listing('pair', apart)} in different shards"
        )


def _check_unscaled_first(plan: Plan, names: Collection[str], options: Options) -> None:
    """Weights without a scale pass if they fit, which only their bytes tell: read them before all the rest."""
    if options.unscaled != "error":
        return
    infos = [plan.tensors[name] for name in plan.unscaled if name in names]
    seen: list[tuple[str, Counts]] = []
    visit(infos, lambda name, piece: seen.append((name, translate(piece, None, HALF))), options.thread_count())
    check_weights(plan, add_up([info.name for info in infos], seen), options)


def _others_convert(plan: Plan, names: Collection[str], options: Options) -> bool:
    """For activation scales of one shard: is any weight of the *checkpoint* rescaled?"""
    if not any(scale.name in names for scale in plan.activation_scales):
        return False
    others: list[TensorInfo] = [plan.tensors[p.weight] for p in plan.pairs if p.weight not in names]
    return find_overflow(others, options.table)


def _load_bin(checkpoint: Checkpoint, plan: Plan, options: Options) -> tuple[dict[str, torch.Tensor], Report]:
    # all of them, even for one shard of several: right, but not fast; .bin shards are not made to be read in parts
    loaded = {name: value for file in checkpoint.files for name, value in load_bin(file).items()}
    state_dict, report = rescale_planned(loaded, plan, options, inplace=False)
    if checkpoint.selected != frozenset(checkpoint.files):
        names = {info.name for info in checkpoint.selected_tensors()}
        state_dict = {name: value for name, value in state_dict.items() if name in names}
    return state_dict, report
