"""Every error raised on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PosixPath


def printable(text: str, keep: str = "") -> str:
    """Text in which what a terminal would act on, and not show, is escaped as in a Python literal.

    Names of tensors and files come from strangers. Escaped are control characters, marks that turn the direction of
    text, blanks other than the space, and bytes of file names that are not UTF-8.

    Args:
        text: any text.
        keep: characters that stay as they are, such as a newline of our own.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


class Shown(str):
    """Text of strangers that is ``printable`` where it stands in an f-string; everything else gets it as it is."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return format(printable(str(self)), spec)


class ShownPath(PosixPath):
    """A path that is ``printable`` where it stands in an f-string; the system, ``str`` and JSON get it as it is.

    Newlines of our own give errors their lines, so that ``Fp8LoaderError`` cannot tell those of a file's name.
    """

    def __format__(self, spec: str) -> str:
        return format(printable(str(self)), spec)


class Fp8LoaderError(Exception):
    """Base class: catch this to catch all that the package raises on purpose. Its text is ``printable``."""

    def __init__(self, text: str = "") -> None:
        super().__init__(printable(str(text), keep="\n"))


class OptionError(Fp8LoaderError, ValueError):
    """An option has a value that it cannot take."""


class CheckpointError(Fp8LoaderError):
    """A checkpoint's files cannot be read, are missing, or contradict each other."""


class HostMemoryError(Fp8LoaderError, MemoryError):
    """The system did not give as much memory as the tensors need."""


class PlanError(Fp8LoaderError):
    """A checkpoint's tensors cannot be paired. ``problems`` lists all of them, one text each."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(map(printable, problems))
        super().__init__(f"{printable(str(source))}: {listing('problem', self.problems)}")

    def __reduce__(self) -> tuple[object, ...]:  # errors cross processes pickled
        return type(self), (self.source, self.problems)


class WeightError(Fp8LoaderError):
    """A weight's bytes cannot be made safe for a Neuron device: NaN codes, or no scale to make up for it."""


class ScaleError(Fp8LoaderError):
    """A scale cannot be rescaled: it would overflow, is not finite, or has a format with no such value."""


def listing(noun: str, items: Sequence[str], limit: int = 20) -> str:
    """``'2 problems:\\n  - a\\n  - b'``; a long list is cut, with the number left out. Items are ``printable``."""
    head = f"{len(items)} {noun}{'' if len(items) == 1 else 's'}:"
    lines = [f"  - {printable(item)}" for item in items[:limit]]
    if len(items) > limit:
        lines.append(f"  ... and {len(items) - limit} more")
    return "\n".join([head, *lines])
