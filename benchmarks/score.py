"""How far weights are from what they should be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import neuron_fp8_loader

from . import layout
from .common import finite
from .sources import Weight

Converted = tuple[torch.Tensor, torch.Tensor]
"""float8_e4m3fn codes, and the scale of every weight (broadcasts)."""

_SAME = 1e-6  # relative: less is the rounding of a float32 scale


def rescaled(weight: Weight, method: str) -> Converted:
    """By this package, whatever the weight's largest code."""
    names = ("layer.weight", "layer.weight_scale")
    pair = dict(zip(names, (weight.codes, torch.ones(weight.codes.shape[0], 1)), strict=True))
    done = neuron_fp8_loader.rescale_state_dict(pair, method=method, always=True)
    return done[names[0]], weight.spread * done[names[1]][0]


def clamped(weight: Weight) -> Converted:
    """Codes above 240 become 240, the scale stays: what a saturating cast gives."""
    raw = weight.codes.view(torch.uint8)
    codes = torch.where((raw & 0x7F) > 0x77, (raw & 0x80) | 0x77, raw)
    return codes.view(torch.float8_e4m3fn), weight.spread


def unchanged(weight: Weight) -> Converted:
    """The checkpoint itself, read as e4m3fn."""
    return weight.codes, weight.spread


METHODS: dict[str, Callable[[Weight], Converted]] = {
    "checkpoint": unchanged,
    "half": lambda weight: rescaled(weight, "half"),
    "ratio": lambda weight: rescaled(weight, "ratio"),
    "clamp to 240": clamped,
}
"""Ways to fit +-240, and the checkpoint itself to compare with."""


def layouts() -> dict[str, Callable[[Weight], Converted]]:
    """Ways to take block scales to one scale a row."""

    def by(step: Callable[[torch.Tensor, torch.Tensor], Converted]) -> Callable[[Weight], Converted]:
        def convert(weight: Weight) -> Converted:
            codes, scale = step(weight.codes, weight.scale)
            return codes, scale.float().view(-1, 1)

        return convert

    found = {"checkpoint": unchanged, "block -> row, public scripts": by(layout.public_scripts)}
    if layout.has_layout():
        found["block -> row, neuron_fp8_loader"] = by(layout.ours)
    return found


def flushed(codes: torch.Tensor) -> torch.Tensor:
    """float32 values where a device takes subnormals for zero. Whether a Neuron device does is not known."""
    values = codes.float()
    return torch.where((codes.view(torch.uint8) & 0x7F) < 0x08, torch.zeros(()), values)


@dataclass
class Score:
    """Sums over weights; float64. Add them one by one, then ask for ``result``."""

    weights: int = 0
    changed: int = 0
    signal: float = 0.0
    noise: float = 0.0
    noise_flushed: float = 0.0
    original_signal: float = 0.0
    original_noise: float = 0.0
    original_noise_flushed: float = 0.0
    largest: float = 0.0
    largest_of_row: float = 0.0
    original_largest_of_row: float = 0.0

    def add(self, weight: Weight, converted: Converted) -> None:
        codes, scale = converted
        before = weight.codes.double() * weight.spread.double()
        after, low = codes.double() * scale.double(), flushed(codes).double() * scale.double()
        original = weight.original.double()
        error, there = (after - before).abs(), before != 0
        relative = error[there] / before[there].abs()
        row = before.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        self.weights += before.numel()
        self.changed += int((relative > _SAME).sum()) + int((after[~there] != 0).sum())
        self.signal += float(before.square().sum())
        self.noise += float(error[(error > _SAME * before.abs())].square().sum())
        self.noise_flushed += float((low - before).square().sum())
        self.original_signal += float(original.square().sum())
        self.original_noise += float((after - original).square().sum())
        self.original_noise_flushed += float((low - original).square().sum())
        self.largest = max(self.largest, float(relative.max()) if relative.numel() else 0.0)
        self.largest_of_row = max(self.largest_of_row, float((error / row).max()))
        from_original = (after - original).abs() / row
        self.original_largest_of_row = max(self.original_largest_of_row, float(from_original.max()))

    def result(self) -> dict[str, Any]:
        """Plain data: shares, decibels (None: infinite) and largest errors.

        ``largest_relative`` is relative to the weight itself: 1 where a subnormal code becomes zero.
        ``largest_of_row`` is relative to the row's largest weight: what an output can notice.
        """
        return {
            "weights": self.weights,
            "changed": self.changed / self.weights,
            "sqnr_db": _decibels(self.signal, self.noise),
            "sqnr_flushed_db": _decibels(self.signal, self.noise_flushed),
            "sqnr_original_db": _decibels(self.original_signal, self.original_noise),
            "sqnr_original_flushed_db": _decibels(self.original_signal, self.original_noise_flushed),
            "largest_relative": self.largest if self.largest > _SAME else 0.0,
            "largest_of_row": self.largest_of_row if self.largest_of_row > _SAME * 0.1 else 0.0,
            "original_largest_of_row": self.original_largest_of_row,
        }


def _decibels(signal: float, noise: float) -> float | None:
    return finite(10 * math.log10(signal / noise)) if noise and signal else None


def score(weights: list[Weight], methods: dict[str, Callable[[Weight], Converted]]) -> dict[str, dict[str, Any]]:
    """The result of every method over all ``weights``."""
    scores = {name: Score() for name in methods}
    for weight in weights:
        for name, convert in methods.items():
            scores[name].add(weight, convert(weight))
    return {name: one.result() for name, one in scores.items()}
