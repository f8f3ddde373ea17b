"""The driver for state dicts in memory: tensors that share memory are changed once and share it afterwards."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint import Decision, TensorInfo, describe
from ..codes.formats import E4M3FN, OTHER_FORMATS, Table
from ..codes.kernel import Counts, translate
from ..codes.scales import rescaled
from ..errors import OptionError, WeightError, listing
from ..host.collector import uncollected_if_short
from ..host.grain import GRAIN
from ..host.memory import allocate, as_bytes, check_mode, needing, shaped
from ..host.parallel import pieces, run
from ..host.sharing import (
    Span,
    change_once,
    identity,
    is_plain,
    moved,
    once_each,
    overlapping,
    overwrite,
    span,
    storage_id,
)
from ..host.signals import uninterrupted
from ..options import Options
from ..plan import Recipe, Verdict, make_plan, make_recipe
from .checks import Tensors, check_weights, count_codes, laid_out_overflow, new_scales
from .finish import finished
from .fused import FusedTensors
from .layout import check_layout, prepare_layout
from .report import Report, make_report
from .stripes import from_memory

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..options import OptionKeywords


def rescale_state_dict(
    state_dict: Mapping[str, torch.Tensor], *, inplace: bool = False, **options: Unpack[OptionKeywords]
) -> dict[str, torch.Tensor]:
    """Make a state dict in memory Neuron-ready.

    Args:
        state_dict: name -> tensor, with the names of any known convention. Other values pass as they are.
        inplace: write into the tensors given, and into ``state_dict`` where a tensor is replaced (dequantized or
            float8_e4m3fnuz weights; fused experts, which take memory of their own). Nothing is written before every
            weight and scale has been checked and memory for new tensors is there; from then on an interrupt (Ctrl-C,
            any signal with a handler in Python) waits until all is written, so that ``state_dict`` is converted whole
            or not at all. A process that is killed, or in which one write fails, leaves it in between.
        **options: see ``Options``.

    Returns:
        ``state_dict`` itself if ``inplace``, else a new dict in the same order; tensors that need no change are
        the caller's own. Tensors that share memory are rescaled once and share afterwards.

    Raises:
        Fp8LoaderError: as ``load_state_dict``; OptionError: ``state_dict`` is no mapping. WeightError also: an FP8
            weight or its scale has no dense CPU memory of its own (meta and fake tensors, wrapper subclasses,
            storages resized to 0, other devices), or its name is no string.
    """
    chosen = Options.of(options)
    recipe = make_recipe(make_plan(_headers(state_dict), "state dict"), chosen)
    return rescale_by(state_dict, recipe, chosen, inplace=inplace)[0]


def _headers(state_dict: Mapping[str, Any]) -> dict[str, TensorInfo]:
    if not isinstance(state_dict, Mapping):
        raise OptionError(f"expected a state dict, name -> tensor, not a {type(state_dict).__name__}")
    infos = {}
    for name, t in state_dict.items():
        if not isinstance(t, torch.Tensor):
            continue
        if not isinstance(name, str):
            raise WeightError(f"state dict: {name!r} is a {type(name).__name__}; names of tensors are strings")
        try:
            infos[name] = describe(name, t)
        except (RuntimeError, ValueError) as error:  # lazy modules, whose parameters have no shape yet
            raise WeightError(f"state dict: {name}: a {type(t).__name__} without a shape: {error}") from error
    return infos


def rescale_by(
    state_dict: Mapping[str, Any], recipe: Recipe, options: Options, *, inplace: bool
) -> tuple[dict[str, Any], Report]:
    """``rescale_state_dict`` by a recipe already made; also gives the report."""
    begin = time.perf_counter()
    threads = options.thread_count()
    if not isinstance(inplace, bool):
        raise OptionError(f"inplace={inplace!r}: expected True or False")
    if inplace and not isinstance(state_dict, MutableMapping):
        raise OptionError(f"inplace=True: a {type(state_dict).__name__} cannot be changed; give a dict")
    check_mode()
    total = sum(info.nbytes for info in recipe.plan.tensors.values())
    with needing(_memory(recipe, inplace), recipe.plan.source), uncollected_if_short(total):
        return _rescale(state_dict, recipe, options, threads, begin, inplace)


def _memory(recipe: Recipe, inplace: bool) -> int:
    """About how many bytes new tensors take."""
    tensors = recipe.plan.tensors
    changing = [step for step in recipe.steps.values() if step.action != "keep"]
    return sum(tensors[s.name].nbytes for s in changing if not inplace or s.dtype != tensors[s.name].dtype)


def _rescale(
    state_dict: Mapping[str, Any], recipe: Recipe, options: Options, threads: int, begin: float, inplace: bool
) -> tuple[dict[str, Any], Report]:
    _check_readable(recipe, state_dict)
    # what cannot be looked into (sparse, on a device, a subclass) needs no change either: that has been checked
    tensors = {name: t.detach() for name, t in state_dict.items() if isinstance(t, torch.Tensor) and is_plain(t)}

    counts = _count(recipe, tensors, threads)
    check_weights(recipe, counts)
    verdict = _verdict(recipe, tensors, counts)
    scales = new_scales(recipe, tensors, verdict)
    check_layout(recipe, tensors)
    rest = recipe.as_they_are()
    convert = {s.name for s in rest.scaled_weights if s.action == "translate" and verdict.applies(s)}
    raw = {s.name for s in rest.scaled_weights if s.action != "translate"}
    changing = {name: scale for name, scale in scales.items() if name in rest.steps}
    _check_neighbours(recipe, tensors, convert, changing, raw)

    # nothing of the caller's has been written so far, and all that takes memory comes before what writes
    fused = FusedTensors(recipe)
    decisions = {s.group: Decision(verdict.applies(s)) for s in recipe.placed if s.group}
    fused.weights(from_memory(tensors), tensors, decisions, threads)
    fused.scales(tensors, scales)
    prepared = prepare_layout(rest, tensors, scales, threads, inplace=inplace)
    others = _from_another_format(recipe, tensors, threads)
    with uninterrupted() if inplace else nullcontext():
        changed = _change(recipe, tensors, convert, changing, threads, inplace)
        made = changed | prepared.carry_out(threads) | others
        result = finished(recipe, state_dict, made, fused.tensors)
        if inplace:
            assert isinstance(state_dict, MutableMapping)  # checked above
            for name in state_dict.keys() - result.keys():
                del state_dict[name]
            state_dict.update({name: value for name, value in result.items() if value is not state_dict.get(name)})
    report = make_report(recipe, options, tensors, counts, verdict, scales, prepared.fidelity | fused.fidelity)
    report.seconds = time.perf_counter() - begin
    return (state_dict if inplace else result), report  # type: ignore[return-value]


def _check_readable(recipe: Recipe, state_dict: Mapping[str, Any]) -> None:
    needed = {step.name for step in recipe.steps.values() if step.role != "other" or step.place is not None}
    problems = []
    for name, t in state_dict.items():
        if not isinstance(t, torch.Tensor):
            continue
        if hasattr(t, "__tensor_flatten__") and _holds_fp8(t):
            problems.append(f"{name}: is a {type(t).__name__} with FP8 inside; flatten it into weight and scale")
        elif name in needed and not is_plain(t):
            kind = (
                f"on {t.device}" if t.device.type != "cpu" else f"a {type(t).__name__} without dense memory behind it"
            )
            problems.append(f"{name}: is {kind}; rescale it on the CPU, as a dense tensor with its data")
    if problems:
        raise WeightError(f"{recipe.plan.source}: cannot read {listing('tensor', sorted(problems))}")


def _holds_fp8(tensor: torch.Tensor) -> bool:
    if hasattr(tensor, "__tensor_flatten__"):
        inner = [getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]]
        return any(isinstance(part, torch.Tensor) and _holds_fp8(part) for part in inner)
    return tensor.dtype == E4M3FN or str(tensor.dtype).removeprefix("torch.") in OTHER_FORMATS


def _count(recipe: Recipe, tensors: Tensors, threads: int) -> dict[str, Counts]:
    """What every FP8 weight holds. Nothing is written, so an in-place rescale can still be refused whole."""
    tables = {step.name: step.table for step in recipe.weights if step.table is not None}
    flat = {name: as_bytes(tensors[name].contiguous()) for name in tables}
    return count_codes(flat, tables, threads)


def _verdict(recipe: Recipe, tensors: Tensors, counts: Mapping[str, Counts]) -> Verdict:
    """Weights that share a scale, or memory with one another, are decided together."""
    weights = {step.name: step for step in recipe.scaled_weights if step.action == "translate"}
    together = overlapping({name: tensors[name] for name in weights})
    groups = [{weights[name].group for name in names} for names in together]
    groups += [set(names) for names in overlapping({scale: tensors[scale] for scale in {*_groups(recipe)}})]
    leader = {scale: scale for scale in _groups(recipe)}

    def find(scale: str) -> str:
        while leader[scale] != scale:
            scale = leader[scale] = leader[leader[scale]]
        return scale

    for first, *others in groups:
        for other in others:
            leader[find(other)] = find(first)
    yes = {find(step.group) for name, step in weights.items() if recipe.what.always or counts[name].above}
    convert = frozenset(scale for scale in leader if find(scale) in yes)
    return Verdict(convert, bool(convert) or laid_out_overflow(recipe, counts))


def _groups(recipe: Recipe) -> list[str]:
    return list(dict.fromkeys(step.group for step in recipe.scaled_weights if step.group))


def _check_neighbours(
    recipe: Recipe, tensors: Tensors, convert: Collection[str], scales: Collection[str], raw: Collection[str]
) -> None:
    """Refuse to change memory that a tensor of another meaning shows too."""
    problems = []
    reciprocal = {step.name for step in recipe.steps.values() if step.reciprocal}
    for group in overlapping(tensors):
        if len(group) == 1:
            continue
        meanings: set[Any] = {
            (name in convert, name in scales, name in reciprocal, tensors[name].dtype, storage_id(tensors[name]))
            for name in group
        }
        if any(name in raw for name in group):  # laid out whole: one and the same tensor, or nothing
            meanings = {identity(tensors[name]) for name in group} | {(name in raw,) for name in group}
            meanings.discard((True,))
        if len(meanings) > 1 and any(name in convert or name in scales or name in raw for name in group):
            problems.append(", ".join(group))
    if problems:
        raise WeightError(
            f"{recipe.plan.source}: tensors that share memory with an FP8 weight or its scale and mean something "
            f"else, {listing('group', problems)}\nClone one of each group first."
        )


def _change(
    recipe: Recipe,
    tensors: Tensors,
    convert: Collection[str],
    scales: Tensors,
    threads: int,
    inplace: bool,
) -> dict[str, torch.Tensor]:
    """Write the new weights and scales, into the tensors themselves or into new ones, which are returned."""
    table = recipe.table
    by_storage: dict[Span, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            by_storage.setdefault(storage_id(tensor), []).append(name)
    reciprocal = {step.name for step in recipe.steps.values() if step.reciprocal}
    out: dict[str, torch.Tensor] = {}
    jobs: list[tuple[torch.Tensor, torch.Tensor]] = []  # bytes of weights: from, to

    def translated(codes: torch.Tensor) -> torch.Tensor:
        fresh = torch.empty_like(codes)
        translate(as_bytes(codes), as_bytes(fresh), table)
        return fresh

    for members in by_storage.values():
        if not any(name in convert or name in scales for name in members):
            continue
        views = {name: tensors[name] for name in members}
        if not inplace and len(members) == 1:
            (name,) = members
            source = views[name]
            if name in scales:
                out[name] = scales[name]
                continue
            if source.is_contiguous():
                out[name] = shaped(allocate(source.numel()), source.dtype, tuple(source.shape))
                jobs.append((as_bytes(source), as_bytes(out[name])))
                continue
        if not inplace:
            views = dict(zip(members, moved(views.values()), strict=True))
            out |= views
        for group in overlapping({name: view for name, view in views.items() if name in convert or name in scales}):
            shown = [views[name] for name in group]
            if group[0] in scales and len(group) == 1 and shown[0].is_contiguous() and shown[0].numel() <= GRAIN:
                overwrite(shown[0], scales[group[0]])
            elif group[0] in scales:
                change_once(shown, partial(rescaled, table=table, where=group[0], reciprocal=group[0] in reciprocal))
            elif all(view.is_contiguous() for view in shown):
                whole = _bytes_between(shown)
                jobs.append((whole, whole))
            else:
                change_once(shown, translated)
    _translate_all(jobs, table, threads)
    return out


def _bytes_between(views: Iterable[torch.Tensor]) -> torch.Tensor:
    """The bytes from the first to the last that these contiguous, overlapping views show."""
    views = list(views)
    spans = [span(view) for view in views]
    low, high = min(s[0] for s in spans), max(s[1] for s in spans)
    raw = torch.empty(0, dtype=torch.uint8, device="cpu")
    return raw.set_(views[0].untyped_storage(), low, (high - low,), (1,))


def _translate_all(jobs: Iterable[tuple[torch.Tensor, torch.Tensor]], table: Table, threads: int) -> None:
    parts = [(src, dst, a, b) for src, dst in jobs for a, b in pieces(src.numel())]

    def work(part: tuple[torch.Tensor, torch.Tensor, int, int]) -> None:
        src, dst, start, end = part
        translate(src[start:end], dst[start:end], table)

    run(parts, work, threads)


def _from_another_format(recipe: Recipe, tensors: Tensors, threads: int) -> dict[str, torch.Tensor]:
    """Weights whose codes are of another dtype than they come out in, as new tensors."""
    out: dict[str, torch.Tensor] = {}
    tables = {s.table for s in recipe.weights if s.table is not None and s.table.source != E4M3FN}
    for table in tables:

        def convert(weight: torch.Tensor, table: Table = table) -> torch.Tensor:
            fresh = shaped(allocate(weight.numel()), E4M3FN, tuple(weight.shape))
            _translate_all([(as_bytes(weight.contiguous()), as_bytes(fresh))], table, threads)
            return fresh

        out |= once_each(tensors, [s.name for s in recipe.weights if s.table == table], convert)
    return out
