"""One convention: where the scale of a weight lies, and what else is known of checkpoints that are written so."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from ..errors import OptionError


@dataclass(frozen=True)
class Convention:
    """One rule ``weight name -> scale name``.

    Attributes:
        name: what plans and reports call it.
        weight, scale: templates with one ``{}``, e.g. ``"{}.weight"`` and ``"{}.weight_scale"``. What ``{}`` stands
            for is the module that the weight belongs to.
        producers: who writes checkpoints like this.
        beats: names of conventions that do not count where this one matches too.
        transposed: stacked experts of three dimensions lie as [experts, in, out], as in Llama 4; elsewhere they lie
            as [experts, out, in].
        scale_transposed: some of its scales of stacked experts are stored as [experts, out, 1] (FBGEMM Llama 4).
    """

    name: str
    weight: str
    scale: str
    producers: str = ""
    beats: tuple[str, ...] = ()
    transposed: bool = False
    scale_transposed: bool = False

    def __post_init__(self) -> None:
        for name in ("name", "producers"):
            if not isinstance(getattr(self, name), str):
                raise OptionError(f"convention {self.name!r}: {name}={getattr(self, name)!r}: expected a text")
        if not isinstance(self.beats, tuple) or not all(isinstance(name, str) for name in self.beats):
            raise OptionError(f"convention {self.name!r}: beats={self.beats!r}: expected a tuple of names")
        for name in ("transposed", "scale_transposed"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"convention {self.name!r}: {name}={getattr(self, name)!r}: expected True or False")
        for template in (self.weight, self.scale):
            if not isinstance(template, str) or template.count("{}") != 1:
                raise OptionError(f"convention {self.name!r}: {template!r} must hold exactly one {{}}")
        if self.weight == self.scale:
            raise OptionError(f"convention {self.name!r}: weight and scale are both {self.weight!r}")

    @cached_property
    def ends(self) -> tuple[str, str, str, str]:
        """What lies before and after the prefix, in the weight's name and in the scale's."""
        return (*_parts(self.weight)[:2], *_parts(self.scale)[:2])

    def module_of(self, weight: str) -> str | None:
        """The module that ``weight`` belongs to, or None where the rule is not about it.

        >>> Convention("mine", "{}.w_fp8", "{}.w_fp8_mult").module_of("layers.0.mlp.w_fp8")
        'layers.0.mlp'
        """
        head, tail = self.ends[:2]
        if not weight.endswith(tail) or not weight.startswith(head):
            return None
        return weight[len(head) : len(weight) - len(tail)] or None

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
