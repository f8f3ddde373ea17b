"""The registry: which rule says where the scale of a weight lies."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ..errors import OptionError
from .published import PUBLISHED


@dataclass(frozen=True)
class Convention:
    """One rule ``weight name -> scale name``.

    Attributes:
        name: what plans and reports call it.
        weight, scale: templates with one ``{}``, e.g. ``"{}.weight"`` and ``"{}.weight_scale"``.
        producers: who writes checkpoints like this.
        beats: names of conventions that do not count where this one matches too.
    """

    name: str
    weight: str
    scale: str
    producers: str = ""
    beats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for template in (self.weight, self.scale):
            if template.count("{}") != 1:
                raise OptionError(f"convention {self.name!r}: {template!r} must hold exactly one {{}}")
        if self.weight == self.scale:
            raise OptionError(f"convention {self.name!r}: weight and scale are both {self.weight!r}")

    @cached_property
    def ends(self) -> tuple[str, str, str, str]:
        """What lies before and after the prefix, in the weight's name and in the scale's."""
        return (*_parts(self.weight)[:2], *_parts(self.scale)[:2])

    def scale_of(self, weight: str) -> str | None:
        """The name that the scale of ``weight`` would have, or None where the rule is not about it."""
        return rename(self.weight, self.scale, weight)

    def weight_of(self, scale: str) -> str | None:
        """The name of the weight that ``scale`` would belong to."""
        return rename(self.scale, self.weight, scale)


@lru_cache(maxsize=1024)
def _parts(template: str) -> tuple[str, str, int]:
    head, tail = template.split("{}")
    return head, tail, len(head) + len(tail)


def rename(source: str, target: str, name: str) -> str | None:
    """``rename("{}.weight", "{}.scale", "a.weight")`` is ``"a.scale"``; None where ``source`` does not fit."""
    head, tail, least = _parts(source)
    if not name.endswith(tail) or not name.startswith(head) or len(name) <= least:
        return None
    before, after, _ = _parts(target)
    return before + name[len(head) : len(name) - len(tail)] + after


_REGISTRY: list[Convention] = [Convention(*row) for row in PUBLISHED]


def conventions() -> tuple[Convention, ...]:
    """All known conventions, in the order in which they are tried."""
    return tuple(_REGISTRY)


def _tails() -> tuple[str, ...]:
    return tuple({rule.ends[3] for rule in _REGISTRY})


_scale_tails = _tails()


def follows_a_rule(scale: str) -> bool:
    """Could ``scale`` be some weight's scale, by the end of its name? Spares most names the search."""
    return scale.endswith(_scale_tails)


def _names() -> str:
    return ", ".join(known.name for known in _REGISTRY)


def register(convention: Convention) -> None:
    """Add a convention of one's own; it is tried before the published ones, and named where both fit.

    Raises:
        OptionError: the name is taken by another rule, or the rule beats one that is not known.
    """
    for known in _REGISTRY:
        if known.name == convention.name and known != convention:
            raise OptionError(f"a convention called {convention.name!r} is registered already: {known}")
    unknown = [name for name in convention.beats if name not in {known.name for known in _REGISTRY}]
    if unknown:
        raise OptionError(
            f"convention {convention.name!r} beats {', '.join(map(repr, unknown))}, which is not known; "
            f"there are {_names()}"
        )
    if convention not in _REGISTRY:
        _REGISTRY.insert(0, convention)
        _changed()


def unregister(name: str) -> None:
    """Take a convention out again. Raises OptionError, listing the known ones, for an unknown name."""
    for known in _REGISTRY:
        if known.name == name:
            _REGISTRY.remove(known)
            _changed()
            return
    raise OptionError(f"no convention {name!r}; there are {_names()}")


def _changed() -> None:
    global _scale_tails
    _scale_tails = _tails()


def candidates(weight: str, names: Container[str]) -> list[tuple[Convention, str]]:
    """The rules whose scale for ``weight`` is among ``names``, one a scale, beaten ones left out."""
    found: dict[str, Convention] = {}
    for rule in _REGISTRY:  # spelt out: this runs for every FP8 weight, of which there may be 50,000
        head, tail, before, after = rule.ends
        if weight.endswith(tail) and weight.startswith(head):
            prefix = weight[len(head) : len(weight) - len(tail)]
            if prefix and (scale := before + prefix + after) in names:
                found.setdefault(scale, rule)
    if len(found) > 1:
        beaten = {name for rule in found.values() for name in rule.beats}
        return [(rule, scale) for scale, rule in found.items() if rule.name not in beaten]
    return [(rule, scale) for scale, rule in found.items()]
