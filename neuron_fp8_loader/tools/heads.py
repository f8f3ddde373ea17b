"""What NxD Inference does where a tensor parallel degree does not divide a model's heads, or the rows of its MLP.

The rules are those of its ``modules/attention/gqa.py`` (``determine_sharding_strategy``,
``get_shardable_head_counts``). What comes through was tried: ``ModelBuilder.shard_checkpoint`` of SDK 2.29 on a CPU,
for Llamas with FP8 scales per row, per tensor and per block, and in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from ..plan import Plan

_DEGREES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Heads:
    """The heads of a model's attention."""

    attention: int
    kv: int

    def padded(self, tp_degree: int) -> int:
        """Attention heads after padding."""
        return -(-self.attention // tp_degree) * tp_degree

    def is_sharded(self, tp_degree: int) -> bool:
        """Does NxD come through? Where neither number divides the other, it does not."""
        return self.attention == self.kv or self.kv % tp_degree == 0 or tp_degree % self.kv == 0

    def pads_scales(self, tp_degree: int) -> bool:
        """Are scales padded at the end with the heads? That fails for a scale of one value."""
        return self.attention == self.kv and self.attention % tp_degree != 0 and tp_degree % self.kv != 0

    def what_happens(self, tp_degree: int, source: str) -> str:
        """In words; "" where the heads divide.

        Raises:
            OptionError: NxD stops while it shards the weights; the text names degrees that it takes.
        """
        if not self.is_sharded(tp_degree):
            good = ", ".join(str(t) for t in _DEGREES if self.is_sharded(t))
            raise OptionError(
                f"tp_degree={tp_degree}: {source}: its {self.kv} KV heads (of {self.attention} attention heads) "
                "neither divide that nor are divided by it; NxD Inference then gives each attention head a KV head of "
                f"its own, and stops at the shapes that come of it. Expected a degree such as {good}"
            )
        done, padded = [], self.padded(tp_degree)
        if padded != self.attention:
            both = "attention and KV heads" if self.attention == self.kv else "attention heads"
            done.append(f"pads the {self.attention} {both} with zeros to {padded}")
        if self.attention != self.kv and self.kv % tp_degree:
            times = tp_degree // self.kv
            done.append(
                f"gives each of the {self.kv} KV heads to {times} ranks: the KV cache is {times} times as large in all"
            )
        return f"tp_degree={tp_degree}: NxD Inference {' and '.join(done)}" if done else ""


def heads_of(config: Mapping[str, Any]) -> Heads | None:
    """The heads as config.json has them; None where attention is of another kind, or it does not tell."""
    text = config.get("text_config")
    holder = text if isinstance(text, Mapping) else config
    heads = holder.get("num_attention_heads")
    kv_heads = holder.get("num_key_value_heads") or heads
    if any(holder.get(key) for key in ("kv_lora_rank", "swa_num_key_value_heads", "multi_query")):
        return None
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or min(heads, kv_heads) < 1:
        return None
    return Heads(heads, kv_heads)


_SHARED_ROWS = ("gate_proj", "up_proj", "lm_head")
_SHARED_COLUMNS = ("down_proj",)


def pads_mlp(plan: Plan, tp_degree: int) -> bool:
    """Does NxD pad an FP8 weight of an MLP or the head with zeros, and its scales as if they were as many?"""
    for pair in plan.pairs:
        shape, last = plan.tensors[pair.weight].shape, pair.module.rpartition(".")[2]
        axis = 0 if last in _SHARED_ROWS else 1 if last in _SHARED_COLUMNS else None
        if axis is not None and len(shape) == 2 and shape[axis] % tp_degree:
            return True
    return False
