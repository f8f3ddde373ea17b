"""Which scale belongs to a row of a weight? Told by the bytes of the rows that a layer was given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..conventions import module_of
from ..host.memory import as_bytes, buffer
from .names import short_name

_GROUPS, _GROUP = 4, 8  # of a sample, about: so many groups of columns a row, that side by side, as memory has them


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
        return cls(module, weight, values, _sample(weight), _version(weight))

    def written(self) -> bool:
        """Has the weight been changed in place? Behind torch's back too, as far as the sample tells."""
        return _version(self.weight) != self.version or not torch.equal(_sample(self.weight), self.sample)

    def is_still(self, weight: torch.Tensor) -> bool:
        """Is this the weight, or a copy of it, unchanged?"""
        if weight.shape != self.weight.shape or weight.dtype != self.weight.dtype or self.written():
            return False
        same = weight.data_ptr() == self.weight.data_ptr() and weight.stride() == self.weight.stride()
        return same or torch.equal(weight.view(torch.uint8), self.weight.view(torch.uint8))

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


class LayerRows:
    """The rows of one layer's weights. None is read before it is asked for."""

    def __init__(self, givens: list[Given]) -> None:
        self.givens = givens
        self._named = {short_name(given.module): given for given in givens}
        self._placed_at = {given.weight.data_ptr(): given for given in givens}
        self._values: set[float] | None = None
        self._whole: dict[bytes, _Origins] | None = None
        self._written: dict[tuple[int, bytes], _Origins] = {}
        self._placed: set[bytes] | None = None  # rows of weights that got their scales here

    def scale(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The scale of a weight that has none.

        Returns:
            float32 [out, 1], or [1] where the weights of the layer have one each; None if no row is known.

        Raises:
            ValueError: some are not known, or may have two scales.
        """
        values, modules, unknown, zeros = [1.0] * weight.shape[0], set(), None, True
        distinct: dict[float, None] = {}
        for row, known, written in self._look_up(weight):
            zeros = False
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
        self._placed = (self._placed or set()).union(_rows(weight))
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
        if not fits(scale, weight) or not (self._all_given(values) or (given is not None and not still)):
            return
        one = len(values) == 1
        if given is not None and not one and values == given.values.tolist() and given.is_transposed(weight):
            raise ValueError("it was transposed, its scale was not")
        for row, known, written in self._look_up(weight):
            value = values[0 if one else row]
            if written and not (one and value in written):
                raise ValueError(_in_place(row, written))
            if known and value not in known:
                origin = next(iter(known.values()))
                raise ValueError(
                    f"row {row} is {origin}, whose scale is another: rows were moved, their scales were not"
                )

    def _all_given(self, values: list[float]) -> bool:
        if self._values is None:
            self._values = {1.0}.union(*(given.values.tolist() for given in self.givens))  # 1 for padding
        return self._values.issuperset(values)

    def moved(self) -> list[str]:
        """The modules of which a row got its scale here, or that are all zeros in a layer where others did."""
        if self._placed is None:
            return []
        found = []
        for given in (g for g in self.givens if not g.written()):
            rows = [row for row, zero in zip(_rows(given.weight), _zeros(given.weight), strict=True) if not zero]
            if not rows or not self._placed.isdisjoint(rows):
                found.append(given.module)
        return found

    def _look_up(self, weight: torch.Tensor) -> Iterator[tuple[int, _Origins, _Origins]]:
        """(row, what it may be, what it may be of a weight that was written into) of all rows but zeros."""
        whole = self._whole = self._read() if self._whole is None else self._whole
        width, none = weight.shape[1], _Origins()
        samples = _rows(_sample(weight)) if self._written else [b""] * weight.shape[0]
        rows = zip(_rows(weight), _zeros(weight), samples, strict=True)
        for number, (row, zero, sample) in enumerate(rows):
            if not zero:
                yield number, whole.get(row, none), self._written.get((width, sample), none)

    def _read(self) -> dict[bytes, _Origins]:
        whole: dict[bytes, _Origins] = {}
        for given in self.givens:
            count, width = given.weight.shape
            values = given.values.expand(count).tolist()
            written = given.written()
            for n, (row, value) in enumerate(
                zip(_rows(given.sample if written else given.weight), values, strict=True)
            ):
                origins = self._written.setdefault((width, row), {}) if written else whole.setdefault(row, {})
                origins.setdefault(value, _Origin(given.module, n))
        return whole


def fits(scale: torch.Tensor, weight: torch.Tensor) -> bool:
    """Has the scale one value, or one for each row?"""
    return scale.numel() == 1 or tuple(scale.shape) == (weight.shape[0], 1)


def _in_place(row: int, written: _Origins) -> str:
    origin = next(iter(written.values()))
    return f"the conversion wrote into {origin.module}, of whose old rows row {row} may be one"


def _rows(weight: torch.Tensor) -> list[bytes]:
    whole, width = weight.contiguous(), weight.shape[1]
    raw = buffer(as_bytes(whole))
    return [bytes(raw[start : start + width]) for start in range(0, whole.numel(), width)]


def _zeros(weight: torch.Tensor) -> list[bool]:
    zeros: list[bool] = (weight.view(torch.uint8) & 0x7F == 0).all(dim=1).tolist()
    return zeros


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns], a copy: groups of columns all over a weight [rows, width], wherever and however it lies.

    A group is one access to memory: looking at every weight must cost little beside reading it.
    """
    raw, width = weight.view(torch.uint8), weight.shape[1]
    step = max(1, width // _GROUP // _GROUPS)
    aligned = raw.storage_offset() % _GROUP == 0 and raw.stride(0) % _GROUP == 0 and raw.data_ptr() % _GROUP == 0
    if width >= _GROUP and width % _GROUP == 0 and raw.stride(1) == 1 and aligned:
        groups = raw.view(torch.int64)[:, ::step]
        return groups.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    first = torch.arange(0, max(1, width // _GROUP), step, device="cpu") * _GROUP
    columns = (first[:, None] + torch.arange(min(_GROUP, width), device="cpu")).flatten()
    return raw.index_select(1, columns)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
