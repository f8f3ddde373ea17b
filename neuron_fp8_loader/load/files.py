"""The driver for checkpoints on disk: a Neuron-ready state dict in one pass over the bytes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import Checkpoint, Decision, TensorInfo, WeightJob, existing, existing_file, open_checkpoint
from ..codes.formats import HALF
from ..codes.kernel import Counts, translate
from ..errors import CheckpointError, Shown, listing, printable
from ..host.cache import cached, keep
from ..host.collector import uncollected, uncollected_if_short
from ..host.memory import check_mode, needing
from ..options import Options
from ..plan import ALL, Plan, Recipe, Verdict, recipe_for
from ..plan.slices import Slices
from .arguments import check_backend, checked_device
from .checks import add_up, check_weights, is_unscaled, laid_out_overflow, new_scales
from .cut import load_slices
from .finish import finished
from .fused import FusedTensors
from .known import remember
from .layout import check_layout, prepare_layout
from .report import Report, make_report
from .state_dict import rescale_by
from .stripes import from_source

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
        path: a directory, a ``.safetensors`` or ``.bin`` file, or an index file; also in a store (``s3://bucket/prefix``),
            or ``org/name`` in the cache of the Hugging Face Hub.
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
        name -> CPU tensor. FP8 weights stay float8_e4m3fn, scales keep dtype and shape; all else is as on disk. With
        ``layout``, ``experts`` and ``dequantize``, what they say.

    Raises:
        Fp8LoaderError: the checkpoint is damaged, ambiguous, or cannot be made safe for a Neuron device.
        OptionError: slices that cannot be made, with the names and shapes of their tensors: out of range, empty, of no
            tensor, or through a block of scales (``layout="per_channel"`` and ``dequantize`` take those).
    """
    return load_checkpoint(path, slices=slices, verdict=verdict, **options).state_dict


def load_file(
    filename: str | os.PathLike[str],
    device: str | int | torch.device = "cpu",
    *,
    backend: str = "mmap",
    **options: Unpack[OptionKeywords],
) -> dict[str, torch.Tensor]:
    """Drop-in for ``safetensors.torch.load_file``: the tensors of one shard, Neuron-ready.

    A pair may reach into a sibling shard, found through the index beside it. What is decided there (does the weight
    fit?) is decided as for the whole checkpoint, so shards that are loaded one by one go together.

    Args:
        filename: one ``.safetensors`` file.
        device: where the tensors go once rescaled.
        backend: taken because safetensors 0.8 takes it, and without effect: bytes are always read by ``preadv``,
            straight into tensors with memory of their own.
        **options: see ``Options``.

    Returns, Raises: as ``load_state_dict``, for one file.
    """
    target = checked_device(device)
    check_backend(backend)
    file = existing_file(filename, "load_file", download=options.get("download", False))
    loaded = load_checkpoint(file, **options).state_dict
    return {name: t.to(target) if isinstance(t, torch.Tensor) else t for name, t in loaded.items()}


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
    place = existing(path, download=chosen.download)
    with ExitStack() as stack:
        with uncollected():
            with needing(bytes_on_disk(place), Shown(place)):  # headers are read through a map of the whole file
                checkpoint = open_checkpoint(place)
            recipe = recipe_for(checkpoint, chosen)
            stack.enter_context(uncollected_if_short(sum(info.nbytes for info in checkpoint.selected_tensors())))
        plan = recipe.plan
        for warning in plan.warnings:
            log.warning("%s: %s", printable(plan.source), warning)
        if slices is None and verdict is None:
            state_dict, report = load_by(checkpoint, recipe, chosen)
        else:
            cuts, known = {} if slices is None else slices, ALL if verdict is None else verdict
            state_dict, report = load_slices(checkpoint, recipe, chosen, cuts, known)
    report.seconds = time.perf_counter() - begin
    if log.isEnabledFor(logging.INFO):
        log.info("%s: %s", printable(plan.source), report.summary())
    return LoadedCheckpoint(state_dict, plan, report, dict(checkpoint.metadata))


def bytes_on_disk(path: Path) -> int:
    """How long the weight files at a path are together; 0 where there are none."""
    files = [*path.glob("*.safetensors"), *path.glob("*.bin")] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def load_by(checkpoint: Checkpoint, recipe: Recipe, options: Options) -> tuple[dict[str, torch.Tensor], Report]:
    """Load the selected files of a checkpoint by a recipe for the whole of it."""
    check_mode()
    names = [info.name for info in checkpoint.selected_tensors()]
    mapped = checkpoint.source.mapped()
    if mapped is not None:
        if not checkpoint.is_part:
            return rescale_by(mapped, recipe, options, inplace=False)
        _refuse_torn(recipe, recipe.torn_places(names))
        # with what decides with them, in whichever file it is; the rest is mapped, but not looked at
        needed = _deciding(recipe, names)
        part = {name: mapped[name] for name in recipe.steps if name in needed}
        state_dict, report = rescale_by(part, recipe.within(part), options, inplace=False)
        steps = (recipe.steps[name] for name in names)
        return {out: state_dict[out] for step in steps if step.action != "drop" for out in step.outs}, report
    return _Load(checkpoint, recipe, recipe.within(names), options).run()


def _deciding(recipe: Recipe, names: Sequence[str]) -> set[str]:
    """These tensors, those that are decided or laid out together with them, and all that activation scales hang on."""
    needed = set(names)
    for name in names:
        step = recipe.steps[name]
        scale = step.pair.scale if step.pair is not None else name
        for pair in recipe.plan.by_scale.get(scale, ()):
            needed |= {pair.weight, pair.scale}
    if any(recipe.steps[name].role == "activation scale" for name in names):
        needed |= {step.name for step in recipe.scaled_weights}
        needed |= set(recipe.plan.by_scale)
    return needed


def _refuse_torn(recipe: Recipe, torn: list[str]) -> None:
    if torn:
        raise CheckpointError(
            f"{recipe.plan.source}: layout and dequantize need a weight and its scale together, "
            'experts="fused" all experts of a block; load the directory instead of one shard, '
            f"{listing('pair or fused tensor', torn)} in different shards"
        )


class _Load:
    """One load: ``whole`` is the recipe of the checkpoint, ``recipe`` the part of it that is read."""

    def __init__(self, checkpoint: Checkpoint, whole: Recipe, recipe: Recipe, options: Options) -> None:
        self.checkpoint, self.whole, self.recipe, self.options = checkpoint, whole, recipe, options
        self.threads, self.source = options.thread_count(), checkpoint.source
        self.is_part = len(recipe.steps) < len(whole.steps)

    def run(self) -> tuple[dict[str, torch.Tensor], Report]:
        recipe = self.recipe
        if self.is_part:
            _refuse_torn(self.recipe, self.whole.torn(self.recipe.steps))
        self._check_unscaled_first()
        decisions = self._decisions()
        headers = recipe.plan.tensors
        with uncollected():
            jobs = {s.name: self._job(s.group, s.action, s.table, decisions) for s in recipe.as_they_are().weights}
            # scales of experts too: requantizing needs them first
            infos = [headers[s.name] for s in recipe.steps.values() if s.place is None or s.role == "scale"]
        with needing(sum(headers[name].nbytes for name in recipe.steps), recipe.plan.source):
            return self._read(decisions, infos, jobs)

    def _read(
        self, decisions: dict[str, Decision], infos: list[TensorInfo], jobs: dict[str, WeightJob]
    ) -> tuple[dict[str, torch.Tensor], Report]:
        recipe, rest = self.recipe, self.recipe.as_they_are()
        tensors, counts = self.source.read(infos, jobs, self.threads, self.options.progress)
        fused = self._place(tensors, decisions)
        counts = {s.name: counts.get(s.name) or fused.counts[s.name] for s in recipe.weights}
        check_weights(recipe, counts)
        verdict = self._verdict(decisions, counts)
        with uncollected():
            scales = new_scales(recipe, tensors, verdict)
            check_layout(recipe, tensors)
        fused.scales(tensors, scales)
        prepared = prepare_layout(rest, tensors, scales, self.threads, inplace=True)
        made = scales | prepared.carry_out(self.threads)
        fidelity = prepared.fidelity | fused.fidelity
        with uncollected():
            report = make_report(recipe, self.options, recipe.steps, counts, verdict, scales, fidelity)
            ordered = {name: tensors.get(name) for name in recipe.steps}
            state_dict = finished(recipe, ordered, made, fused.tensors)
            remember(recipe, state_dict, counts, verdict)
        return state_dict, report

    def _place(self, tensors: Mapping[str, torch.Tensor], decisions: Mapping[str, Decision]) -> FusedTensors:
        """Read what goes into fused tensors."""
        fused = FusedTensors(self.recipe)
        if self.recipe.placed:
            check_layout(self.recipe, tensors)
            with self.source.opened(self.recipe.plan.tensors[step.name] for step in self.recipe.placed) as fill:
                fused.weights(from_source(fill), tensors, decisions, self.threads, self.options.progress)
        return fused

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
        with uncollected():
            decisions = {step.group: Decision(self.recipe.what.always) for step in here.values() if step.group}
            # a scale without its weight, or weights read apart: the whole group decides, wherever it lies
            apart = {
                scale: [plan.tensors[pair.weight] for pair in plan.by_scale[scale]]
                for scale in (decisions if self.is_part else ())
                if any(pair.weight not in here for pair in plan.by_scale[scale])
            }
        for scale, group in apart.items():
            if not decisions[scale].convert:
                elsewhere = [info for info in group if info.name not in here]
                decisions[scale].convert = self.source.find_overflow(elsewhere, self.recipe.table)
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
