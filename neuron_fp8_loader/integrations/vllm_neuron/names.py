"""Under which names the plugin looks for scales, and what producers call them."""

from __future__ import annotations

import re
from collections.abc import Iterator

# the plugin looks for `<attention>.k_scale`; vLLM's own list of spellings is in its model_loader/weight_utils.py
_KV = re.compile(r"^(?P<at>.+)\.(?P<which>[kv])_scale$")
_KV_SPELLINGS = (
    "{at}.{which}_proj.{which}_scale",  # ModelOpt
    "{at}.{which}_proj.output_scale",  # Quark, older compressed-tensors
    "{at}.qkv_proj.{which}_scale",
    "{at}.attn.{which}_scale",
    "{at}.{which}_cache.scale",  # Hunyuan
    "{at}.{which}_cache_scale",  # Gemma
    "{at}.kv_scale",  # AutoFP8, for both
)
_INPUT = re.compile(r"^(?P<at>.+)\.input_scale$")
_INPUT_SPELLINGS = ("{at}.activation_scale", "{at}.act_scale", "{at}.scale_input", "{at}.activation_scaling_factor")
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_MODULE = re.compile(r"^(?P<at>.+\.)(?P<name>[a-z]+_proj)\.input_scale$")


def spellings(name: str) -> Iterator[tuple[str, str]]:
    """(name, kind) by which a checkpoint may have the activation scale that the plugin calls ``name``."""
    for kind, pattern, others in (("kv", _KV, _KV_SPELLINGS), ("input", _INPUT, _INPUT_SPELLINGS)):
        found = pattern.match(name)
        if found:
            for other in others:
                yield other.format(**found.groupdict()), kind


def sharing_input(name: str) -> tuple[str, ...]:
    """The input scales that the plugin takes for one: q, k and v must be equal, of gate and up it reads gate's."""
    found = _MODULE.match(name)
    for group in _TOGETHER:
        if found and found["name"] in group:
            return tuple(f"{found['at']}{module}.input_scale" for module in group)
    return (name,)
