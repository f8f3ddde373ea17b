"""NxD's ModelBuilder v2: it has no checkpoint loader, so rescale the state dict before it is sharded.

Needs neuronx-distributed. Shards on the CPU, for nxd_model.set_weights() or nxd_model.initialize() on a Neuron host.

python examples/model_builder_v2.py CHECKPOINT OUTPUT [TP_DEGREE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from model_builder_v1 import model
from safetensors.torch import load_file

from neuron_fp8_loader import rescale_state_dict


def main(checkpoint: str, output: str, tp_degree: str = "2") -> None:
    from neuronx_distributed.trace.functions import shard_checkpoint
    from neuronx_distributed.trace.parallel_context import NxDParallelState
    from neuronx_distributed.utils.model_utils import init_on_device

    tensors = load_file(Path(checkpoint) / "model.safetensors")
    prefix = "model.layers.0.mlp.gate_proj."
    state_dict = {
        "gate_proj.weight": tensors[prefix + "weight"],
        "gate_proj.scale": tensors[prefix + "weight_scale"],
    }
    rescale_state_dict(state_dict, inplace=True)  # shard_checkpoint changes the dict too: nothing to keep apart
    tp = int(tp_degree)
    with (
        NxDParallelState(world_size=tp, tensor_model_parallel_size=tp),
        init_on_device(torch.device("meta"), force_custom_init_on_device=True),
    ):
        shard_checkpoint(state_dict, model(), serialize_path=output)


if __name__ == "__main__":
    if len(sys.argv) <= 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
