"""Expert parallelism on the real NxD Inference. In a process of its own: NxD keeps the process groups that it made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import run
from tests.integrations import real_config
from tests.integrations.at_hand import AT_HAND, Checkpoint
from tests.integrations.contributed import there
from tests.integrations.moe_matrix import ROWS
from tests.integrations.real_config import Row, at_hand, check_row, has_blocks, pasted
from tests.integrations.real_moe import HALVED, REQUANTIZED, TYPES, Ranks, check, checkpoint, shards

DEGREES = {"moe_tp_degree": 2, "moe_ep_degree": 2, "batch_size": 2}


@pytest.fixture(autouse=True)
def _own_groups() -> Iterator[None]:
    """Each test its own degrees: NxD makes the groups of experts once."""
    from neuronx_distributed.modules.moe import moe_process_group

    moe_process_group.destroy_moe_model_parallel()
    yield
    moe_process_group.destroy_moe_model_parallel()


def twin_of(family: str, plain: Path, **degrees: Any) -> Ranks:
    return shards(family, plain, 4, quantized=False, torch_dtype="float32", fp8_rescale=False, **degrees)


@pytest.mark.parametrize(("form", "kind"), [("channel", "expert_wise"), ("block", "blockwise")])
def test_each_rank_has_the_scales_of_its_own_experts(form: str, kind: str) -> None:
    fp8, plain = checkpoint("qwen3_moe", form)
    ranks = shards("qwen3_moe", fp8, 4, **TYPES[kind], **DEGREES)
    check(
        ranks,
        twin_of("qwen3_moe", plain, **DEGREES),
        experts=HALVED,
        others=HALVED if form == "channel" else REQUANTIZED,
    )
    name = "layers.0.mlp.expert_mlps.mlp_op.down_proj.scale"
    assert all(rank[name].shape[0] == 2 for rank in ranks)
    assert not (ranks[0][name] == ranks[2][name]).all()


def test_each_rank_has_the_one_scale_of_all_experts() -> None:
    fp8, plain = checkpoint("qwen3_moe", "channel")
    ranks = shards("qwen3_moe", fp8, 4, **TYPES["per_channel"], **DEGREES)
    check(ranks, twin_of("qwen3_moe", plain, **DEGREES), experts=20, others=HALVED)
    assert ranks[0]["layers.0.mlp.expert_mlps.mlp_op.down_proj.scale"].shape == (1, 1, 256)


IGNORED = ("mixtral", "mixtral_contrib", "dbrx")
KINDS = [(row, kind) for row in ROWS for kind in ("", "blockwise") if there(row[0]) and (not kind or has_blocks(row))]


@pytest.mark.parametrize(
    ("row", "kind"), [(row, kind) for row, kind in KINDS if row[0] not in IGNORED and there(row[0])]
)
def test_what_config_prints_loads(row: Row, kind: str) -> None:
    path, plain = checkpoint(*row)
    args = ("--tp", 4, "--moe-ep", 2, *(("--experts", kind) if kind else ()))
    given = pasted(path, *args)
    assert (given["moe_tp_degree"], given["moe_ep_degree"]) == (2, 2)
    degrees = {name: given[name] for name in ("moe_tp_degree", "moe_ep_degree", "batch_size")}
    ranks = shards(row[0], path, 4, **given)
    check_row(row, kind, ranks, twin_of(row[0], plain, **degrees))
    assert experts_here(ranks) == {2}


def experts_here(ranks: Ranks) -> set[int]:
    return {rank[name].shape[0] for rank in ranks for name in rank if name.endswith(".mlp_op.down_proj.weight")}


@pytest.mark.parametrize("family", IGNORED)
def test_degrees_that_a_model_ignores_are_refused(family: str) -> None:
    path, plain = checkpoint(family, "tensor")
    refused = run("config", path, "--tp", 4, "--moe-ep", 2)
    assert refused.exit_code != 0
    assert "shares each expert among all ranks" in refused.stderr
    assert experts_here(twin_of(family, plain, **DEGREES)) == {4}


@pytest.mark.parametrize("moe_tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (found, kind)
        for found in AT_HAND
        for kind in ("", "blockwise")
        if "moe" in found.family and (found.requantized or not kind)
    ],
    ids=str,
)
def test_what_config_prints_of_real_checkpoints(found: Checkpoint, kind: str, moe_tp: int) -> None:
    path, plain = at_hand(found)
    given = pasted(path, "--tp", 4, "--moe-tp", moe_tp, *(("--experts", kind) if kind else ()))
    degrees = {name: given[name] for name in ("moe_tp_degree", "moe_ep_degree", "batch_size") if name in given}
    assert degrees["moe_ep_degree"] == 4 // moe_tp
    ranks = shards(found.family, path, 4, **given)
    others = REQUANTIZED if found.requantized else HALVED
    real_config.check(
        ranks, twin_of(found.family, plain, **degrees), experts=HALVED if kind else others, others=others
    )
    assert experts_here(ranks) == {moe_tp}  # of four
