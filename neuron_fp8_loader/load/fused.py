"""Fills fused tensors: each stripe of an expert's weight is translated in cache and placed where it belongs.

Memory is the fused tensors and one stripe a thread: 1 or 2 MiB, or a row of blocks where that is larger.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack

import torch

from ..checkpoint import Decision
from ..codes import kernel
from ..codes.dequantize import scale_values
from ..codes.kernel import Counts, translate
from ..codes.requantize import Fidelity, requantize, tiles
from ..host.memory import allocate, populate, shaped
from ..host.parallel import PIECE, progress, run
from ..plan import Pair, Recipe, Step
from .layout import as_float32
from .stripes import Fetch, Stripe, stripes

Tensors = Mapping[str, torch.Tensor]

_REQUANTIZED = 2 * PIECE  # a stripe that is requantized is worth a few dozen calls of torch


class FusedTensors:
    """The fused tensors of a recipe, empty at first.

    Attributes:
        tensors: by name.
        counts: what each FP8 weight held before it was translated, once ``weights`` is done.
        fidelity: what requantizing cost, by weight, once ``weights`` is done.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.counts: dict[str, Counts] = {}
        self.fidelity: dict[str, Fidelity] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self._raw: dict[str, torch.Tensor] = {}
        self._block_scales: Tensors = {}
        self._lock = threading.Lock()
        for name in dict.fromkeys(step.out for step in recipe.placed):
            fused = recipe.fused[name]
            dtype: torch.dtype = getattr(torch, fused.dtype)
            self._raw[name] = allocate(torch.Size(fused.shape).numel() * dtype.itemsize)
            self.tensors[name] = shaped(self._raw[name], dtype, fused.shape)

    def weights(
        self,
        fetch: Fetch,
        scales: Tensors,
        decisions: Mapping[str, Decision],
        threads: int,
        show_progress: bool | None = False,
    ) -> None:
        """Place all weights, and the scales of those that are requantized.

        Args:
            fetch: gives their bytes.
            scales: the block scales, as the checkpoint has them; ``check_layout`` comes first.
            decisions: by scale, whether its weights are translated; settled by the first code that does not fit.
                What was placed before that is placed anew.
            threads, show_progress: as ``reader.read``.
        """
        self._block_scales = scales
        jobs = [part for step in self.recipe.placed if step.role != "scale" for part in self._cut(step)]
        late: list[Stripe] = []
        own = threading.local()
        with ExitStack() as stack:
            total = sum(stripe.nbytes for stripe in jobs)
            advance = stack.enter_context(progress("reading experts", total, show_progress))

            def read(stripe: Stripe) -> torch.Tensor:
                if not hasattr(own, "scratch") or own.scratch.numel() < stripe.nbytes:
                    own.scratch = allocate(stripe.nbytes)
                codes: torch.Tensor = own.scratch[: stripe.nbytes]
                fetch(stripe, codes)
                return codes

            def work(stripe: Stripe) -> None:
                codes = read(stripe)
                if not self._settle(stripe, codes, decisions):
                    late.append(stripe)
                self._place(stripe, codes)
                advance(stripe.nbytes)

            def again(stripe: Stripe) -> None:
                codes, step = read(stripe), self.recipe.steps[stripe.info.name]
                assert step.table is not None
                translate(codes, codes, step.table)
                self._place(stripe, codes)

            run(jobs, work, threads)
            run([s for s in late if decisions[self.recipe.steps[s.info.name].group].convert], again, threads)

    def scales(self, original: Tensors, new: Tensors) -> None:
        """Place the scales of weights that were not requantized.

        Args:
            original: as the checkpoint has them.
            new: those that changed.

        Raises:
            ScaleError: a float64 scale does not exist in float32.
        """
        for step in self.recipe.placed:
            if step.action == "scale":
                scale = new.get(step.name, original[step.name])
                self._place_scale(step, as_float32(scale, self.recipe.plan.where(step.name)))

    def _cut(self, step: Step) -> list[Stripe]:
        info = self.recipe.plan.tensors[step.name]
        if step.role == "weight":
            self.counts[step.name] = Counts()
        if step.action != "requantize":
            return list(stripes(info))
        assert step.pair is not None
        return list(stripes(info, _block(step.pair)[0], _REQUANTIZED))

    def _settle(self, stripe: Stripe, codes: torch.Tensor, decisions: Mapping[str, Decision]) -> bool:
        """Make the codes what they come out as, in place. False: as long as nothing says that they must change."""
        step = self.recipe.steps[stripe.info.name]
        if step.role != "weight":
            return True
        assert step.table is not None
        decision = decisions[step.group] if step.group else None
        convert = decision is not None and decision.convert
        seen = translate(codes, codes if convert else None, step.table)
        cost = Fidelity()
        if step.action == "requantize":
            cost = self._requantize(step, stripe, codes)
        elif seen.above and not convert:
            assert decision is not None
            decision.convert = convert = True
            translate(codes, codes, step.table)
        with self._lock:
            self.counts[step.name] += seen
            if step.action == "requantize":
                self.fidelity[step.name] = self.fidelity.get(step.name, Fidelity()) + cost
        return convert or decision is None

    def _requantize(self, step: Step, stripe: Stripe, codes: torch.Tensor) -> Fidelity:
        assert step.pair is not None
        block, place = _block(step.pair), self.recipe.steps[step.pair.scale].place
        assert place is not None
        rows, columns = stripe.info.shape[-2:]
        grids = self._block_scales[step.pair.scale].reshape(-1, -(-rows // block[0]), -(-columns // block[1]))
        scales = scale_values(
            grids[stripe.matrix, stripe.first // block[0] : -(-stripe.last // block[0])]
        ).contiguous()
        expert = stripe.matrix if place.expert is None else place.expert
        first = place.column + stripe.first
        row_scales = self.tensors[place.into][expert, 0, first : first + stripe.rows]
        matrix = codes.view(stripe.rows, stripe.columns)
        return sum((requantize(tile) for tile in tiles(matrix, matrix, scales, row_scales, block)), Fidelity())

    def _place(self, stripe: Stripe, codes: torch.Tensor) -> None:
        place = self.recipe.steps[stripe.info.name].place
        assert place is not None
        fused, expert = self.tensors[place.into], stripe.matrix if place.expert is None else place.expert
        if stripe.first == 0:
            nbytes = fused[0].numel() * fused.element_size()
            populate(self._raw[place.into], expert * nbytes, (expert + 1) * nbytes)
        first = place.column + stripe.first
        source = codes.view(torch.uint8 if fused.element_size() == 1 else fused.dtype)
        target = fused.view(source.dtype)[expert, :, first : first + stripe.rows]
        kernel.place(source.view(stripe.rows, stripe.columns), target)

    def _place_scale(self, step: Step, values: torch.Tensor) -> None:
        assert step.place is not None
        assert step.pair is not None
        fused, covers = self.tensors[step.place.into], step.pair.granularity
        rows = self.recipe.plan.tensors[step.pair.weight].shape[-2]
        matrices = fused if step.place.expert is None else fused[step.place.expert : step.place.expert + 1]
        if covers.kind == "block":
            grid = values.reshape(len(matrices), -1, fused.shape[1])
            matrices[:, :, step.place.column : step.place.column + grid.shape[1]] = grid.transpose(1, 2)
        else:
            one_each = values.reshape(-1, 1, values.numel() // (len(matrices) if covers.experts else 1))
            matrices[:, :, step.place.column : step.place.column + rows] = one_each


def _block(pair: Pair) -> tuple[int, int]:
    assert pair.granularity.block is not None  # block scales have a size
    return pair.granularity.block
