"""A torch module of one's own: load_state_dict takes a GPU's FP8 state dict and loads it Neuron-ready.

python examples/plain_torch.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from neuron_fp8_loader import neuron_view, rescale_on_load


class Fp8Linear(torch.nn.Module):
    """float8_e4m3fn weight [out, in] and one scale a row [out, 1], under the names of the checkpoint."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        weight = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.weight_scale = torch.nn.Parameter(torch.empty(rows, 1, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # as a Neuron device computes it, which reads the weight's bytes in its own way
        return torch.nn.functional.linear(x, neuron_view(self.weight)) * self.weight_scale.float().T


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = Fp8Linear(448, 256), Fp8Linear(448, 256), Fp8Linear(256, 448)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def main() -> None:
    prefix = "model.layers.0.mlp."
    tensors = load_file(Path(__file__).parent / "tiny-llama-fp8" / "model.safetensors")
    state_dict = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    mlp, x = Mlp(), torch.ones(1, 256)

    mlp.load_state_dict(state_dict)
    print(f"as it is:        {mlp(x).isnan().sum()} of 256 outputs are NaN")
    with rescale_on_load(mlp):
        mlp.load_state_dict(state_dict)
    print(f"rescale_on_load: {mlp(x).isnan().sum()} of 256 outputs are NaN")


if __name__ == "__main__":
    main()
