"""What each process of ``test_dcp`` does; a module of its own, which imports little."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support import blob
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, zeros
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from neuron_fp8_loader import load_state_dict
from neuron_fp8_loader.integrations.dcp import NeuronStorageReader

OPTIONS: tuple[dict, ...] = ({}, {"layout": "per_channel"}, {"dequantize": ["block", "experts"]})


def each_rank(rank: int, ranks: int, checkpoint: Path, rendezvous: str) -> None:
    """Every way to shard, with every option, against this rank's part of the whole dict."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    lines: list[list[Placement]] = [[Shard(0)], [Shard(1)], [Shard(2)], [Replicate()]]
    ways = [(init_device_mesh("cpu", (ranks,)), placements) for placements in lines]
    if ranks == 4:
        square = init_device_mesh("cpu", (2, 2))
        grids: list[list[Placement]] = [[Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(0), Shard(0)]]
        ways += [(square, placements) for placements in grids]
    for options in OPTIONS:
        whole = load_state_dict(checkpoint, always=True, **options)
        for mesh, placements in ways:
            state = {}
            for name, tensor in whole.items():
                fit = [p if not isinstance(p, Shard) or p.dim < tensor.dim() else Replicate() for p in placements]
                state[name] = zeros(*tensor.shape, dtype=tensor.dtype, device_mesh=mesh, placements=fit)
            read = bytes_read(
                lambda s=state, o=options: dcp.load(s, storage_reader=NeuronStorageReader(checkpoint, **o))
            )
            for name, tensor in whole.items():
                assert blob(state[name].to_local()) == blob(own_part(tensor, state[name])), (name, options, placements)
            if placements == [Shard(0)] and not options:
                total = sum(t.numel() * t.element_size() for t in whole.values())
                assert read <= total / ranks * 1.1, (read, total)  # uneven: ceil(5 / ranks) experts
    dist.destroy_process_group()


def own_part(tensor: torch.Tensor, parameter: DTensor) -> torch.Tensor:
    """The part of a whole tensor that a DTensor of its shape has on this rank."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, parameter.device_mesh, parameter.placements)
    part = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        part = part.narrow(dim, start if length else 0, length)
    return part


def bytes_read(action) -> int:
    """How many bytes ``action`` reads with preadv."""
    read, preadv = 0, os.preadv

    def counted(*args):
        nonlocal read
        got = preadv(*args)
        read += got
        return got

    os.preadv = counted
    try:
        action()
    finally:
        os.preadv = preadv
    return read
