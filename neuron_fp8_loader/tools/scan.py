"""What the FP8 codes of a checkpoint are: counted where they lie, nothing loaded, nothing changed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..checkpoint.files import Checkpoint, TensorInfo, load_bin, open_checkpoint
from ..checkpoint.reader import read, visit
from ..codes.formats import LARGEST_FIT, NAN_CODE, Table
from ..codes.kernel import Counts, histogram
from ..errors import ScaleError, WeightError
from ..host.memory import as_bytes
from ..host.parallel import pieces, run
from ..load.rules import check_weights, new_scales
from ..options import Options
from ..plan.pairs import Plan, plan_for

_INF_CODE = LARGEST_FIT + 1  # 256 to a GPU


@dataclass(frozen=True)
class WeightCodes:
    """How often each byte occurs in one FP8 weight.

    Attributes:
        name: the tensor's.
        histogram: int64 [256], on the CPU.
        fnuz: is it a float8_e4m3fnuz weight? All of its values have a code in Neuron's format.
    """

    name: str
    histogram: torch.Tensor
    fnuz: bool = False

    @cached_property
    def magnitudes(self) -> list[int]:
        """How often each of the 128 magnitude codes occurs, whatever the sign."""
        return (self.histogram[:128] + self.histogram[128:]).tolist()

    @property
    def numel(self) -> int:
        return int(self.histogram.sum())

    @property
    def as_inf(self) -> int:
        """Codes that Neuron reads as inf (256 to a GPU)."""
        return 0 if self.fnuz else self.magnitudes[_INF_CODE]

    @property
    def as_nan(self) -> int:
        """Codes that Neuron reads as nan and a GPU as 288..448."""
        return 0 if self.fnuz else sum(self.magnitudes[_INF_CODE + 1 : NAN_CODE])

    @property
    def above(self) -> int:
        """Codes above 240: ``as_inf`` and ``as_nan``."""
        return self.as_inf + self.as_nan

    @property
    def nan(self) -> int:
        """Codes that are NaN to a GPU too."""
        return int(self.histogram[0x80]) if self.fnuz else self.magnitudes[NAN_CODE]

    @property
    def share_above(self) -> float:
        """``above`` as a share of all its codes, 0..1."""
        return self.above / self.numel if self.numel else 0.0

    @property
    def counts(self) -> Counts:
        """The same as a load counts it."""
        largest = max((code for code, n in enumerate(self.magnitudes) if n), default=0)
        return Counts(largest, self.above, 0, self.nan)

    def rounded_by(self, table: Table) -> int:
        """Codes to which ``table`` gives another value."""
        return sum(n for n, lossy in zip(self.histogram.tolist(), table.lossy, strict=True) if lossy)


@dataclass(frozen=True)
class Scan:
    """The codes of all FP8 weights of a checkpoint, and what follows for loading it.

    Attributes:
        plan: which weight goes with which scale.
        weights: by name, in the checkpoint's order.
        options: the options that ``convert`` and ``refusals`` are about.
        convert: names of the scales whose weights a load would rescale.
        refusals: why a load would stop, one text a reason; empty if it would not.
        nbytes: how much was read.
        seconds: how long that took.
    """

    plan: Plan
    weights: Mapping[str, WeightCodes]
    options: Options
    convert: frozenset[str]
    refusals: tuple[str, ...] = ()
    nbytes: int = 0
    seconds: float = 0.0

    @cached_property
    def rescaled(self) -> list[str]:
        """The weights that a load would rescale."""
        return [pair.weight for pair in self.plan.pairs if pair.scale in self.convert]

    @property
    def numel(self) -> int:
        return sum(w.numel for w in self.weights.values())

    @property
    def as_inf(self) -> int:
        return sum(w.as_inf for w in self.weights.values())

    @property
    def as_nan(self) -> int:
        return sum(w.as_nan for w in self.weights.values())

    @property
    def nan(self) -> int:
        return sum(w.nan for w in self.weights.values())

    @property
    def rounded(self) -> int:
        """Codes of the rescaled weights to which the method gives another value."""
        return sum(self.weights[name].rounded_by(self.options.table) for name in self.rescaled)

    def worst(self, count: int | None = None) -> list[WeightCodes]:
        """Weights with codes above 240, the largest share first."""
        found = [w for w in self.weights.values() if w.above]
        return sorted(found, key=lambda w: (-w.share_above, w.name))[:count]

    def histograms(self) -> tuple[list[int], list[int]]:
        """How often each magnitude code occurs over all e4m3fn weights: on disk, and after a load (128 each)."""
        before, after = [0] * 128, [0] * 128
        table, converted = self.options.table, set(self.rescaled)
        for weight in self.weights.values():
            if weight.fnuz:
                continue
            for code, n in enumerate(weight.magnitudes):
                before[code] += n
                after[table.out[code] if weight.name in converted else code] += n
        return before, after


def scan_checkpoint(path: str | os.PathLike[str], **options: object) -> Scan:
    """Count the codes of every FP8 weight, in bounded memory.

    Args:
        path: a directory, a ``.safetensors`` or ``.bin`` file, or an index file.
        **options: see ``Options``; they decide what a load would convert and refuse.

    Raises:
        CheckpointError, PlanError: as ``plan_checkpoint``, or a file cannot be read.
        What a load would refuse for its values is in ``Scan.refusals``, not raised.
    """
    checkpoint = open_checkpoint(path)
    return scan(checkpoint, plan_for(checkpoint), Options.of(options))


def scan(checkpoint: Checkpoint, plan: Plan, options: Options) -> Scan:
    """``scan_checkpoint`` for a checkpoint already opened and planned."""
    begin = time.perf_counter()
    fnuz = set(plan.fnuz)
    names = {pair.weight for pair in plan.pairs} | set(plan.unscaled) | fnuz
    infos = [info for info in checkpoint.tensors.values() if info.name in names]
    weights = {
        name: WeightCodes(name, histogram, name in fnuz)
        for name, histogram in _histograms(checkpoint, infos, options).items()
    }
    convert = {
        group[0].scale for group in plan.groups if options.always or any(weights[pair.weight].above for pair in group)
    }
    result = Scan(
        plan=plan,
        weights=weights,
        options=options,
        convert=frozenset(convert),
        refusals=tuple(_refusals(checkpoint, plan, weights, convert, options)),
        nbytes=sum(info.nbytes for info in infos),
        seconds=time.perf_counter() - begin,
    )
    return result


def _histograms(checkpoint: Checkpoint, infos: Sequence[TensorInfo], options: Options) -> dict[str, torch.Tensor]:
    counts = {info.name: torch.zeros(256, dtype=torch.int64, device="cpu") for info in infos}
    lock = threading.Lock()

    def see(name: str, piece: torch.Tensor) -> None:
        seen = histogram(piece)
        with lock:
            counts[name] += seen

    threads = options.thread_count()
    if not checkpoint.is_bin:
        visit(infos, see, threads, options.progress)
        return counts
    tensors = _bin_tensors(checkpoint, counts)
    jobs = [(name, part) for name, flat in tensors.items() for part in pieces(flat.numel())]
    run(jobs, lambda job: see(job[0], tensors[job[0]][job[1][0] : job[1][1]]), threads)
    return counts


def _bin_tensors(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, torch.Tensor]:
    loaded = {name: value for file in checkpoint.files for name, value in load_bin(file).items() if name in names}
    return {name: as_bytes(value.contiguous()) for name, value in loaded.items()}


def _refusals(
    checkpoint: Checkpoint,
    plan: Plan,
    weights: Mapping[str, WeightCodes],
    convert: Collection[str],
    options: Options,
) -> list[str]:
    """Run the checks of a load on what was counted, each by itself so that none hides another."""
    found = []
    counts = {name: weight.counts for name, weight in weights.items()}
    for only in ({"unscaled": "keep"}, {"nan": "keep"}):
        try:
            check_weights(plan, counts, Options.of({"nan": options.nan, "unscaled": options.unscaled, **only}))
        except WeightError as error:
            found.append(str(error))
    names = {pair.scale for pair in plan.pairs} | {a.name for a in plan.activation_scales}
    infos = [info for info in checkpoint.tensors.values() if info.name in names]
    if checkpoint.is_bin:
        scales = {n: v for file in checkpoint.files for n, v in load_bin(file).items() if n in names}
    else:
        scales, _ = read(infos, {}, options.thread_count())
    try:
        new_scales(plan, scales, convert, bool(convert), options)
    except ScaleError as error:
        found.append(str(error))
    return found
