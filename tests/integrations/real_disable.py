"""``disable()`` on the real NxD and NxD Inference: whatever the flag has replaced is what it was.

Run by test_real_sources.py, in a process in which nothing has called ``enable()`` before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import neuron_fp8_loader
from tests.integrations import moe_checkpoints
from tests.integrations.contributed import application
from tests.integrations.fused_app import fused
from tests.integrations.snapshot import changed, snapshot
from tests.support import SHARED

sys.path.insert(0, str(SHARED.parent / "nxdi_cpu"))
import harness as H

H.install_stubs()
H.quiet()

PACKAGES = ("neuronx_distributed_inference", "neuronx_distributed", "src")
EXPERT_WISE = {"quantization_type": "expert_wise_per_channel_symmetric"}
BLOCKS = {
    "quantization_type": "blockwise_symmetric",
    "quantization_block_axis": [1, 2],
    "quantization_block_size": [128, 128],
}
LOADS: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen3_moe", "block", BLOCKS),
    ("mixtral", "channel", EXPERT_WISE),
    ("mixtral", "tensor", {"quantization_type": "per_channel_symmetric"}),
    ("dbrx", "tensor", EXPERT_WISE),  # Wqkv: scales that follow rows
    ("qwen3_5_moe", "block", EXPERT_WISE),
    ("deepseek_v3", "block", BLOCKS),
]


def loads(tmp_path: Path, *, flag: bool) -> None:
    """A dense model and mixtures of experts: under the flag, or else their twins without quantization."""
    import families

    H.make_tiny_checkpoint(tmp_path / "dense", flavour="channel")
    for n, (family, form, given) in enumerate(LOADS):
        fp8, plain = moe_checkpoints.write(tmp_path / str(n), family, form)
        more: dict[str, Any] = {}
        if family in ("qwen3_5_moe", "deepseek_v3"):
            more = {"cls": application(family), "config_kwargs": json.loads((fp8 / "config.json").read_text())}
        given = {"fp8_rescale": True, **given} if flag else {"quantized": False, "torch_dtype": "float32"}
        families.shards(family, fp8 if flag else plain, 2, **given, **more)
    app, _ = fused(tmp_path / "fused", **({} if flag else {"fp8_rescale": False}))
    app.checkpoint_loader_fn()
    for tp in (2, 1):  # the last degree stays in NxD's state
        families.shards("llama", tmp_path / "dense", tp, fp8_rescale=flag, modules_to_not_convert=["lm_head"])


def test_disable_puts_back_every_object(tmp_path: Path) -> None:
    loads(tmp_path / "first", flag=False)  # what is imported late, and kept
    before = snapshot(*PACKAGES)
    loads(tmp_path / "without", flag=False)
    own = changed(before, snapshot(*PACKAGES))  # what NxD leaves behind by itself
    neuron_fp8_loader.enable()
    replaced = changed(before, snapshot(*PACKAGES)) - own
    assert {"neuronx_distributed.trace.trace", f"{PACKAGES[0]}.modules.checkpoint"} <= {
        p.rpartition(".")[0] for p in replaced
    }
    loads(tmp_path / "with", flag=True)
    assert changed(before, snapshot(*PACKAGES)) >= replaced
    neuron_fp8_loader.disable()
    left = changed(before, snapshot(*PACKAGES))
    assert left <= own
    assert not left & replaced
    assert len(own) < 10
