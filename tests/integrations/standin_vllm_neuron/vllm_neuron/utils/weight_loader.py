"""How a parameter is made of slices of the checkpoint."""

from dataclasses import dataclass

import torch


@dataclass
class SafetensorsWeightLoader:
    transform: object = None

    def load(self, slices, rank):
        result = self.transform(slices, rank) if self.transform else slices[0][:]
        return result.contiguous()


def set_weight_loader(param, loader):
    param.weight_loader = loader


def get_weight_loader(param):
    return getattr(param, "weight_loader", SafetensorsWeightLoader())


def _padded(tensor, dim, size):
    missing = size - tensor.shape[dim]
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, torch.zeros(shape, dtype=tensor.dtype)], dim)


def _part(lazy, dim, start, size):
    index = [slice(None)] * len(lazy.get_shape())
    index[dim] = slice(start, start + size)
    return lazy[tuple(index)]


def sharding_weight_loader(shard_dim, shard_size, num_shards, is_storage_transposed=False, pad_shard=False):
    def transform(slices, rank):
        dim = 1 - shard_dim if is_storage_transposed else shard_dim
        part = _part(slices[0], dim, rank % num_shards * shard_size, shard_size)
        part = part.T if is_storage_transposed else part
        return _padded(part, shard_dim, shard_size) if pad_shard else part

    return SafetensorsWeightLoader(transform)


def fused_qkv_weight_loader(
    q_size, kv_size, shard_dim, num_shards, is_storage_transposed=False, num_kv_replicas=1,
    padded_hidden_size=None, unpadded_hidden_size=None,
):  # fmt: skip
    def transform(slices, rank):
        dim = 1 - shard_dim if is_storage_transposed else shard_dim
        at = rank % num_shards
        parts = [
            _part(lazy, dim, number * size, size)
            for lazy, size, number in zip(
                slices, (q_size, kv_size, kv_size), (at, *[at // num_kv_replicas] * 2), strict=True
            )
        ]
        fused = torch.cat([part.T if is_storage_transposed else part for part in parts], shard_dim)
        return _padded(fused, 0, padded_hidden_size) if padded_hidden_size else fused

    return SafetensorsWeightLoader(transform)


def stacked_loader(shard_dim, shard_size):
    """One matrix an expert, each sharded: [experts, ...]."""

    def transform(slices, rank):
        return torch.stack([_part(lazy, shard_dim, rank * shard_size, shard_size) for lazy in slices])

    return SafetensorsWeightLoader(transform)
