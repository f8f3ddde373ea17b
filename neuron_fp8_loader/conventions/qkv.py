"""How families of models lay out queries, keys and values that they keep in one tensor: one line a family.

Only layouts in which they are interleaved are here: a split that takes such a tensor for [Q | K | V] gives heads that
look plausible and are wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FUSED = "qkv_proj"
"""What the module of such a weight is called."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_LONGEST = 1 << 24  # heads, or rows of a head; no model comes near


@dataclass(frozen=True)
class Interleaved:
    """The rows of one weight: ``chunks`` times the same parts, one after the other.

    Attributes:
        chunks: how many there are.
        parts: (name of the module, rows in a chunk), in the order in which they lie.
    """

    chunks: int
    parts: tuple[tuple[str, int], ...]

    @property
    def chunk(self) -> int:
        """Rows of a chunk."""
        return sum(rows for _, rows in self.parts)

    @property
    def rows(self) -> int:
        """Rows of the weight."""
        return self.chunks * self.chunk


@dataclass(frozen=True)
class FusedQkv:
    """The layout of one family: chunks of [Q heads | K heads | V heads], as many heads of each in every chunk.

    The chunks are those of the tensor parallel ranks that wrote the checkpoint. Each was quantized by itself, as one
    matrix: blocks of scales begin anew with each chunk, and run across the bounds of Q, K and V within it.

    Attributes:
        models: who uses it.
        architecture: in ``architectures`` of config.json.
        says: a key of config.json and the value that tells this layout.
        chunks: the key of the number of chunks, the same in all layers.
        heads: keys of the numbers of Q heads and of KV heads, of rows of a Q or K head, and of rows of a V head.
        pattern: the key of a list with 1 for each layer that has numbers of its own, of sliding windows.
        windowed: what stands before ``heads`` for those; and for layers whose names hold ``window_names``.
        sources: where this was read.
    """

    models: str
    architecture: str
    says: tuple[str, str]
    chunks: str
    heads: tuple[str, str, str, str]
    pattern: str
    windowed: str
    window_names: str
    sources: str

    def of(self, settings: Mapping[str, Any], name: str) -> Interleaved:
        """The layout of the weight called ``name``, from the numbers in config.json.

        Raises:
            ValueError: they are not there, or cannot be; the text says which.
        """
        prefix = self.windowed if self._is_windowed(settings, name) else ""
        queries, keys, height, v_height = (_number(settings, prefix + key) for key in self.heads)
        chunks = _number(settings, self.chunks)
        for key, heads in ((self.heads[0], queries), (self.heads[1], keys)):
            if heads % chunks:
                raise ValueError(f"{prefix}{key}={heads} is no multiple of {self.chunks}={chunks}")
        rows = (queries // chunks * height, keys // chunks * height, keys // chunks * v_height)
        return Interleaved(chunks, tuple(zip(("q_proj", "k_proj", "v_proj"), rows, strict=True)))

    def _is_windowed(self, settings: Mapping[str, Any], name: str) -> bool:
        if self.window_names in f".{name}":
            return True
        layer, pattern = _LAYER.search(name), settings.get(self.pattern)
        if layer is None or not isinstance(pattern, tuple) or not int(layer[1]) < len(pattern):
            raise ValueError(f"{self.pattern} of config.json says nothing of the layer of {name}")
        if pattern[int(layer[1])] not in (0, 1):
            raise ValueError(f"{self.pattern} has {pattern[int(layer[1])]!r} for layer {layer[1]}; expected 0 or 1")
        return bool(pattern[int(layer[1])])


FAMILIES: tuple[FusedQkv, ...] = (
    FusedQkv(
        "MiMo-V2.5, MiMo-V2.5-Pro",
        "MiMoV2ForCausalLM",
        ("attention_projection_layout", "fused_qkv"),
        chunks="num_key_value_heads",
        heads=("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim"),
        pattern="hybrid_layer_pattern",
        windowed="swa_",
        window_names=".mtp.",
        sources="vLLM, models/mimo_v2.py and mimo_v2_mtp.py (pull requests 45200 and 57508); SGLang, "
        "models/mimo_v2.py; sglang-jax, pull request 1164",
    ),
)


def family(settings: Mapping[str, Any]) -> FusedQkv | None:
    """The family whose layout config.json tells; None where it is none of them.

    Args:
        settings: values of config.json by key, lists as tuples (``Declared.settings``).
    """
    architectures = settings.get("architectures", ())
    for known in FAMILIES:
        key, value = known.says
        if known.architecture in architectures and settings.get(key) == value:
            return known
    return None


def _number(settings: Mapping[str, Any], key: str) -> int:
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LONGEST:
        raise ValueError(f"{key} in config.json is {value!r}; expected a number of heads or rows")
    return value
