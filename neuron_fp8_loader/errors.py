"""Every error raised on purpose."""

from __future__ import annotations

from collections.abc import Sequence


class Fp8LoaderError(Exception):
    """Base class: catch this to catch all that the package raises on purpose."""


class OptionError(Fp8LoaderError, ValueError):
    """An option has a value that it cannot take."""


class CheckpointError(Fp8LoaderError):
    """A checkpoint's files cannot be read, are missing, or contradict each other."""


class PlanError(Fp8LoaderError):
    """A checkpoint's tensors cannot be paired. ``problems`` lists all of them, one text each."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__(f"{source}: {listing('problem', self.problems)}")


class WeightError(Fp8LoaderError):
    """A weight's bytes cannot be made safe for a Neuron device: NaN codes, or no scale to make up for it."""


class ScaleError(Fp8LoaderError):
    """A scale cannot be rescaled: it would overflow, is not finite, or has a format with no such value."""


def listing(noun: str, items: Sequence[str], limit: int = 20) -> str:
    """``'2 problems:\\n  - a\\n  - b'``; a long list is cut, with the number left out."""
    head = f"{len(items)} {noun}{'' if len(items) == 1 else 's'}:"
    lines = [f"  - {item}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  ... and {len(items) - limit} more")
    return "\n".join([head, *lines])
