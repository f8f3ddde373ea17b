"""A plan turns state dicts in memory into Neuron-ready ones."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch

from ..checkpoint.files import describe
from ..codes.formats import E4M3FN, E4M3FNUZ, FNUZ, HALF, Table
from ..codes.kernel import Counts, translate
from ..codes.scales import rescaled
from ..errors import OptionError, WeightError, listing
from ..host.memory import allocate, as_bytes, shaped
from ..host.parallel import pieces, run
from ..host.sharing import Span, change_once, identity, is_plain, moved, once_each, overlapping, span, storage_id
from ..options import Options
from ..plan.layout import check_layout, plan_layout
from ..plan.pairs import Plan, make_plan
from .report import Report
from .rules import (
    Tensors,
    check_weights,
    count_codes,
    dequantized,
    finish_layout,
    laid_out_overflow,
    make_report,
    new_scales,
)


def rescale_state_dict(
    state_dict: Mapping[str, torch.Tensor], *, inplace: bool = False, **options: Any
) -> dict[str, torch.Tensor]:
    """Make a state dict in memory Neuron-ready.

    Args:
        state_dict: name -> tensor, with the names of any known convention. Other values pass as they are.
        inplace: write into the tensors given, and into ``state_dict`` where a tensor is replaced (dequantized or
            float8_e4m3fnuz weights). Nothing is written before everything has been checked.
        **options: see ``Options``.

    Returns:
        ``state_dict`` itself if ``inplace``, else a new dict in the same order; tensors that need no change are
        the caller's own. Tensors that share memory are rescaled once and share afterwards.

    Raises:
        Fp8LoaderError: as ``load_state_dict``.
    """
    chosen = Options.of(options)
    infos = {name: describe(name, t) for name, t in state_dict.items() if isinstance(t, torch.Tensor)}
    return rescale_planned(state_dict, make_plan(infos, "state dict"), chosen, inplace=inplace)[0]


def rescale_planned(
    state_dict: Mapping[str, Any], plan: Plan, options: Options, *, inplace: bool
) -> tuple[dict[str, Any], Report]:
    """``rescale_state_dict`` by a plan already made; also gives the report."""
    begin = time.perf_counter()
    threads, table = options.thread_count(), options.table
    if inplace and not isinstance(state_dict, MutableMapping):
        raise OptionError(f"inplace=True: a {type(state_dict).__name__} cannot be changed; give a dict")
    _check_readable(plan, state_dict)
    layout = plan_layout(plan, options)
    # what cannot be looked into (sparse, on a device, a subclass) needs no change either: that has been checked
    tensors = {name: t.detach() for name, t in state_dict.items() if isinstance(t, torch.Tensor) and is_plain(t)}

    counts = _count(plan, tensors, table, threads)
    check_weights(plan, counts, options)
    convert = _decide(plan, tensors, counts, options) - layout.raw
    any_converted = bool(convert) or laid_out_overflow(layout, counts, options)
    scales = new_scales(plan, tensors, {plan.scale_of[w] for w in convert}, any_converted, options)
    check_layout(layout, plan, tensors)
    _check_neighbours(plan, tensors, convert, scales, layout.raw)
    report = make_report(plan, options, tensors, counts, convert, scales)

    replaced = _translated_fnuz(plan, tensors, threads) | dequantized(plan, tensors, options)
    changed = _change(plan, tensors, convert, scales, table, threads, inplace)
    result = finish_layout(layout, {**state_dict, **changed, **replaced}, report, inplace=inplace)
    report.seconds = time.perf_counter() - begin
    if not inplace:
        return result, report
    assert isinstance(state_dict, MutableMapping)  # checked above
    for name in state_dict.keys() - result.keys():
        del state_dict[name]
    state_dict.update({name: value for name, value in result.items() if value is not state_dict[name]})
    return state_dict, report  # type: ignore[return-value]


def _check_readable(plan: Plan, state_dict: Mapping[str, Any]) -> None:
    needed = {*(p.weight for p in plan.pairs), *(p.scale for p in plan.pairs), *plan.unscaled, *plan.fnuz}
    needed |= {a.name for a in plan.activation_scales}
    problems = []
    for name, t in state_dict.items():
        if not isinstance(t, torch.Tensor):
            continue
        if hasattr(t, "__tensor_flatten__") and _holds_fp8(t):
            problems.append(f"{name}: is a {type(t).__name__} with FP8 inside; flatten it into weight and scale")
        elif name in needed and not is_plain(t):
            kind = t.device if t.device.type != "cpu" else f"a {type(t).__name__} of layout {t.layout}"
            problems.append(f"{name}: is on {kind}; rescale it on the CPU, as a dense tensor with its data")
    if problems:
        raise WeightError(f"{plan.source}: cannot read {listing('tensor', sorted(problems))}")


def _holds_fp8(tensor: torch.Tensor) -> bool:
    if hasattr(tensor, "__tensor_flatten__"):
        inner = [getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]]
        return any(isinstance(part, torch.Tensor) and _holds_fp8(part) for part in inner)
    return tensor.dtype in (E4M3FN, E4M3FNUZ)


def _count(plan: Plan, tensors: Tensors, table: Table, threads: int) -> dict[str, Counts]:
    """What every FP8 weight holds. Nothing is written, so an in-place rescale can still be refused whole."""
    tables = {pair.weight: table for pair in plan.pairs}
    tables |= dict.fromkeys(plan.unscaled, HALF) | dict.fromkeys(plan.fnuz, FNUZ)
    flat = {name: as_bytes(tensors[name].contiguous()) for name in tables}
    return count_codes(flat, tables, threads)


def _decide(plan: Plan, tensors: Tensors, counts: Mapping[str, Counts], options: Options) -> set[str]:
    """The weights to convert. Weights that share a scale, or memory with one another, are decided together."""
    names = [pair.weight for pair in plan.pairs]
    together: list[list[str]] = [[pair.weight for pair in group] for group in plan.groups]
    together += overlapping({name: tensors[name] for name in names})
    owners = {group[0].scale: group[0].weight for group in plan.groups}
    together += [
        [owners[scale] for scale in group] for group in overlapping({scale: tensors[scale] for scale in owners})
    ]
    leader = {name: name for name in names}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name] = leader[leader[name]]
        return name

    for group in together:
        for other in group[1:]:
            leader[find(other)] = find(group[0])
    yes = {find(name) for name in names if options.always or counts[name].above}
    return {name for name in names if find(name) in yes}


def _check_neighbours(
    plan: Plan, tensors: Tensors, convert: Collection[str], scales: Collection[str], raw: Collection[str]
) -> None:
    """Refuse to change memory that a tensor of another meaning shows too."""
    problems = []
    reciprocal = {a.name for a in plan.activation_scales if a.reciprocal}
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
            f"{plan.source}: tensors that share memory with an FP8 weight or its scale and mean something else, "
            f"{listing('group', problems)}\nClone one of each group first."
        )


def _change(
    plan: Plan,
    tensors: Tensors,
    convert: Collection[str],
    scales: Tensors,
    table: Table,
    threads: int,
    inplace: bool,
) -> dict[str, torch.Tensor]:
    """Write the new weights and scales, into the tensors themselves or into new ones, which are returned."""
    by_storage: dict[Span, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            by_storage.setdefault(storage_id(tensor), []).append(name)
    reciprocal = {a.name for a in plan.activation_scales if a.reciprocal}
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
            if group[0] in scales:
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
    parts = [(src[a:b], dst[a:b]) for src, dst in jobs for a, b in pieces(src.numel())]

    def work(part: tuple[torch.Tensor, torch.Tensor]) -> None:
        translate(*part, table)

    run(parts, work, threads)


def _translated_fnuz(plan: Plan, tensors: Tensors, threads: int) -> dict[str, torch.Tensor]:
    def convert(weight: torch.Tensor) -> torch.Tensor:
        fresh = shaped(allocate(weight.numel()), E4M3FN, tuple(weight.shape))
        _translate_all([(as_bytes(weight.contiguous()), as_bytes(fresh))], FNUZ, threads)
        return fresh

    return once_each(tensors, plan.fnuz, convert)
