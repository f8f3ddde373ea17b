"""What an FP8 byte means on a GPU and on Neuron, and the tables that take one to the other.

``float8_e4m3fn`` (OCP, GPUs) and FP8_EXP4 (IEEE e4m3, trn1/inf2/trn2) share sign, exponent bias 7 and
mantissa, so a byte has the same value in both up to magnitude code 0x77 (240). Above that e4m3fn goes on to
448 (0x7e), FP8_EXP4 has inf (0x78) and nan. Sources: OCP 8-bit Floating Point Specification (OFP8) 1.0;
the Neuron SDK's data type page and ``README_rescaling_fp8_for_neuron.md`` in neuronx-distributed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..errors import OptionError

E4M3FN = torch.float8_e4m3fn
E4M3FNUZ = torch.float8_e4m3fnuz

LARGEST_FIT = 0x77  # 240, the largest magnitude code that Neuron reads as a finite value
NAN_CODE = 0x7F
GPU_MAX, NEURON_MAX = 448.0, 240.0


def _all_bytes() -> torch.Tensor:
    # device named: this runs at import, perhaps inside somebody's `torch.device("meta")`
    return torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8)


def _neuron_values() -> torch.Tensor:
    values = _all_bytes().view(E4M3FN).float()
    code = _all_bytes() & 0x7F
    sign = torch.ones(256, device="cpu").copysign(values)
    values[code == 0x78] = sign[code == 0x78] * torch.inf
    values[code > 0x78] = torch.nan
    return values


NEURON_VALUES: torch.Tensor = _neuron_values()
"""float32 [256]: the value of each byte as trn1, inf2 and trn2 read it."""


@dataclass(frozen=True)
class Table:
    """One translation of all 256 codes, and the factor that a scale takes to make up for it.

    Attributes:
        name: ``"half"``, ``"ratio"`` or ``"fnuz"``.
        scale_factor: what the weight's scale is multiplied by.
        out: 256 bytes, the new byte of each byte.
        lossy: 256 flags: does ``out * scale_factor`` differ from the value before?
        symmetric: 128 bytes for the native kernel, magnitude code -> new magnitude code with bit 7 = lossy;
            empty where the sign bit is not simply carried over.
        source: the dtype whose codes it translates; float8_e4m3fnuz has its nan elsewhere.
    """

    name: str
    scale_factor: float
    out: bytes
    lossy: bytes
    symmetric: bytes = field(repr=False)
    source: torch.dtype = E4M3FN

    @cached_property
    def above(self) -> bytes:
        """256 flags: is the value before a number beyond +-240?"""
        return bytes((self._before().abs() > NEURON_MAX).tolist())

    @cached_property
    def nan(self) -> bytes:
        """256 flags: is the value before NaN?"""
        return bytes(self._before().isnan().tolist())

    def _before(self) -> torch.Tensor:
        return _all_bytes().view(self.source).double()


def _table(name: str, factor: float, source: torch.dtype, translated: torch.Tensor) -> Table:
    out = translated.view(torch.uint8)
    before = _all_bytes().view(source).double()
    # the sign of a nan that went through arithmetic depends on the host's vector unit
    out[before.isnan()] = _all_bytes()[before.isnan()] if source == E4M3FN else NAN_CODE
    after = out.view(E4M3FN).double() * factor
    lossy = (before != after) & ~before.isnan()
    signs_kept = bool(torch.equal(out[:128] | 0x80, out[128:])) and bool((out[:128] < 0x80).all())
    symmetric = bytes((out[:128] | (lossy[:128].to(torch.uint8) << 7)).tolist()) if signs_kept else b""
    return Table(name, factor, bytes(out.tolist()), bytes(lossy.tolist()), symmetric, source)


def _half() -> Table:
    codes = _all_bytes().view(E4M3FN)
    return _table("half", 2.0, E4M3FN, (codes.float() / 2).to(E4M3FN))


def _ratio() -> Table:
    # as the recipe in Neuron's README computes it: a bf16 division, then the cast
    codes = _all_bytes().view(E4M3FN)
    rescaled = (codes.bfloat16() / (GPU_MAX / NEURON_MAX)).to(E4M3FN)
    # the sign that a NaN has after bf16 arithmetic differs between CPUs: NaN bytes stay themselves
    out = torch.where((_all_bytes() & 0x7F) == NAN_CODE, _all_bytes(), rescaled.view(torch.uint8))
    return _table("ratio", GPU_MAX / NEURON_MAX, E4M3FN, out.view(E4M3FN))


def _fnuz() -> Table:
    # float8_e4m3fnuz (AMD): bias 8, at most 240, its one nan is 0x80. Same value in FP8_EXP4, scale unchanged.
    return _table("fnuz", 1.0, E4M3FNUZ, _all_bytes().view(E4M3FNUZ).float().to(E4M3FN))


HALF, RATIO, FNUZ = _half(), _ratio(), _fnuz()
METHODS: dict[str, Table] = {table.name: table for table in (HALF, RATIO)}
OTHER_FORMATS: dict[str, Table] = {"float8_e4m3fnuz": FNUZ}
"""FP8 dtypes of weights that are not e4m3fn, and the table that brings each into FP8_EXP4."""


def neuron_view(weight: torch.Tensor) -> torch.Tensor:
    """The values that a trn1, inf2 or trn2 device reads from the bytes of an FP8 weight.

    Args:
        weight: ``float8_e4m3fn`` (or uint8, taken as its bytes) of any shape.

    Returns:
        float32 of the same shape: equal to ``weight.float()`` up to +-240; +-inf for code 0x78 (256), nan above.

    Raises:
        OptionError: another dtype, or no tensor.
    """
    if not isinstance(weight, torch.Tensor):
        raise OptionError(f"weight={weight!r}: expected a tensor of float8_e4m3fn, not a {type(weight).__name__}")
    if weight.dtype not in (E4M3FN, torch.uint8):
        raise OptionError(f"neuron_view takes float8_e4m3fn (or uint8 bytes), not {weight.dtype}")
    codes = weight.detach().view(torch.uint8).cpu()
    return NEURON_VALUES[codes.int()]
