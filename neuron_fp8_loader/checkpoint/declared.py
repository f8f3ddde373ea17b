"""What a checkpoint's config files say about its quantization.

Read to explain and to cross-check (block size, format names), never to decide what a tensor is: ignore lists are
advisory and configs go stale, dtypes do not. So nothing in here raises: a broken file becomes a remark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .regular import LONGEST_CONFIG, read_json
from .remote import exists

if TYPE_CHECKING:
    from typing import TypeGuard

Section = Mapping[str, Any]
Block = tuple[int, int]

_FP8_METHODS = ("fp8", "fbgemm_fp8")
_OTHER_METHODS = ("gptq", "awq", "bitsandbytes", "mxfp4", "bitnet", "aqlm", "hqq", "eetq", "vptq", "higgs", "spqr")
_MODELOPT_BLOCKS: dict[str, Block] = {
    "FP8_PB_WO": (128, 128), "FP8_BLOCK_SCALES": (128, 128), "FP8_PB": (128, 128), "MXFP8": (1, 32),
}  # fmt: skip
_LONGEST = 1 << 31  # rows or columns of a block; no published weight has so many


@dataclass(frozen=True)
class Declared:
    """The declared quantization.

    Attributes:
        source: the file that says so, e.g. ``"config.json"``; empty where no file says anything.
        method: e.g. ``"compressed-tensors float-quantized"``; empty for none.
        fp8: does it promise e4m3fn weights? None where it cannot be told.
        block: (rows, columns) of a scale block, where it is given.
        remarks: files that could not be read, and why.
        settings: (key, value) of what config.json says of the model: numbers, strings, and lists of them as tuples.
            A ``text_config`` in it counts first.
    """

    source: str = ""
    method: str = ""
    fp8: bool | None = None
    block: Block | None = None
    remarks: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()


def read_declared(directory: Path, metadata: Mapping[str, str] | None = None) -> Declared:
    """What the files beside the shards declare, and the safetensors metadata. Never raises."""
    remarks: list[str] = []
    config = _json(directory / "config.json", remarks)
    settings = _settings(config)
    for source, section in _sections(directory, config, metadata or {}, remarks):
        odd: list[str] = []
        block = _block(section, odd)
        remarks += [f"{source} {remark}" for remark in odd]
        return Declared(source, _method(section), _promises_fp8(section), block, tuple(remarks), settings)
    if (directory / "config.json").is_file() and not remarks:
        return Declared("config.json", "", False, settings=settings)
    return Declared(remarks=tuple(remarks), settings=settings)


def _settings(config: Section) -> tuple[tuple[str, Any], ...]:
    text = config.get("text_config")
    found: dict[str, Any] = {}
    for key, value in {**config, **(text if isinstance(text, dict) else {})}.items():
        if isinstance(value, int | str):
            found[key] = value
        elif isinstance(value, list) and all(isinstance(item, int | str) for item in value):
            found[key] = tuple(value)
    return tuple(sorted(found.items()))


# -- where producers write it ---------------------------------------------------------------------------------


def _sections(
    directory: Path, config: Section, metadata: Mapping[str, str], remarks: list[str]
) -> Iterator[tuple[str, Section]]:
    """(file, what it says of the quantization), the most telling first, each with its ``quant_method``."""
    parts = (config.get(part) for part in ("text_config", "llm_config", "language_config", "thinker_config"))
    for holder in (config, *parts):
        if isinstance(holder, dict):
            for key in ("quantization_config", "compression_config"):
                if isinstance(holder.get(key), dict) and holder[key]:
                    yield "config.json", holder[key]
            trt = holder.get("quantization")
            if isinstance(trt, dict) and trt.get("quant_algo"):
                yield "config.json", {"quant_method": "tensorrt-llm", **trt}
    modelopt = _json(directory / "hf_quant_config.json", remarks).get("quantization")
    if isinstance(modelopt, dict):
        yield "hf_quant_config.json", {"quant_method": "modelopt", **modelopt}
    params = _json(directory / "params.json", remarks).get("quantization")
    if isinstance(params, dict):
        yield "params.json", {"quant_method": "mistral", **params}
    qmap = _json(directory / "quanto_qmap.json", remarks)
    if qmap:
        kinds = sorted({str(entry.get("weights")) for entry in qmap.values() if isinstance(entry, dict)})
        yield "quanto_qmap.json", {"quant_method": "quanto", "weights": " ".join(kinds)}
    yield from _header(metadata)


def _header(metadata: Mapping[str, str]) -> Iterator[tuple[str, Section]]:
    comfy = _parsed(metadata.get("_quantization_metadata", ""))
    layers = comfy.get("layers") if isinstance(comfy, dict) else None
    if isinstance(layers, dict):
        formats = sorted({str(layer.get("format")) for layer in layers.values() if isinstance(layer, dict)})
        yield "header metadata", {"quant_method": "comfy", "weights": " ".join(formats)}
    torchao = {
        entry["_type"]
        for entry in map(_parsed, metadata.values())
        if isinstance(entry, dict) and isinstance(entry.get("_type"), str) and "_data" in entry
    }
    if torchao:
        yield "header metadata", {"quant_method": "torchao", "weights": " ".join(sorted(torchao))}


def _json(file: Path, remarks: list[str]) -> dict[str, Any]:
    if not exists(file):
        return {}
    try:
        content = read_json(file, LONGEST_CONFIG)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{file}: ")
        remarks.append(f"{file.name} cannot be read ({reason}); going by the tensors alone")
        return {}
    if not isinstance(content, dict):
        remarks.append(f"{file.name} holds a {type(content).__name__}, not an object; going by the tensors alone")
        return {}
    return content


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# -- what it says ---------------------------------------------------------------------------------------------

_DETAILS = {
    "compressed-tensors": ("format",),
    "modelopt": ("quant_algo",),
    "tensorrt-llm": ("quant_algo",),
    "mistral": ("qformat_weight",),
    "quanto": ("weights",),
    "comfy": ("weights",),
    "auto-round": ("data_type",),
}


def _text(section: Section, *keys: str) -> str:
    return " ".join(section[key] for key in keys if isinstance(section.get(key), str))


def _method(section: Section) -> str:
    method = _text(section, "quant_method")
    if method == "quark":
        detail = " ".join(_quark_dtypes(section))
    elif method == "torchao":
        detail = " ".join(_torchao_types(section))
    else:
        detail = _text(section, *_DETAILS.get(method, ("quant_algo", "fmt", "scale_fmt")))
    return f"{method} {detail}".strip()


def _promises_fp8(section: Section) -> bool | None:
    """Does it promise e4m3fn *weights*? FP8 activations or KV cache (W4AFP8, ``kv_cache_quant_algo``) do not count."""
    method = _text(section, "quant_method").lower()
    if method in _FP8_METHODS:
        return True
    if method in _OTHER_METHODS:
        return False
    if method == "quark":
        dtypes = _quark_dtypes(section)
        return any("fp8_e4m3" in dtype for dtype in dtypes) if dtypes else None
    if method == "torchao":
        types = _torchao_types(section)
        return any("Float8" in name and "Int4Weight" not in name for name in types) if types else None
    if method == "auto-round" and _text(section, "data_type"):
        data_type = _text(section, "data_type").lower()
        return "fp8" in data_type or ("fp" in data_type and section.get("bits") == 8)
    algos = _algos(section)
    if algos:
        return any("FP8" in algo and not algo.startswith("W4") for algo in algos)
    groups = _groups(section)
    if groups:
        return any(group.get("type") == "float" and group.get("num_bits") == 8 for group in groups)
    weights = _text(section, "weights", "qformat_weight").lower()
    if weights:
        return any(word in weights for word in ("float8", "fp8"))
    return None


def _algos(section: Section) -> list[str]:
    """ModelOpt's and TensorRT-LLM's algorithms: one, or with MIXED_PRECISION one a layer."""
    found = [_text(section, "quant_algo")]
    layers = section.get("quantized_layers")
    if isinstance(layers, dict):
        found += [_text(layer, "quant_algo") for layer in layers.values() if isinstance(layer, dict)]
    return [algo for algo in (text.upper() for text in found) if algo and "MIXED" not in algo]


def _groups(section: Section) -> list[Section]:
    groups = section.get("config_groups")
    found = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    return [weights for weights in found if isinstance(weights, dict)]


def _quark_dtypes(section: Section) -> list[str]:
    layers = section.get("layer_quant_config")
    configs = [section.get("global_quant_config"), *(layers.values() if isinstance(layers, dict) else ())]
    found: set[str] = set()
    for config in configs:
        weight = config.get("weight") if isinstance(config, dict) else None
        for spec in weight if isinstance(weight, list) else [weight]:
            if isinstance(spec, dict) and isinstance(spec.get("dtype"), str):
                found.add(spec["dtype"])
    return sorted(found)


def _torchao_types(section: Section) -> list[str]:
    """The names of the quantization configs, or of the tensor subclasses in a file's metadata."""
    found = set(_text(section, "weights").split())
    kinds = section.get("quant_type")
    for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
        name = kind.get("_type") if isinstance(kind, dict) else kind
        if isinstance(name, str):
            found.add(name)
    return sorted(found)


def _pair(value: Any, remarks: list[str]) -> Block | None:
    if value is None:
        return None
    if isinstance(value, list | tuple) and len(value) == 2 and all(_is_length(n) for n in value):
        return (value[0], value[1])
    remarks.append(f"declares blocks of {str(value)[:80]}, which cannot be; going by the tensors alone")
    return None


def _is_length(number: Any) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool) and 0 < number <= _LONGEST


def _block(section: Section, remarks: list[str]) -> Block | None:
    block = _pair(section.get("weight_block_size"), remarks)
    for weights in _groups(section):
        block = block or _pair(weights.get("block_structure"), remarks)
        size = weights.get("group_size")
        if not block and weights.get("strategy") == "group" and _is_length(size):
            block = (1, size)
    return block or _MODELOPT_BLOCKS.get(_text(section, "quant_algo").upper())
