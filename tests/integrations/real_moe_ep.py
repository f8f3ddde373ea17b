"""Expert parallelism on the real NxD Inference. In a process of its own: NxD keeps the process groups that it made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neuron_fp8_loader.tools.settings import settings_for
from tests.integrations.real_moe import HALVED, REQUANTIZED, TYPES, Ranks, check, checkpoint, copied, shards

DEGREES = {"moe_tp_degree": 2, "moe_ep_degree": 2, "batch_size": 2}


@pytest.fixture(autouse=True)
def _own_groups() -> Iterator[None]:
    """Each test its own degrees: NxD makes the groups of experts once."""
    from neuronx_distributed.modules.moe import moe_process_group

    moe_process_group.destroy_moe_model_parallel()
    yield
    moe_process_group.destroy_moe_model_parallel()


def twins_of(plain: Path, **given: Any) -> Ranks:
    given = given or DEGREES
    return shards("qwen3_moe", plain, 4, quantized=False, torch_dtype="float32", fp8_rescale=False, **given)


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


@pytest.mark.parametrize("moe_tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("name", "kind", "experts"),
    [
        ("ct_fp8_dynamic_moe", "expert_wise", HALVED),
        ("hf_fp8_block_moe_fused", "expert_wise", REQUANTIZED),
        ("hf_fp8_block_moe_fused", "blockwise", HALVED),  # at 2 and 4, a rank has 64 and 32 rows of a block of 128
    ],
)
def test_what_config_prints_loads(tmp_path: Path, name: str, kind: str, experts: float, moe_tp: int) -> None:
    fp8, plain = copied(tmp_path, name)
    given = settings_for(fp8, tp_degree=4, moe_tp_degree=moe_tp, experts=kind).neuron_config
    degrees = {name: given[name] for name in ("moe_tp_degree", "moe_ep_degree", "batch_size") if name in given}
    assert degrees["moe_ep_degree"] == 4 // moe_tp
    ranks = shards("qwen3_moe", fp8, 4, **{k: v for k, v in given.items() if k != "tp_degree"})
    others = HALVED if name.startswith("ct_") else REQUANTIZED
    check(ranks, twins_of(plain, **degrees), experts=experts, others=others)
    here = {rank["layers.0.mlp.expert_mlps.mlp_op.down_proj.weight"].shape[0] for rank in ranks}
    assert here == {moe_tp}  # of four experts
