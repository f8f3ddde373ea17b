"""Which scale belongs to a row of a weight? Told by the bytes of the rows that a layer was given."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch

from ..conventions import module_of
from .names import short_name
from .rows import as_rows, digests_of, sample_of, zeros_in


class Given(NamedTuple):
    """An FP8 weight [out, in] that a conversion is given.

    Attributes:
        module: its name, without ``.weight``.
        weight: as given, not copied.
        values: float32 [1] or [out], the scale's values as they were.
        sample: some columns of the weight's bytes as they were.
        version: torch's count of changes in place; 0 where there is none.
    """

    module: str
    weight: torch.Tensor
    values: torch.Tensor
    sample: torch.Tensor
    version: int

    @classmethod
    def of(cls, module: str, weight: torch.Tensor, scale: torch.Tensor) -> Given:
        weight = weight.detach()  # ``.data = ...`` changes the tensor that others hold
        values = scale.detach().float().flatten().clone()
        return cls(module, weight, values, sample_of(weight), _version(weight))

    def written(self) -> bool:
        """Has the weight been changed in place? Behind torch's back too, as far as the sample tells."""
        return _version(self.weight) != self.version or not torch.equal(sample_of(self.weight), self.sample)

    def is_still(self, weight: torch.Tensor) -> bool:
        """Is this the weight, or a copy of it, unchanged?"""
        if weight.shape != self.weight.shape or weight.dtype != self.weight.dtype or self.written():
            return False
        same = weight.data_ptr() == self.weight.data_ptr() and weight.stride() == self.weight.stride()
        return same or torch.equal(weight.view(torch.uint8), self.weight.view(torch.uint8))

    def is_within(self, weight: torch.Tensor) -> bool:
        """As ``is_still``, or with rows or columns of zeros after its own?"""
        rows, columns = self.weight.shape
        more = (weight[rows:], weight[:, columns:])
        zeros = not any(bool((part.view(torch.uint8) & 0x7F).any()) for part in more)
        return zeros and self.is_still(weight[:rows, :columns])

    def is_transposed(self, weight: torch.Tensor) -> bool:
        raw = self.weight.view(torch.uint8).T
        return weight.shape == raw.shape and torch.equal(weight.view(torch.uint8), raw)


class _Origin(NamedTuple):
    module: str
    row: int

    def __str__(self) -> str:
        return f"row {self.row} of {self.module}"


_Origins = dict[float, _Origin]
"""The scales that a row may have, each with the first row that had it."""


class _Old(NamedTuple):
    """A weight that the conversion was given, as it is afterwards.

    Attributes:
        given: the weight.
        written: has it been written into?
        samples: of its rows, as they were.
        digests: of those rows that were read.
    """

    given: Given
    written: bool
    samples: list[bytes]
    digests: set[bytes]


class LayerRows:
    """The rows of one layer's weights, each known by its SHA-256.

    Rows are read when one with the same sample is asked for, and then all that have it: which of them it is hangs on
    every byte, and whether it may be another is known. Of a row that was read, the digest is kept.
    """

    def __init__(self, givens: list[Given]) -> None:
        self.givens = givens
        self._named = {short_name(given.module): given for given in givens}
        self._placed_at = {given.weight.data_ptr(): given for given in givens}
        self._asked: dict[int, set[bytes]] = {}  # by width, the samples whose rows were read
        self._shared: set[bytes] = set()  # those of them that a row has
        self._whole: dict[bytes, _Origins] = {}
        self._written: dict[tuple[int, bytes], _Origins] = {}
        self._placed: set[bytes] | None = None  # rows of weights that got their scales here

    @cached_property
    def _olds(self) -> list[_Old]:
        return [_Old(given, given.written(), as_rows(given.sample), set()) for given in self.givens]

    @cached_property
    def _values(self) -> set[float]:
        return {1.0}.union(*(given.values.tolist() for given in self.givens))  # 1 for padding

    def scale(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The scale of a weight that has none.

        Returns:
            float32 [out, 1], or [1] where the weights of the layer have one each; None if no row is known.

        Raises:
            ValueError: some are not known, or may have two scales.
        """
        values, modules, unknown, zeros = [1.0] * weight.shape[0], set(), None, True
        distinct: dict[float, None] = {}
        digests: set[bytes] = set()
        for row, digest, known, written in self._look_up(weight):
            zeros = False
            digests.add(digest)
            if written:
                raise ValueError(_in_place(row, written))
            if len(known) > 1:
                first, second, *_ = known.values()
                raise ValueError(f"row {row} may be {first} or {second}, which have different scales")
            if not known:
                unknown = row if unknown is None else unknown
            for value, origin in known.items():
                values[row] = value
                distinct[value] = None
                modules.add(origin.module)
        if unknown is not None and modules:
            raise ValueError(f"row {unknown} is of no weight of this layer, others are of {sorted(modules)}")
        if not modules and not (zeros and self.givens):
            return None
        one = all(given.values.numel() == 1 for given in self.givens)
        if one and len(distinct) > 1:
            raise ValueError(
                f'its rows have {len(distinct)} scales, of which quantization_type="per_tensor_symmetric" takes one; '
                'set "per_channel_symmetric"'
            )
        self._placed = digests if self._placed is None else self._placed | digests
        return torch.tensor([*distinct] or [1.0]) if one else torch.tensor(values).unsqueeze(1)

    def check(self, name: str, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Raise ValueError where a weight has a scale that is not that of its rows.

        Scales with values that no row had are the conversion's own; they are looked at only where the weight kept its
        name and its rows were moved.
        """
        given = self._named.get(short_name(module_of(name))) or self._placed_at.get(weight.data_ptr())
        still = given is not None and given.is_still(weight)
        values = scale.float().flatten().tolist()
        if given is not None and still and values == given.values.tolist():
            return
        if not fits(scale, weight) or not (self._values.issuperset(values) or (given is not None and not still)):
            return
        one = len(values) == 1
        if given is not None and not one and values == given.values.tolist() and given.is_transposed(weight):
            raise ValueError("it was transposed, its scale was not")
        for row, _, known, written in self._look_up(weight):
            value = values[0 if one else row]
            if written and not (one and value in written):
                raise ValueError(_in_place(row, written))
            if known and value not in known:
                origin = next(iter(known.values()))
                raise ValueError(
                    f"row {row} is {origin}, whose scale is another: rows were moved, their scales were not"
                )

    def moved(self) -> list[str]:
        """The modules of which a row got its scale here, or that are all zeros in a layer where others did."""
        if self._placed is None:
            return []
        return [
            given.module
            for given, written, samples, digests in self._olds
            if not written
            and (not self._placed.isdisjoint(digests) or len(zeros_in(given.weight, samples)) == len(samples))
        ]

    def _look_up(self, weight: torch.Tensor) -> Iterator[tuple[int, bytes, _Origins, _Origins]]:
        """(row, digest, what it may be, what it may be of a weight that was written into) of all rows but zeros.

        The digest is empty where no row has the sample.
        """
        width, samples, none = weight.shape[1], as_rows(sample_of(weight)), _Origins()
        zeros = set(zeros_in(weight, samples))
        rest = [n for n in range(len(samples)) if n not in zeros]
        self._read(width, {samples[n] for n in rest})
        rows = [n for n in rest if samples[n] in self._shared]
        digests = dict(zip(rows, digests_of(weight, rows), strict=True))
        for n in rest:
            digest = digests.get(n, b"")
            yield n, digest, self._whole.get(digest, none), self._written.get((width, samples[n]), none)

    def _read(self, width: int, samples: set[bytes]) -> None:
        """Know all rows of this width that have one of these samples."""
        asked = self._asked.setdefault(width, set())
        new = samples - asked
        asked |= new
        for given, written, own, seen in self._olds:
            rows = [n for n, sample in enumerate(own) if sample in new] if given.weight.shape[1] == width else []
            if not rows:
                continue
            values = given.values.expand(len(own)).tolist()
            if written:
                for n in rows:
                    self._written.setdefault((width, own[n]), {}).setdefault(values[n], _Origin(given.module, n))
                continue
            self._shared.update(own[n] for n in rows)
            for n, digest in zip(rows, digests_of(given.weight, rows), strict=True):
                self._whole.setdefault(digest, {}).setdefault(values[n], _Origin(given.module, n))
                seen.add(digest)


def fits(scale: torch.Tensor, weight: torch.Tensor) -> bool:
    """Has the scale one value, or one for each row?"""
    return scale.numel() == 1 or tuple(scale.shape) == (weight.shape[0], 1)


def _in_place(row: int, written: _Origins) -> str:
    origin = next(iter(written.values()))
    return f"the conversion wrote into {origin.module}, of whose old rows row {row} may be one"


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
