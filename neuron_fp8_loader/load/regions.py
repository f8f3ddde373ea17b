"""The driver for regions of tensors, by a verdict that is known: what is read is little more than what is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..checkpoint import Checkpoint, Range
from ..codes.scales import check_scale
from ..errors import OptionError, ScaleError, listing
from ..host.grain import copy_matrix
from ..host.memory import allocate, as_bytes, shaped
from ..options import Options
from ..plan import Pair, Recipe, Step, Verdict
from ..plan.region import Region, covering, extent, hull, is_laid_out, whole
from .checks import check_weights, new_scales
from .layout import check_layout, prepare_layout
from .strips import Seen, as_stored, dequantized, requantized


@dataclass(frozen=True)
class Wanted:
    """A region of a tensor that somebody wants.

    Attributes:
        region: of the tensor as it comes out.
        dtype: for an FP8 weight, the float dtype to dequantize it to; None: what the recipe says.
        into: a contiguous CPU tensor of the right dtype and shape to write into; None: a fresh one.
    """

    region: Region
    dtype: torch.dtype | None = None
    into: torch.Tensor | None = None


@dataclass
class Loaded:
    """Regions that were loaded.

    Attributes:
        tensors: by name on disk, in the order they were asked for.
        seen: what the FP8 weights held, and what requantizing cost; both of the part that was looked at.
        scales: names of the scales that changed.
        nbytes: how much was read.
    """

    tensors: dict[str, torch.Tensor]
    seen: Seen
    scales: frozenset[str]
    nbytes: int


class Regions:
    """Loads regions of the tensors of a checkpoint, each with the bytes that it has in the whole of it.

    Args:
        checkpoint: the whole.
        recipe: what becomes of its tensors.
        verdict: which weights are translated. It must be the same on all ranks, so it is not measured here:
            ``plan.recipe.ALL``, or one that was found for the whole checkpoint.
        options: ``threads`` and ``progress``; the rest is in the recipe.

    Raises:
        OptionError: no verdict, or a recipe by which weights come out in another shape.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, verdict: Verdict, options: Options) -> None:
        if not isinstance(verdict, Verdict):
            raise OptionError(f"verdict={verdict!r}: expected a Verdict, as scan_checkpoint(path).verdict is, or None")
        headers = recipe.plan.tensors
        joined = [s for s in recipe.weights if s.shape != headers[s.name].shape]
        if joined:
            names = [f"{s.name} {list(headers[s.name].shape)} -> {s.out} {list(s.shape)}" for s in joined]
            raise OptionError(
                f"{recipe.plan.source}: weights that come out in another shape cannot be loaded in parts; leave "
                f"out the option that shapes {listing('weight', names, limit=3)}"
            )
        turned = [s.name for s in recipe.weights if s.action == "requantize" and s.pair and s.pair.transposed]
        if turned:
            raise OptionError(
                f"{recipe.plan.source}: of weights that lie input before output, blocks become rows only as a whole; "
                f"load without slices, or keep={turned[:1]}, {listing('weight', turned, limit=3)}"
            )
        split = [s.name for s in recipe.steps.values() if s.pieces]
        if split:
            raise OptionError(
                f'{recipe.plan.source}: tensors that are split cannot be loaded in parts; leave out qkv="split", and '
                f"cut the tensor as it lies on disk, {listing('tensor', split, limit=3)}"
            )
        self._source, self._recipe, self._verdict = checkpoint.source, recipe, verdict
        self._threads, self._progress = options.thread_count(), options.progress

    def load(self, wanted: Mapping[str, Wanted]) -> Loaded:
        """Load a region of each of these tensors; scales that are dropped are not among them.

        Raises:
            CheckpointError, WeightError, ScaleError: as ``load_state_dict``, for what is looked at here.
        """
        recipe, seen = self._recipe, Seen()
        floats = {n: w for n, w in wanted.items() if self._is_dequantized(recipe.steps[n], w)}
        pairs = self._requantized(wanted, floats)
        own = {n: w for n, w in wanted.items() if recipe.steps[n].role in ("scale", "activation scale")}
        own = {n: w for n, w in own.items() if recipe.steps[n].action != "requantize"}

        # first the scales: they are small, and what is wrong with them is known before the weights are read
        ranges: list[Range] = []
        used = self._scales_used(floats, pairs, ranges)
        stored = {name: self._stored(recipe.steps[name], w.region, ranges) for name, w in own.items()}
        nbytes = self._read(ranges, show=False)
        self._check(used, pairs)
        new = new_scales(recipe.within(stored), stored, self._verdict)
        made = self._scales(own, stored, new)

        ranges = []
        row_scales: dict[str, torch.Tensor] = {}
        for name, w in wanted.items():
            step = recipe.steps[name]
            if name in own or (step.action == "requantize" and name not in floats):
                continue
            made[name] = target = w.into if w.into is not None else self._fresh(step, w)
            if name in floats:
                ranges += dequantized(recipe.plan, step, w.region, used.get(name), target, seen)
            else:
                changed = step.action == "translate" and self._verdict.applies(step)
                ranges += as_stored(recipe.plan.tensors[name], step, w.region, as_bytes(target), seen, change=changed)
        for pair, rows in pairs.items():
            row_scales[pair.scale] = fresh = torch.empty(extent(rows), dtype=torch.float32, device="cpu")
            if pair.weight in wanted and pair.weight not in floats:
                w = wanted[pair.weight]
                made[pair.weight] = w.into if w.into is not None else self._fresh(recipe.steps[pair.weight], w)
                codes = (w.region, as_bytes(made[pair.weight]))
            else:
                codes = None
            ranges += requantized(recipe.plan, pair, rows, used[pair.weight], codes, fresh, seen)
        nbytes += self._read(ranges, show=self._progress)
        # floats hold what does not fit +-240
        check_weights(recipe, {n: c._replace(above=0) if n in floats else c for n, c in seen.counts.items()})
        for pair, rows in pairs.items():
            if pair.scale in wanted:
                w = wanted[pair.scale]
                local = tuple((a - first, b - first) for (a, b), (first, _) in zip(w.region[:-1], rows, strict=True))
                made[pair.scale] = _given(_part(row_scales[pair.scale], local).unsqueeze(-1), w.into)
        return Loaded({name: made[name] for name in wanted}, seen, frozenset(new), nbytes)

    def _is_dequantized(self, step: Step, wanted: Wanted) -> bool:
        return step.role == "weight" and (wanted.dtype is not None or step.action == "dequantize")

    def _requantized(self, wanted: Mapping[str, Wanted], floats: Mapping[str, Wanted]) -> dict[Pair, Region]:
        """Pairs of which the codes or the row scales are wanted, and the leading dimensions of what is."""
        found: dict[Pair, Region] = {}
        for name, w in wanted.items():
            step = self._recipe.steps[name]
            if step.action == "requantize" and name not in floats:
                assert step.pair is not None
                rows = w.region[:-1]
                found[step.pair] = hull(found[step.pair], rows) if step.pair in found else rows
        return found

    def _scales_used(
        self, floats: Mapping[str, Wanted], pairs: Mapping[Pair, Region], ranges: list[Range]
    ) -> dict[str, torch.Tensor]:
        """Weight -> the part of its scale, as stored, that it is dequantized or requantized by; still to be read."""
        tensors = self._recipe.plan.tensors
        parts: dict[str, tuple[str, Region]] = {}
        for name, w in floats.items():
            pair = self._recipe.steps[name].pair
            if pair is not None:
                parts[name] = (pair.scale, covering(pair, tensors, w.region))
        for pair, rows in pairs.items():
            columns = (0, tensors[pair.weight].shape[-1])
            parts[pair.weight] = (pair.scale, covering(pair, tensors, (*rows, columns)))
        return {name: self._part_of(scale, region, ranges) for name, (scale, region) in parts.items()}

    def _stored(self, step: Step, region: Region, ranges: list[Range]) -> torch.Tensor:
        """A region of a scale as stored, or all of it where it is laid out; still to be read."""
        laid_out = is_laid_out(self._recipe, step)
        return self._part_of(
            step.name, whole(self._recipe.plan.tensors[step.name].shape) if laid_out else region, ranges
        )

    def _part_of(self, name: str, region: Region, ranges: list[Range]) -> torch.Tensor:
        info = self._recipe.plan.tensors[name]
        raw = allocate(info.nbytes // max(info.numel, 1) * _count(region))
        ranges += as_stored(info, None, region, raw, Seen())
        return shaped(raw, info.torch_dtype, extent(region))

    def _read(self, ranges: list[Range], *, show: bool | None) -> int:
        self._source.read_ranges(ranges, self._threads, show)
        return sum(r.nbytes for r in ranges)

    def _check(self, used: Mapping[str, torch.Tensor], pairs: Iterable[Pair]) -> None:
        """Scales that weights are changed by must be finite, and such as requantizing takes."""
        recipe, problems = self._recipe, []
        for weight, part in used.items():
            pair = recipe.steps[weight].pair
            assert pair is not None
            try:
                if recipe.what.nan == "error":
                    check_scale(part, recipe.plan.where(pair.scale))
            except ScaleError as error:
                problems.append(str(error))
        if problems:
            raise ScaleError(f"cannot use {listing('scale', problems)}")
        names = [name for pair in pairs for name in (pair.weight, pair.scale)]
        check_layout(recipe.within(names), {pair.scale: used[pair.weight] for pair in pairs})

    def _scales(
        self, own: Mapping[str, Wanted], stored: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Scales as they come out, in memory of their own."""
        recipe = self._recipe.within(n for n in own if is_laid_out(self._recipe, self._recipe.steps[n]))
        laid_out = prepare_layout(recipe, stored, new, self._threads).made
        return {
            name: _given(_part(laid_out[name], w.region) if name in laid_out else new.get(name, stored[name]), w.into)
            for name, w in own.items()
        }

    def _fresh(self, step: Step, wanted: Wanted) -> torch.Tensor:
        dtype = wanted.dtype or getattr(torch, step.dtype, None) or self._recipe.plan.tensors[step.name].torch_dtype
        size = torch.empty(0, dtype=dtype, device="cpu").element_size()
        return shaped(allocate(size * _count(wanted.region)), dtype, extent(wanted.region))


def _count(region: Region) -> int:
    return torch.Size(extent(region)).numel()


def _part(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    return tensor[tuple(slice(*bounds) for bounds in region)]


def _given(tensor: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    """The values in ``into``, or in memory that nothing else hangs on to."""
    if into is not None:
        if tensor.is_contiguous() and into.is_contiguous():  # no threads of torch's
            copy_matrix(tensor.view(1, -1), into.view(1, -1))
            return into
        return into.copy_(tensor)
    shared = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    return tensor.clone(memory_format=torch.contiguous_format) if shared else tensor
