"""NxD's ModelBuilder with a checkpoint loader of one's own: wrap it, and what it returns is Neuron-ready.

Needs neuronx-distributed. Shards on the CPU; on a Neuron host go on with builder.trace() and nxd_model.initialize().

python examples/model_builder_v1.py CHECKPOINT OUTPUT [TP_DEGREE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from neuron_fp8_loader import wrap_checkpoint_loader


def model() -> torch.nn.Module:
    """A model with one quantized layer, the first gate_proj of the example checkpoint."""
    from neuronx_distributed.quantization.quantization_layers import QuantizedColumnParallel

    layer = QuantizedColumnParallel(
        input_size=256,
        output_size=448,
        bias=False,
        gather_output=False,
        dtype=torch.bfloat16,
        quantized_dtype=torch.float8_e4m3fn,
        quantization_type="per_channel_symmetric",
        quantization_per_channel_axis=0,
    )
    return torch.nn.ModuleDict({"gate_proj": layer})


def main(checkpoint: str, output: str, tp_degree: str = "2") -> None:
    from neuronx_distributed.trace.model_builder import BaseModelInstance, ModelBuilder

    def load() -> dict[str, torch.Tensor]:
        tensors = load_file(Path(checkpoint) / "model.safetensors")
        prefix = "model.layers.0.mlp.gate_proj."
        return {"gate_proj.weight": tensors[prefix + "weight"], "gate_proj.scale": tensors[prefix + "weight_scale"]}

    builder = ModelBuilder(router=None, tp_degree=int(tp_degree), checkpoint_loader=wrap_checkpoint_loader(load))
    builder.add("model", BaseModelInstance(model, {}), [(torch.zeros(1, 256),)])
    builder.shard_checkpoint(serialize_path=output)


if __name__ == "__main__":
    if len(sys.argv) <= 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
