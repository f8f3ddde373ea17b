"""Expert parallelism on the real NxD Inference. In a process of its own: NxD keeps the process groups that it made."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integrations.real_moe import HALVED, REQUANTIZED, TYPES, Ranks, check, checkpoint, shards

DEGREES = {"moe_tp_degree": 2, "moe_ep_degree": 2, "batch_size": 2}


def twins_of(plain: Path) -> Ranks:
    return shards("qwen3_moe", plain, 4, quantized=False, torch_dtype="float32", fp8_rescale=False, **DEGREES)


@pytest.mark.parametrize(("form", "kind"), [("channel", "expert_wise"), ("block", "blockwise")])
def test_each_rank_has_the_scales_of_its_own_experts(form: str, kind: str) -> None:
    fp8, plain = checkpoint("qwen3_moe", form)
    ranks = shards("qwen3_moe", fp8, 4, **TYPES[kind], **DEGREES)
    check(ranks, twins_of(plain), experts=HALVED, others=HALVED if form == "channel" else REQUANTIZED)
    name = "layers.0.mlp.expert_mlps.mlp_op.down_proj.scale"
    assert all(rank[name].shape[0] == 2 for rank in ranks)
    assert not (ranks[0][name] == ranks[2][name]).all()


def test_each_rank_has_the_one_scale_of_all_experts() -> None:
    fp8, plain = checkpoint("qwen3_moe", "channel")
    ranks = shards("qwen3_moe", fp8, 4, **TYPES["per_channel"], **DEGREES)
    check(ranks, twins_of(plain), experts=20, others=HALVED)
    assert ranks[0]["layers.0.mlp.expert_mlps.mlp_op.down_proj.scale"].shape == (1, 1, 256)
