"""Scales of layers that are no experts, where a model's conversion leaves them behind: they follow their rows.

A conversion that renames a weight, fuses queries, keys and values, or cuts a projection in two often forgets the
scale beside it. An output row keeps its scale wherever it goes, so rows are told by their bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..conventions import module_of
from ..errors import WeightError, listing
from ..host.memory import as_bytes, buffer
from .check import is_weight
from .experts import is_expert, layer_of
from .names import short_name

log = logging.getLogger("neuron_fp8_loader")

_GROUPS, _GROUP = 4, 8  # of a sample, about: so many groups of columns a row, that side by side, as memory has them


class Given(NamedTuple):
    """An FP8 weight [out, in] that a conversion is given; the tensors are not copied.

    Attributes:
        module: its name, without ``.weight``.
        weight, scale: the scale has one value, or is [out, 1].
        sample: some columns of its bytes, copied: they tell if the conversion wrote into the weight.
    """

    module: str
    weight: torch.Tensor
    scale: torch.Tensor
    sample: torch.Tensor


@dataclass
class Rows:
    """The FP8 weights that a conversion is given, with their scales.

    Attributes:
        layers: by the number of the layer.
    """

    layers: dict[str, list[Given]] = field(default_factory=dict)

    @classmethod
    def of(cls, state_dict: Mapping[str, Any]) -> Rows:
        """Those that have a scale ``X.scale``, and are of no expert."""
        found = cls()
        for name, weight in state_dict.items():
            module = module_of(name)
            scale = state_dict.get(f"{module}.scale")
            if not isinstance(scale, torch.Tensor) or is_expert(name) or not is_weight(name, weight, state_dict):
                continue
            if (
                weight.dim() == 2
                and weight.numel()
                and (scale.numel() == 1 or tuple(scale.shape) == (weight.shape[0], 1))
            ):
                given = Given(module, weight, scale, _sample(weight))
                found.layers.setdefault(layer_of(name), []).append(given)
        return found

    def attach(self, converted: MutableMapping[str, Any], source: str) -> None:
        """Give every FP8 weight [out, in] that has lost its scale the scales of its rows, and take the old ones away.

        Weights of which no row is known are left for ``check_complete`` to name.

        Args:
            converted: what a model's conversion returned; changed.
            source: the checkpoint, for messages.

        Raises:
            WeightError: a row may have come from two weights with different scales, or some rows of a weight are
                known and others are not, or the conversion wrote into a weight.
        """
        bare = [
            name
            for name, weight in converted.items()
            if not is_expert(name)
            and is_weight(name, weight, converted)
            and weight.dim() == 2
            and f"{module_of(name)}.scale" not in converted
        ]
        problems = self._moved_without(converted)
        owners: set[str] = set()
        for layer in dict.fromkeys(map(layer_of, bare)):
            known = _Known(self.layers.get(layer, []))
            for name in (n for n in bare if layer_of(n) == layer):
                try:
                    scale = known.scale(converted[name])
                except ValueError as error:
                    problems.append(f"{name} {list(converted[name].shape)}: {error}")
                    continue
                if scale is not None:
                    converted[f"{module_of(name)}.scale"] = scale
            owners |= known.used
        if problems:
            raise WeightError(
                f"{source}: the model's conversion did something to FP8 weights that is not understood, "
                f"{listing('problem', problems, 8)}\n"
                "Expected were weights of which each row is a row of one weight of the same layer, or zeros. "
                'Have these as bfloat16 with fp8_rescale={"dequantize": [...]} and modules_to_not_convert left out'
            )
        moved = {short_name(module) for module in owners}
        for name in [n for n in converted if n.endswith(".scale")]:
            module = name.removesuffix(".scale")
            if f"{module}.weight" not in converted and short_name(module) in moved:
                del converted[name]
        if owners:
            log.info("%s: scales follow rows of %s", source, listing("weight", sorted(owners), 5))

    def _moved_without(self, converted: Mapping[str, Any]) -> list[str]:
        """What is wrong with weights that kept name and scale, but whose rows lie in another order now."""
        givens = {short_name(given.module): given for layer in self.layers.values() for given in layer}
        problems = []
        for name in [n for n in converted if n.endswith(".scale")]:
            given, scale = givens.get(short_name(name.removesuffix(".scale"))), converted[name]
            weight = converted.get(f"{name.removesuffix('.scale')}.weight")
            if given is None or not isinstance(weight, torch.Tensor) or weight.dtype != given.weight.dtype:
                continue
            if scale.numel() == 1 or weight.shape != given.weight.shape or scale.numel() != weight.shape[0]:
                continue
            if torch.equal(_sample(weight), given.sample):
                continue
            try:
                wanted = _Known([given]).scale(weight)
            except ValueError as error:
                problems.append(f"{name} {list(scale.shape)}: of its weight {error}")
                continue
            zero = (weight.view(torch.uint8) & 0x7F == 0).all(dim=1)  # any scale is right there
            if wanted is not None and not bool(((wanted.flatten() == scale.float().flatten()) | zero).all()):
                problems.append(f"{name} {list(scale.shape)}: its weight's rows were moved, it was not")
        return problems


class _Known:
    """Rows of one layer's weights by their bytes. ``used``: the modules whose rows were asked for."""

    def __init__(self, weights: list[Given]) -> None:
        self.one = all(given.scale.numel() == 1 for given in weights)
        self.used: set[str] = set()
        self.changed = [given.module for given in weights if not torch.equal(_sample(given.weight), given.sample)]
        self.rows: dict[bytes, tuple[float | None, str]] = {}  # no value: of two scales
        for module, weight, scale, _ in weights:
            values = scale.float().expand(weight.shape[0], 1).flatten().tolist()
            for row, value in zip(_rows(weight), values, strict=True):
                if self.rows.setdefault(row, (value, module))[0] != value:
                    self.rows[row] = (None, module)

    def scale(self, weight: torch.Tensor) -> torch.Tensor | None:
        """float32 [out, 1], or [1] where the weights of the layer have one each; None if no row is known.

        Raises:
            ValueError: some are not known, or have no one scale.
        """
        zeros = (weight.view(torch.uint8) & 0x7F == 0).all(dim=1).tolist()
        found = [(1.0, "") if zero else self.rows.get(row) for row, zero in zip(_rows(weight), zeros, strict=True)]
        modules = {row[1] for row in found if row} - {""}
        if not modules:
            return None
        if self.changed:
            raise ValueError(f"the conversion wrote into {self.changed[0]}")
        if None in found:
            raise ValueError(f"row {found.index(None)} is of no weight of this layer, others are of {sorted(modules)}")
        values = [row[0] for row in found if row]
        if None in values:
            raise ValueError(f"row {values.index(None)} is in two weights, with different scales")
        self.used |= modules
        if not self.one:
            return torch.tensor(values, dtype=torch.float32).unsqueeze(1)
        distinct = {value for value, zero in zip(values, zeros, strict=True) if not zero}
        if len(distinct) > 1:
            raise ValueError(
                f'its rows have {len(distinct)} scales, of which quantization_type="per_tensor_symmetric" takes one; '
                'set "per_channel_symmetric"'
            )
        return torch.tensor(list(distinct), dtype=torch.float32)


def _rows(weight: torch.Tensor) -> list[bytes]:
    raw, width = buffer(as_bytes(weight.contiguous())), weight.shape[1]
    return [bytes(raw[start : start + width]) for start in range(0, weight.numel(), width)]


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
