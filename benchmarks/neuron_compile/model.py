"""The model that every backend compiles, as a checkpoint on disk, and how its outputs are judged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import neuron_fp8_loader

from ..llama import LINEARS, Llama, Shape, prompt, random_llama

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """What is compiled: a checkpoint on disk, its tensors without and with the loader, and a prompt.

    Attributes:
        raw: as ``safetensors.torch.load_file`` gives them: e4m3fn up to 448.
        loaded: as ``neuron_fp8_loader.load_state_dict`` gives them.
        ids: int64 [1, tokens].
        dtype: what the model computes in.
        exact: has no code that halving rounds, so that with ``method="half"`` outputs must be equal, bit for bit.
    """

    directory: Path
    shape: Shape
    raw: Tensors
    loaded: Tensors
    ids: torch.Tensor
    dtype: torch.dtype
    method: str
    exact: bool

    @property
    def tokens(self) -> int:
        return int(self.ids.shape[1])

    def llama(self, tensors: Tensors, read: Any = None) -> Llama:
        return Llama(self.shape, tensors, self.tokens, self.dtype, read).eval()

    def reference(self) -> torch.Tensor:
        """Logits of the checkpoint read as e4m3fn, as a GPU does; float32 [tokens, vocabulary]."""
        with torch.no_grad():
            logits: torch.Tensor = self.llama(self.raw)(self.ids)
            return logits[0]


def make_case(
    directory: Path,
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    method: str = "half",
    exact: bool = True,
    seed: int = 0,
) -> Case:
    """Write an FP8 Llama checkpoint into ``directory`` and load it without and with the loader."""
    tensors = random_llama(shape, seed)
    for layer in range(shape.num_hidden_layers):
        for name in LINEARS:
            module = f"model.layers.{layer}.{name}"
            weight, scale = quantize(tensors[module + ".weight"], exact)
            tensors |= {module + ".weight": weight, module + ".weight_scale": scale}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=1), encoding="utf-8")
    raw = load_file(directory / "model.safetensors")
    loaded = neuron_fp8_loader.load_state_dict(directory, method=method, progress=False)
    return Case(directory, shape, raw, loaded, prompt(shape, tokens), dtype, method, exact)


def quantize(weight: torch.Tensor, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] as float8_e4m3fn, every row's largest value 448, with its float32 scale [out, 1].

    ``exact``: odd codes below 0x10, which have no half, become the even ones below them.
    """
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 448
    codes = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    if exact:
        codes = torch.where((codes & 0x7F) < 0x10, codes & 0xFE, codes)
    return codes.view(torch.float8_e4m3fn), scale


def judge(logits: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """What is wrong with float32 logits: counts of nan and inf, and the largest error against the reference's
    largest value (None where not all is finite)."""
    logits = logits.detach().float().reshape(reference.shape)
    finite = bool(torch.isfinite(logits).all())
    error = float((logits - reference).abs().max() / reference.abs().max()) if finite else None
    return {
        "outputs": logits.numel(),
        "nan": int(logits.isnan().sum()),
        "inf": int(logits.isinf().sum()),
        "finite": finite,
        "largest_error": error,
        "equal": finite and bool(torch.equal(logits, reference)),
        "same_top_1": float((logits.argmax(-1) == reference.argmax(-1)).float().mean()) if finite else None,
    }
