"""What ``_native/requantize.c`` does, by torch, to the same bits: where no compiler was at hand.

Everything is done in rows few enough for ``grain``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..host.grain import GRAIN, entries
from .formats import E4M3FN, NAN_CODE, NEURON_MAX

_LANES, _RUN = 8, 4096  # single precision sums: of every eighth code, over this many codes
_NEGLIGIBLE = 2.0**-40  # ratios below it round every code to 0
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def _values() -> torch.Tensor:
    codes = torch.arange(128, dtype=torch.int32, device="cpu").to(torch.uint8).view(E4M3FN)
    return codes.double().nan_to_num(0.0)


_VALUES = _values()


def _parts(rows: int, columns: int, across: int) -> Iterator[slice]:
    step = max(1, GRAIN // max(1, columns, 128 * across))  # a table of 128 entries for each run
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _by_runs(src: torch.Tensor, width: int, to: int = 1) -> torch.Tensor:
    """Finite magnitude codes [rows, runs, width], filled up with zeros; the width to a multiple of ``to``."""
    codes = src & 0x7F
    codes = torch.where(codes == NAN_CODE, 0, codes)
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % width)).view(len(codes), -1, width)
    return torch.nn.functional.pad(padded, (0, -width % to))


def largest_codes(src: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``kernel.run_max``."""
    rows, columns = src.shape
    height, width = block
    across = -(-columns // width)
    runs = torch.cat([_by_runs(src[part], width).amax(dim=2) for part in _parts(rows, columns, across)])
    return runs, torch.stack([part.amax(dim=0) for part in runs.split(height)])


def choose(
    src: torch.Tensor,
    scales: torch.Tensor,
    mantissas: torch.Tensor,
    runs: torch.Tensor,
    row_scales: torch.Tensor,
    block: tuple[int, int],
) -> tuple[float, float]:
    """Write ``row_scales``; gives the sums of squares of the values and of their changes."""
    signal = noise = 0.0
    rows, columns = src.shape
    for part in _parts(rows, columns, runs.shape[1]):
        which = torch.arange(part.start, part.stop, device="cpu") // block[0]
        before, top = scales.index_select(0, which), runs[part]
        largest = (entries(_VALUES, top) * before).amax(dim=1)
        candidates = _candidates(largest, mantissas.index_select(0, which))
        squares, changes, exact = _measured(_by_runs(src[part], block[1], _LANES), before, top, candidates)
        best = _best(changes, exact, squares)
        chosen = candidates.gather(1, best[:, None]).squeeze(1)
        any_scale = before.amax(dim=1).float()
        row_scales[part] = torch.where(largest > 0, chosen, torch.where(any_scale > 0, any_scale, 1.0))
        signal += float(squares.sum())
        noise += float(changes.gather(1, best[:, None]).sum())
    return signal, noise


def _candidates(largest: torch.Tensor, mantissas: torch.Tensor) -> torch.Tensor:
    """float32 [rows, 2], as listed in ``codes.requantize``."""
    common, public = _fitting(mantissas, largest), (largest / NEURON_MAX).float()
    return torch.stack([torch.where(public >= _SMALLEST_NORMAL, public, common), common], dim=1)


def _fitting(mantissas: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The smallest mantissa x 2^exponent that takes ``largest`` to 240 or less: float32 [rows]."""
    exponent = torch.frexp(largest / (NEURON_MAX * mantissas)).exponent
    # frexp gives [0.5, 1) x 2^exponent: one exponent less will do for exactly 0.5
    less = largest <= NEURON_MAX * (mantissas * _power_of_two(exponent - 1))
    return (mantissas * _power_of_two(torch.where(less, exponent - 1, exponent).clamp(min=-126))).float()


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    return ((exponent.long().clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def _measured(
    codes: torch.Tensor, before: torch.Tensor, top: torch.Tensor, candidates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of squares, float64: of the values [rows] and of the changes [rows, 2]; and which were measured exactly."""
    ratios = before[:, :, None] / candidates.double()[:, None, :]
    good, empty = ratios >= _NEGLIGIBLE, (top == 0)[:, :, None]
    exact = (((torch.frexp(ratios).mantissa == 0.5) & good) | empty).all(dim=1)
    factors = torch.where(good & ~empty, ratios, 0.0).float()
    values = entries(_VALUES.float(), codes)
    squares = _sums(values * values).cumsum(dim=2)[:, :, -1] * before * before
    changes = []
    for k in range(candidates.shape[1]):
        x = values * factors[:, :, k, None]
        # the last bit of 2^20 times x's power of two, or of 2^-6, is the last bit of the nearest code
        bits = (x.clamp(min=2.0**-6).view(torch.int32) & 0x7F800000) + (20 << 23)
        large = bits.view(torch.float32)
        change = x - ((x + large) - large)
        total = _sums(change * change).flatten(1).cumsum(dim=1)[:, -1]
        scale = candidates[:, k].double()
        changes.append(total * scale * scale)
    return squares.cumsum(dim=1)[:, -1], torch.stack(changes, dim=1), exact


def _sums(squares: torch.Tensor) -> torch.Tensor:
    """The sums of eight lanes over each 4096 codes, in the order in which they are to be added up: float64."""
    rows, across = squares.shape[:2]
    out = []
    for part in squares.split(_RUN, dim=2):
        steps = part.reshape(rows, across, -1, _LANES)
        total = torch.zeros(rows, across, _LANES, dtype=torch.float32, device="cpu")
        for k in range(steps.shape[2]):
            total = total + steps[:, :, k]
        out.append(total)
    return torch.cat(out, dim=2).double()


def _best(noise: torch.Tensor, exact: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
    """As ``fp8_best`` in ``_native/requantize.c``, where it is explained."""
    slack = torch.where(exact, 0.0, 2.0**-22 * signal.sqrt()[:, None])
    least = (noise[:, 0].sqrt() * (1 - 2.0**-12) - slack[:, 0]).clamp(min=0)
    most = noise[:, 1].sqrt() * (1 + 2.0**-12) + slack[:, 1]
    return (most <= least).long()


def look_up(
    src: torch.Tensor, dst: torch.Tensor, scales: torch.Tensor, row_scales: torch.Tensor, block: tuple[int, int]
) -> None:
    """Write the codes nearest to ``src x scales / row_scales``, ties to even."""
    rows, columns = src.shape
    for part in _parts(rows, columns, scales.shape[1]):
        which = torch.arange(part.start, part.stop, device="cpu") // block[0]
        ratios = scales.index_select(0, which) / row_scales[part, None].double()
        ratios, table = torch.unique(ratios, return_inverse=True)
        tables = _codes_of(_VALUES * ratios[:, None])
        tables[:, NAN_CODE] = NAN_CODE
        # the index of an element's entry in all tables laid end to end
        spread = table.repeat_interleave(block[1], dim=1)[:, :columns]
        new = entries(tables.view(-1), spread * 128 + (src[part] & 0x7F))
        dst[part] = new | (src[part] & 0x80)


def _codes_of(values: torch.Tensor) -> torch.Tensor:
    """uint8: the nearest magnitude codes of values from 0 up, ties to even, no further than 240."""
    values = values.clamp(max=NEURON_MAX)
    # adding a power of two whose last bit is a code's last rounds to that bit, as searchsorted would tell; but that
    # starts torch's threads from 200 elements on
    exponent = (values.view(torch.int64) >> 52).clamp(min=1023 - 6)
    large = ((exponent + 52 - 3) << 52).view(torch.float64)
    return ((values + large) - large).float().to(E4M3FN).view(torch.uint8)
