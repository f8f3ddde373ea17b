"""A plan and the options become a recipe: what is done with each tensor, and what it comes out as.

Every driver (files, tensors in memory, slices, parts) and every tool carries this one recipe out. All that can be
decided from headers is decided here; what hangs on the values of weights is left to a ``Verdict``.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal, NamedTuple

from ..codes.formats import HALF, OTHER_FORMATS, Table
from ..conventions import module_of
from ..errors import PlanError
from ..options import What
from .experts import Fused, Fusing, Place, fuse
from .layout import can_be_dequantized, row_scale_shape, scale_shape, unknown
from .plan import ActivationScale, Pair, Plan
from .qkv import Piece, split

Role = Literal["weight", "scale", "activation scale", "other"]
Action = Literal["keep", "translate", "scale", "requantize", "dequantize", "drop"]

_SHAPED_FROM = ("uint8", "float8_e8m0fnu")
"""dtypes of scales that become float32 in a layout of one's own: no layer takes them."""


class Step(NamedTuple):
    """What becomes of one tensor.

    Attributes:
        name: on disk, or in the state dict that is given.
        role: what the tensor is.
        action: ``"translate"``: every code of a weight by ``table``; ``"scale"``: a scale times the factor that makes
            up for it; ``"requantize"``: a weight from block scales to row scales, and its scale with it;
            ``"dequantize"``: a weight to bfloat16; ``"drop"``: the scale of a dequantized weight.
        out, dtype, shape: the name, dtype and shape that it comes out with. A scale takes its shape whatever the
            verdict says.
        table: for a weight, how its codes are translated; a weight that is not translated is counted by it.
        group: the scale whose weights are decided together; ``""`` for a step that hangs on no weight of its own.
        pair: the weight and the scale that belong together.
        activation: for a static activation or KV cache scale, what is known of it.
        place: where in a fused tensor it goes, once the action is done; ``out``, ``dtype`` and ``shape`` are then the
            fused tensor's.
        pieces: the tensors that it is split into, once the action is done; none of them is called ``out``.
    """

    name: str
    role: Role
    action: Action
    out: str
    dtype: str
    shape: tuple[int, ...]
    table: Table | None = None
    group: str = ""
    pair: Pair | None = None
    activation: ActivationScale | None = None
    place: Place | None = None
    pieces: tuple[Piece, ...] = ()

    @property
    def outs(self) -> tuple[str, ...]:
        """The names that it comes out with."""
        return tuple(piece.name for piece in self.pieces) or (self.out,)

    @property
    def reciprocal(self) -> bool:
        """Does the tensor hold 1/scale?"""
        return self.activation is not None and self.activation.reciprocal


@dataclass(frozen=True)
class Verdict:
    """What hangs on the values of weights. A driver measures it, or is given it.

    Attributes:
        groups: names of the scales whose weights are translated.
        any: does any weight of the whole checkpoint not fit +-240? Activation scales hang on that.
    """

    groups: Container[str]
    any: bool

    def applies(self, step: Step) -> bool:
        """Is the step's action carried out? Only ``"translate"`` and ``"scale"`` may be left out."""
        if step.group:
            return step.group in self.groups
        return self.any or step.activation is None


class _All(Container[str]):
    def __contains__(self, name: object) -> bool:
        return True


ALL = Verdict(_All(), True)
"""Every weight is translated: what a slice, which does not see the whole weight, must assume."""


@dataclass(frozen=True)
class Recipe:
    """What becomes of each tensor of a checkpoint.

    Attributes:
        plan: what is known of the tensors.
        what: the options it was made with.
        steps: name -> step, in the checkpoint's order.
        fused: the fused tensors that come out in place of experts, by name.
    """

    plan: Plan
    what: What
    steps: Mapping[str, Step]
    fused: Mapping[str, Fused] = field(default_factory=dict)

    @property
    def table(self) -> Table:
        """The method's table."""
        return self.what.table

    @cached_property
    def weights(self) -> tuple[Step, ...]:
        """The steps of all FP8 weights."""
        return tuple(step for step in self.steps.values() if step.role == "weight")

    @cached_property
    def scaled_weights(self) -> tuple[Step, ...]:
        """The steps of FP8 weights that have a scale: those that a device could misread, and that can be mended."""
        return tuple(step for step in self.weights if step.pair is not None)

    @cached_property
    def laid_out(self) -> bool:
        """Is any weight requantized, or dequantized by its scale? That needs weight and scale together."""
        return any(step.action in ("requantize", "dequantize") for step in self.scaled_weights)

    def work_out(self) -> None:
        """Find what follows from the recipe now, for all copies that ``called`` makes."""
        self.scaled_weights  # noqa: B018

    def called(self, source: str) -> Recipe:
        """The same recipe for a checkpoint by another name."""
        renamed = copy(self)
        object.__setattr__(renamed, "plan", self.plan.called(source))
        return renamed

    def within(self, names: Iterable[str]) -> Recipe:
        """The part of the recipe that is about these tensors, in their order."""
        return Recipe(self.plan, self.what, {name: self.steps[name] for name in names}, self.fused)

    @cached_property
    def placed(self) -> tuple[Step, ...]:
        """The steps of all tensors that go into fused ones."""
        return tuple(step for step in self.steps.values() if step.place is not None)

    def as_they_are(self) -> Recipe:
        """The recipe without what goes into fused tensors."""
        return self.within(name for name, step in self.steps.items() if step.place is None) if self.placed else self

    def doing(self, *actions: Action, role: Role | None = None) -> Iterator[Step]:
        """The steps with one of these actions."""
        return (s for s in self.steps.values() if s.action in actions and role in (None, s.role))

    def torn_places(self, names: Container[str]) -> list[str]:
        """Fused tensors of which only some parts are among ``names``."""
        parts: dict[str, bool] = {}
        apart: dict[str, None] = {}
        for step in self.placed:
            here = step.name in names
            if parts.setdefault(step.out, here) != here:
                apart[step.out] = None
        return list(apart)

    def torn(self, names: Collection[str]) -> list[str]:
        """Pairs that their layout needs together, and of which only one tensor is among ``names``; and fused tensors
        of which only some parts are."""
        apart = dict.fromkeys(self.torn_places(names))
        for name in names:
            step = self.steps[name]
            own = (step.pair,) if step.role == "weight" and step.pair is not None else ()
            for pair in own or self.plan.by_scale.get(name, ()):
                if pair.weight in names and pair.scale in names:
                    continue
                scale, header = self.steps[pair.scale], self.plan.tensors[pair.scale]
                if self.steps[pair.weight].action != "translate" or (scale.shape, scale.dtype) != (
                    header.shape,
                    header.dtype,
                ):
                    apart[f"{pair.weight} / {pair.scale}"] = None
        return list(apart)


def make_recipe(plan: Plan, what: What, names: Mapping[str, str] | None = None) -> Recipe:
    """Decide what becomes of every tensor.

    Args:
        plan: from ``plan_checkpoint`` or ``make_plan``.
        what: the options; ``Options`` will do.
        names: new names for some of the tensors.

    Raises:
        PlanError: what the options ask for cannot be done with some pairs, all of them at once.
    """
    return _Maker(plan, what, names or {}).recipe()


class _Maker:
    def __init__(self, plan: Plan, what: What, names: Mapping[str, str]) -> None:
        self.plan, self.what, self.names, self.table = plan, what, names, what.table
        self.steps: dict[str, Step] = {}
        self.fusing = fuse(plan, what.layout) if what.experts == "fused" else Fusing()
        self.problems = list(self.fusing.problems)
        self.unused = {("keep", pattern) for pattern in what.keep}
        self.unused |= {("dequantize", pattern) for pattern in what.dequantize}

    def recipe(self) -> Recipe:
        for pairs in self.plan.by_scale.values():
            if self.fusing.becomes(pairs[0].weight):
                self._expert(pairs[0])
            else:
                self._group(pairs)
        self._without_scale()
        self.problems += [f"{option}={pattern!r} {self._no_match(pattern)}" for option, pattern in sorted(self.unused)]
        for activation in self.plan.activation_scales:
            rescale = self.what.activation_scales == "rescale"
            self._step(activation.name, "activation scale", "scale" if rescale else "keep", activation=activation)
        tensors = self.plan.tensors
        for name in tensors:
            if name not in self.steps:
                self._step(name, "other", "keep")
        if self.what.qkv == "split":
            split(self.plan, self.steps, self.problems)
        steps = {name: self.steps[name] for name in tensors}
        self._check_names(steps)
        if self.problems:
            raise PlanError(self.plan.source, self.problems)
        return Recipe(self.plan, self.what, steps, self.fusing.tensors)

    def _group(self, pairs: tuple[Pair, ...]) -> None:
        """The weights that share a scale, and the scale."""
        scale, tensors = pairs[0].scale, self.plan.tensors
        actions = [self._weight_action(pair) for pair in pairs]
        for pair, (action, _) in zip(pairs, actions, strict=True):
            table = HALF if action != "translate" else self.table
            dtype = "bfloat16" if action == "dequantize" else tensors[pair.weight].dtype
            group = scale if action == "translate" else ""
            self._step(pair.weight, "weight", action, dtype=dtype, table=table, group=group, pair=pair)
        if len(pairs) > 1 and any(action != "translate" for action, _ in actions):
            self.problems.append(f"{scale}: belongs to {len(pairs)} weights, which cannot be laid out apart")
            return
        shapes = {shape for _, shape in actions}
        if len(shapes) > 1:
            self.problems.append(f"{scale}: belongs to several weights, which would need it in different shapes")
            return
        (action, _), (shape,) = actions[0], shapes
        header = tensors[scale]
        if action == "dequantize":
            self._step(scale, "scale", "drop", pair=pairs[0])
        elif action == "requantize":
            shape = row_scale_shape(pairs[0], tensors[pairs[0].weight].shape)
            self._step(scale, "scale", "requantize", dtype="float32", shape=shape, pair=pairs[0])
        else:
            dtype = "float32" if shape is not None and header.dtype in _SHAPED_FROM else header.dtype
            self._step(scale, "scale", "scale", dtype=dtype, shape=shape, group=scale, pair=pairs[0])

    def _expert(self, pair: Pair) -> None:
        """A weight that goes to a fused layer, and its scale. What they come out as, ``_step`` knows."""
        if self._chosen(pair, "dequantize"):
            self.problems.append(
                f'{pair.weight}: dequantize={list(self.what.dequantize)} names an expert, and experts="fused" keeps '
                'them FP8; leave it out of the pattern, or experts="keep"'
            )
        if self._chosen(pair, "keep") and self.what.layout != "keep":
            self.problems.append(
                f'{pair.weight}: keep={list(self.what.keep)} names an expert, whose scales experts="fused" lays out; '
                'leave it out of the pattern, or layout="keep"'
            )
        if pair.weight in self.fusing.renamed:
            pair = pair._replace(transposed=True)
        if pair.granularity.kind == "block" and self.what.layout == "per_channel":
            self._step(pair.weight, "weight", "requantize", table=HALF, pair=pair)
            self._step(pair.scale, "scale", "requantize", pair=pair)
        else:
            self._step(pair.weight, "weight", "translate", table=self.table, group=pair.scale, pair=pair)
            self._step(pair.scale, "scale", "scale", group=pair.scale, pair=pair)

    def _weight_action(self, pair: Pair) -> tuple[Action, tuple[int, ...] | None]:
        """What is done with a weight, and the shape that its scale takes (None: its own)."""
        tensors, kept = self.plan.tensors, self._chosen(pair, "keep")
        if self._chosen(pair, "dequantize"):
            if not can_be_dequantized(pair, tensors):
                self.problems.append(f"{pair.weight}: cannot be dequantized; {unknown(pair, tensors)}")
            return "dequantize", None
        if self.what.layout == "keep" or kept:
            return "translate", None
        try:
            shape = scale_shape(pair, tensors, self.what.layout)
        except ValueError as error:
            self.problems.append(f"{pair.weight}: {error}")
            return "translate", None
        return ("requantize", None) if shape is None else ("translate", shape)

    def _chosen(self, pair: Pair, option: Literal["keep", "dequantize"]) -> bool:
        """Does one of the option's patterns match the pair's module?"""
        patterns = getattr(self.what, option)
        matching = {(option, p) for p in patterns if fnmatchcase(pair.module, p)} if patterns else set()
        self.unused -= matching
        return bool(matching)

    def _without_scale(self) -> None:
        """Weights without a scale: those of another format, whose scale stays as it is, and those that have none."""
        for name in self.plan.other_formats:
            dtype = self.plan.tensors[name].dtype
            if self.what.layout != "keep":
                self.problems.append(
                    f'{name}: is {dtype}, whose scales are not laid out; layout="keep", and shape them yourself'
                )
            self._step(name, "weight", "translate", dtype="float8_e4m3fn", table=OTHER_FORMATS[dtype])
        for name in self.plan.other_scales:
            self._step(name, "scale", "keep")
        for name in self.plan.unscaled:
            dequantize = self.what.unscaled == "dequantize"
            action: Action = "dequantize" if dequantize else "keep"
            self._step(name, "weight", action, dtype="bfloat16" if dequantize else None, table=HALF)

    def _no_match(self, pattern: str) -> str:
        others = [n for n in (*self.plan.unscaled, *self.plan.other_formats) if fnmatchcase(module_of(n), pattern)]
        if not others:
            return "matches no FP8 module"
        first = f"{others[0]} ({self.plan.tensors[others[0]].dtype})"
        return f'matches only FP8 weights without a scale (unscaled="dequantize") or of another format: {first}'

    def _step(
        self,
        name: str,
        role: Role,
        action: Action,
        *,
        dtype: str | None = None,
        shape: tuple[int, ...] | None = None,
        table: Table | None = None,
        group: str = "",
        pair: Pair | None = None,
        activation: ActivationScale | None = None,
    ) -> None:
        header, fused = self.plan.tensors[name], self.fusing.becomes(name)
        self.steps[name] = Step(
            name,
            role,
            action,
            fused.name if fused else self.names.get(name, name),
            fused.dtype if fused else dtype or header.dtype,
            fused.shape if fused else header.shape if shape is None else shape,
            table,
            group,
            pair,
            activation,
            self.fusing.places.get(name),
        )

    def _check_names(self, steps: Mapping[str, Step]) -> None:
        if all(step.out == step.name and not step.pieces for step in steps.values()):
            return
        taken: dict[str, str] = {}
        for step in steps.values():
            owner = "the experts" if step.place else step.name
            for out in () if step.action == "drop" else step.outs:
                first = taken.setdefault(out, owner)
                if first != owner:
                    self.problems.append(f"{out}: {first} and {owner} would both get this name")


def converted(recipe: Recipe, verdict: Verdict) -> list[str]:
    """The weights that are translated by the method: not those of another format, which always are."""
    return [step.name for step in recipe.scaled_weights if step.action == "translate" and verdict.applies(step)]
