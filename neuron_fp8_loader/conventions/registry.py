"""The registry: which rule says where the scale of a weight lies."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

from ..errors import OptionError
from .convention import Convention
from .published import PUBLISHED


class _Registry(tuple[Convention, ...]):
    """The rules in the order in which they are tried, and what follows from them. A change makes a new one."""

    @cached_property
    def scale_tails(self) -> tuple[str, ...]:
        return tuple({rule.ends[3] for rule in self})

    @cached_property
    def weight_tails(self) -> tuple[str, ...]:
        """Ends of weights' names, the longest first; not the empty one of fused experts."""
        return tuple(sorted({rule.ends[1] for rule in self} - {""}, key=lambda tail: (-len(tail), tail)))

    @cached_property
    def by_weight(self) -> tuple[tuple[str, str, tuple[tuple[int, str, str, Convention], ...]], ...]:
        """(head, tail) of weights' names, and the rules that know weights by them: (place, before, after, rule)."""
        found: dict[tuple[str, str], list[tuple[int, str, str, Convention]]] = {}
        for place, rule in enumerate(self):
            head, tail, before, after = rule.ends
            found.setdefault((head, tail), []).append((place, before, after, rule))
        return tuple((head, tail, tuple(rules)) for (head, tail), rules in found.items())


_registry = _Registry(PUBLISHED)


def conventions() -> tuple[Convention, ...]:
    """All known conventions, in the order in which they are tried."""
    return _registry


def follows_a_rule(scale: str) -> bool:
    """Could ``scale`` be some weight's scale, by the end of its name? Spares most names the search."""
    return scale.endswith(_registry.scale_tails)


def module_of(weight: str) -> str:
    """The module that a weight of no known scale belongs to: its name without ``.weight`` and its like."""
    for tail in _registry.weight_tails:
        if len(weight) > len(tail) and weight.endswith(tail):
            return weight.removesuffix(tail)
    return weight


def weight_tails() -> tuple[str, ...]:
    """What the names of weights end in, by the known conventions; not the empty end of fused experts' names."""
    return _registry.weight_tails


def _names() -> str:
    return ", ".join(known.name for known in _registry)


def register(convention: Convention) -> None:
    """Add a convention of one's own; it is tried before the published ones, and named where both fit.

    Raises:
        OptionError: the name is taken by another rule, the rule beats one that is not known, or is no Convention.
    """
    global _registry
    if not isinstance(convention, Convention):
        raise OptionError(f"register({convention!r}): expected a Convention")
    for known in _registry:
        if known.name == convention.name and known != convention:
            raise OptionError(f"a convention called {convention.name!r} is registered already: {known}")
    unknown = [name for name in convention.beats if name not in {known.name for known in _registry}]
    if unknown:
        raise OptionError(
            f"convention {convention.name!r} beats {', '.join(map(repr, unknown))}, which is not known; "
            f"there are {_names()}"
        )
    if convention not in _registry:
        _registry = _Registry((convention, *_registry))


def unregister(name: str) -> None:
    """Take a convention out again. Raises OptionError, listing the known ones, for an unknown name."""
    global _registry
    left = _Registry(known for known in _registry if known.name != name)
    if len(left) == len(_registry):
        raise OptionError(f"no convention {name!r}; there are {_names()}")
    _registry = left


class Candidates:
    """The scales of weights, among the names of a checkpoint's tensors.

    Most rules are of no weight of a checkpoint: they are left out from the start, by what the names end in.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        lasts = {name[name.rfind(".") + 1 :] for name in names}
        kept = (
            (head, tail, [rule for rule in rules if _occurs(rule[2], lasts)])
            for head, tail, rules in _registry.by_weight
        )
        self._by_weight = [(head, tail, rules) for head, tail, rules in kept if rules]

    def of(self, weight: str) -> list[tuple[Convention, str]]:
        """The rules whose scale for ``weight`` is among the names, one a scale, beaten ones left out."""
        matching: list[tuple[int, str, Convention]] = []
        for head, tail, rules in self._by_weight:  # spelt out: this runs for every FP8 weight, perhaps 50,000 times
            if weight.endswith(tail) and weight.startswith(head) and len(weight) > len(head) + len(tail):
                prefix = weight[len(head) : len(weight) - len(tail)]
                for place, before, after, rule in rules:
                    scale = before + prefix + after
                    if scale in self._names:
                        matching.append((place, scale, rule))
        if len(matching) == 1:
            ((_, scale, rule),) = matching
            return [(rule, scale)]
        found: dict[str, Convention] = {}
        for _, scale, rule in sorted(matching, key=lambda match: match[0]):
            found.setdefault(scale, rule)
        beaten = {name for rule in found.values() for name in rule.beats}
        return [(rule, scale) for scale, rule in found.items() if rule.name not in beaten]


def _occurs(end: str, lasts: Collection[str]) -> bool:
    """May a name end so, whose part after the last dot is one of these?"""
    _, dot, last = end.rpartition(".")
    return last in lasts if dot else any(name.endswith(last) for name in lasts)
