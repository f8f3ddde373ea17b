"""What a checkpoint's config files say about its quantisation.

Read to explain and to cross-check (block size, format names), never to decide what a tensor is: ignore lists are
advisory and configs go stale, dtypes do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FP8_METHODS = ("fp8", "fbgemm_fp8", "ptpc_fp8")
_OTHER_METHODS = ("gptq", "awq", "bitsandbytes", "mxfp4", "bitnet", "aqlm", "hqq", "eetq")


@dataclass(frozen=True)
class Declared:
    """The declared quantisation.

    Attributes:
        source: the file that says so, e.g. ``"config.json"``; empty where no file says anything.
        method: e.g. ``"compressed-tensors float-quantized"``; empty for none.
        fp8: does it promise e4m3fn weights? None where it cannot be told.
        block: (rows, columns) of a scale block, where it is given.
    """

    source: str = ""
    method: str = ""
    fp8: bool | None = None
    block: tuple[int, int] | None = None


def read_declared(directory: Path, metadata: Mapping[str, str] | None = None) -> Declared:
    """What the files beside the shards declare. A file that cannot be parsed counts as saying nothing."""
    for source, section in _sections(directory, metadata or {}):
        if isinstance(section, dict):
            return Declared(source, _method(section), _promises_fp8(section), _block(section))
    if (directory / "config.json").is_file():
        return Declared("config.json", "", False)
    return Declared()


def _sections(directory: Path, metadata: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    config = _json(directory / "config.json")
    for holder in (config, *(config.get(part) for part in ("text_config", "llm_config", "language_config"))):
        if isinstance(holder, dict):
            for key in ("quantization_config", "compression_config", "quantization"):
                if holder.get(key):
                    yield "config.json", holder[key]
    hf_quant = _json(directory / "hf_quant_config.json").get("quantization")
    if isinstance(hf_quant, dict):
        yield "hf_quant_config.json", {"quant_method": "modelopt", **hf_quant}
    params = _json(directory / "params.json").get("quantization")
    if isinstance(params, dict):
        yield "params.json", {"quant_method": "mistral", **params}
    if (directory / "quanto_qmap.json").is_file():
        qmap = (directory / "quanto_qmap.json").read_text(encoding="utf-8", errors="replace")
        yield (
            "quanto_qmap.json",
            {"quant_method": "quanto", "weights": "qfloat8" if "qfloat8" in qmap else ""},
        )
    if "_quantization_metadata" in metadata:
        yield "header metadata", {"quant_method": "comfy", "format": metadata["_quantization_metadata"]}


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(section: Mapping[str, Any], *keys: str) -> str:
    return " ".join(str(section[key]) for key in keys if isinstance(section.get(key), str))


def _method(section: Mapping[str, Any]) -> str:
    method = _text(section, "quant_method")
    detail = _text(section, "quant_algo") if method in ("modelopt", "") else _text(section, "fmt", "scale_fmt")
    if method == "compressed-tensors":
        detail = _text(section, "format")
    if method == "mistral":
        detail = _text(section, "qformat_weight")
    return f"{method} {detail}".strip()


def _groups(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = section.get("config_groups")
    found = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    return [weights for weights in found if isinstance(weights, dict)]


def _promises_fp8(section: Mapping[str, Any]) -> bool | None:
    method = _text(section, "quant_method").lower()
    if method in _FP8_METHODS:
        return True
    if method in _OTHER_METHODS:
        return False
    algo = _text(section, "quant_algo").upper()
    if algo:
        return None if "MIXED" in algo else "FP8" in algo and "W4A8" not in algo
    groups = _groups(section)
    if groups:
        return any(g.get("type") == "float" and g.get("num_bits") == 8 for g in groups)
    text = json.dumps(section, default=str).lower()
    if any(word in text for word in ("float8_e4m3", "fp8_e4m3", "qfloat8", "fp8", "float8")):
        return True
    return None


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value):
        return (value[0], value[1])
    return None


def _block(section: Mapping[str, Any]) -> tuple[int, int] | None:
    block = _pair(section.get("weight_block_size"))
    for weights in _groups(section):
        block = block or _pair(weights.get("block_structure"))
        if not block and weights.get("strategy") == "group" and isinstance(weights.get("group_size"), int):
            block = (1, weights["group_size"])
    algo = _text(section, "quant_algo").upper()
    if not block and algo == "MXFP8":
        block = (1, 32)
    return block
