"""A checkpoint Neuron-ready a few tensors at a time, by decisions already made: bounded memory for any size."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from ..checkpoint.files import Checkpoint, TensorInfo, load_bin
from ..checkpoint.reader import Decision, WeightJob, read
from ..codes.formats import E4M3FN, FNUZ, HALF
from ..codes.kernel import Counts, translate
from ..errors import OptionError
from ..host.memory import allocate, as_bytes, shaped
from ..host.parallel import pieces, run
from ..options import Options
from ..plan.pairs import Pair, Plan
from .rules import check_weights, dequantized, new_scales

BATCH = 256 << 20
"""Bytes that ``batches`` puts together."""


class Parts:
    """Loads any tensors of a checkpoint as ``load_state_dict`` would give them.

    Args:
        checkpoint, plan: the whole that they are part of.
        convert: names of the scales whose weights are rescaled (``Scan.convert``). Since that is settled, pairs may
            be torn apart: a weight in one part, its scale in another.
        options: ``threads`` and what applies to single tensors; ``always`` is in ``convert`` already.

    Raises:
        OptionError: ``layout`` or ``dequantize``, which need a weight and its scale together.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, convert: Collection[str], options: Options) -> None:
        if options.layout != "keep" or options.dequantize:
            raise OptionError(
                f"{plan.source}: layout and dequantize are for a load; what is converted a part at a time keeps the "
                "layout of its scales"
            )
        self._checkpoint, self._plan, self._convert, self._options = checkpoint, plan, frozenset(convert), options
        self._pairs: dict[str, Pair] = {pair.weight: pair for pair in plan.pairs}
        self._scales: dict[str, Pair] = {pair.scale: pair for pair in plan.pairs}
        self._unscaled, self._fnuz = frozenset(plan.unscaled), frozenset(plan.fnuz)
        self._activations = {a.name: a for a in plan.activation_scales}

    def load(self, infos: Sequence[TensorInfo]) -> dict[str, torch.Tensor]:
        """name -> CPU tensor, in the order of ``infos``.

        Raises:
            CheckpointError, WeightError, ScaleError: as ``load_state_dict``.
        """
        plan, options, table = self._about(infos), self._options, self._options.table
        jobs: dict[str, WeightJob] = {}
        for info in infos:
            if info.name in self._pairs:
                converted = self._pairs[info.name].scale in self._convert
                jobs[info.name] = WeightJob(table, Decision(True) if converted else None)
            elif info.name in self._fnuz:
                jobs[info.name] = WeightJob(FNUZ, Decision(True))
            elif info.name in self._unscaled:
                jobs[info.name] = WeightJob(HALF)
        load = _read_bin if self._checkpoint.is_bin else read
        tensors, counts = load(infos, jobs, options.thread_count())
        check_weights(plan, counts, options)
        tensors |= new_scales(plan, tensors, self._convert, bool(self._convert), options)
        tensors |= {name: tensors[name].view(E4M3FN) for name in plan.fnuz}
        return tensors | dequantized(plan, tensors, options)

    def _about(self, infos: Sequence[TensorInfo]) -> Plan:
        """The plan's entries for these tensors alone, so that a part of a large checkpoint costs what it holds."""
        names = [info.name for info in infos]
        found = (self._pairs.get(name) or self._scales.get(name) for name in names)
        return replace(
            self._plan,
            pairs=tuple(dict.fromkeys(pair for pair in found if pair)),
            unscaled=tuple(name for name in names if name in self._unscaled),
            fnuz=tuple(name for name in names if name in self._fnuz),
            activation_scales=tuple(self._activations[name] for name in names if name in self._activations),
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


def _read_bin(
    infos: Sequence[TensorInfo], weights: Mapping[str, WeightJob], threads: int
) -> tuple[dict[str, torch.Tensor], dict[str, Counts]]:
    """``reader.read`` for ``.bin`` files, which torch maps: only what changes takes memory."""
    files = {info.file for info in infos if info.file}
    loaded = {name: value for file in files for name, value in load_bin(file).items()}
    tensors = {info.name: loaded[info.name].detach() for info in infos}
    counts: dict[str, Counts] = {}
    for name, job in weights.items():
        source, target = tensors[name].contiguous(), None
        if job.decision is not None:
            tensors[name] = target = shaped(allocate(source.numel()), source.dtype, tuple(source.shape))
        counts[name] = _translate(source, target, job, threads)
    return tensors, counts


def _translate(source: torch.Tensor, target: torch.Tensor | None, job: WeightJob, threads: int) -> Counts:
    src, dst = as_bytes(source), None if target is None else as_bytes(target)
    seen: list[Counts] = []

    def work(part: tuple[int, int]) -> None:
        start, end = part
        seen.append(translate(src[start:end], None if dst is None else dst[start:end], job.table))

    run(list(pieces(src.numel())), work, threads)
    return sum(seen, Counts())
