"""Weights to judge fidelity on: random ones of several distributions, and real checkpoints beside their originals."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import neuron_fp8_loader
from neuron_fp8_loader import Fp8LoaderError
from neuron_fp8_loader.codes.granularity import Granularity

from .layout import BLOCK, spread

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Weight:
    """One FP8 weight with what is known of it.

    Attributes:
        codes: float8_e4m3fn [out, in].
        scale: float32, as the checkpoint has it.
        spread: float32, the scale of every weight; broadcasts to [out, in].
        original: what was quantized, bfloat16 [out, in].
        block: rows and columns of a block, where it has block scales.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    spread: torch.Tensor
    original: torch.Tensor
    block: tuple[int, int] | None = None


def shared_checkpoints() -> Path:
    """Where real checkpoints and their originals (``_base``) are looked for by default."""
    return Path(os.environ.get("NEURON_FP8_SHARED", ROOT.parent / "shared")) / "checkpoints"


def distributions(side: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """bfloat16 [side, side] of each distribution."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(side, side, generator=generator)

    def uniform() -> torch.Tensor:
        return torch.rand(side, side, generator=generator)

    outliers = normal()
    outliers[uniform() < 1e-3] *= 20
    chi = torch.stack([normal().square() for _ in range(4)]).sum(0)
    columns = torch.exp(normal()[:1])  # some input channels matter more, as after a norm with learnt weights
    found = {
        "normal": normal(),
        "Student t(4)": normal() / (chi / 4).sqrt(),
        "Laplace": (uniform() - uniform().clamp_min(1e-9)).sign() * -torch.log(uniform().clamp_min(1e-9)),
        "uniform": uniform() * 2 - 1,
        "normal, 0.1 % x 20": outliers,
        "normal, columns apart": normal() * columns,
    }
    return {name: (values * 0.02).bfloat16() for name, values in found.items()}


def per_row(original: torch.Tensor) -> Weight:
    """Quantized with one scale a row, largest value 448."""
    scale = original.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 448
    codes = (original.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return Weight(codes, scale, scale, original)


def per_block(original: torch.Tensor, powers_of_two: bool = False) -> Weight:
    """Quantized with one scale a 128 x 128 block, largest value 448; or the power of two from there up."""
    rows, columns = original.shape
    padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
    padded[:rows, :columns] = original.float().abs()
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = blocks.amax(dim=(1, 3)).clamp_min(1e-12) / 448
    if powers_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    whole = spread(scale, (rows, columns))
    codes = (original.float() / whole).clamp(-448, 448).to(torch.float8_e4m3fn)
    return Weight(codes, scale, whole, original, (BLOCK, BLOCK))


def real(directory: Path) -> Iterator[tuple[str, list[Weight]]]:
    """Each checkpoint in ``directory`` whose original is among ``directory/_base/*``, with the weights of both."""
    bases = [load_file(file) for file in sorted(directory.glob("_base/*/model.safetensors"))]
    for path in sorted(directory.iterdir()) if bases else ():
        if path.name.startswith("_") or not path.is_dir():
            continue
        try:
            weights = max((beside(path, base) for base in bases), key=len)
        except Fp8LoaderError:
            continue  # not a checkpoint that loads; that is the tests' business
        if weights:
            yield path.name, weights


def beside(path: Path, base: dict[str, torch.Tensor]) -> list[Weight]:
    """The FP8 weights of a checkpoint whose originals are in ``base`` under the same name and shape."""
    plan = neuron_fp8_loader.plan_checkpoint(path)
    tensors: dict[str, torch.Tensor] = {}
    for file in {info.file for info in plan.tensors.values() if info.file}:
        tensors |= load_file(file)
    found = []
    for pair in plan.pairs:
        codes, original = tensors[pair.weight], base.get(_original_name(pair.weight))
        if original is None or original.shape != codes.shape or codes.ndim != 2:
            continue
        scale = plain(tensors[pair.scale])
        whole = _whole(scale, (codes.shape[0], codes.shape[1]), pair.granularity)
        # made-up or transposed scales would be judged as noise
        if whole is not None and _plausible(codes.float() * whole, original.float()):
            block = pair.granularity.block
            grid = scale.reshape(_grid(codes.shape, block)) if block else scale
            found.append(Weight(codes, grid, whole, original, block))
    return found


def _original_name(weight: str) -> str:
    # torchao and optimum-quanto flatten a tensor subclass into parts
    return weight.replace("._weight_qdata", ".weight").removesuffix("._data")


def plain(scale: torch.Tensor) -> torch.Tensor:
    """A scale as float32; uint8 beside an FP8 weight holds e8m0, 2^(byte - 127)."""
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def _whole(scale: torch.Tensor, shape: tuple[int, int], covers: Granularity) -> torch.Tensor | None:
    if covers.kind == "tensor":
        return scale.reshape(1, 1)
    if covers.kind == "row":
        return scale.reshape(-1, 1)
    if covers.kind == "column":
        return scale.reshape(1, -1)
    if covers.kind == "block" and covers.block:
        return spread(scale.reshape(_grid(shape, covers.block)), shape, covers.block)
    return None


def _grid(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _plausible(values: torch.Tensor, original: torch.Tensor) -> bool:
    return float((values - original).norm() / original.norm()) < 0.2
