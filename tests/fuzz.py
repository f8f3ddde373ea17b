"""Hostile checkpoints, made by changing good ones where it hurts. A seed makes the same one again.

``python tests/fuzz.py 1234`` writes the files of a seed into ``fuzz-1234`` and says what becomes of them.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import header

Header = dict[str, Any]

_BYTES = {"F8_E4M3": 1, "F32": 4, "BF16": 2, "U8": 1, "I64": 8}

NUMBERS: list[Any] = [
    0, 1, 2, 3, 7, 8, 9, 127, 128, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 53) + 1, 1 << 62,
    (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 70, 10**400, -1, -8, -(1 << 63), 1.0, 2.5, 1e300,
    float("nan"), float("inf"), True, False, None, "8", [], [8], {},
]  # fmt: skip
LENGTHS = [0, 1, 2, 8, 255, 100_000_000, 100_000_001, (1 << 31) - 1, 1 << 32, 1 << 63, (1 << 64) - 1]
TEXTS = [
    "", " ", ".", "..", "/", "a/b", "../x", "\0", "\n", "\x1b[31m", "[/red]", "é", "\ud800", "🦙", "x" * 3000,
    "__metadata__", "a.weight", "a.weight_scale", "weight", ".weight", "a.weight_scale_inv", "lm_head.weight",
    "a.input_scale", "k_scale", "a.weight.weight_scale",
]  # fmt: skip
DTYPES = [
    "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64", "C64", "F8_E4M3",
    "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "F33", "f32", "", None, 3,
]  # fmt: skip


def good(rng: random.Random) -> tuple[Header, bytes]:
    """A sound header and its data: FP8 pairs, plain tensors, empty ones."""
    content: Header = {"__metadata__": {"format": "pt"}} if rng.random() < 0.5 else {}
    position, data = 0, b""
    for name in rng.sample(["a", "b", "c", "d"], rng.randint(1, 3)):
        rows, columns = rng.choice([1, 4, 8]), rng.choice([2, 8, 16])
        for tensor, dtype, shape in (
            (f"{name}.weight", "F8_E4M3", [rows, columns]),
            (f"{name}.weight_scale", "F32", rng.choice([[], [1], [rows], [rows, 1]])),
            (f"{name}.bias", rng.choice(["BF16", "U8", "I64"]), rng.choice([[0], [3], [2, 0, 5], [5]])),
        ):
            count = _BYTES[dtype]
            for length in shape:
                count *= length
            content[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + count]}
            position += count
            # scales that are finite, and may be doubled
            data += rng.randbytes(count) if dtype == "F8_E4M3" else bytes(b & 0x3F for b in rng.randbytes(count))
    return content, data


def odd(rng: random.Random, depth: int = 2) -> Any:
    """Any JSON value."""
    kind = rng.randrange(5 if depth else 3)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return rng.choice([None, True, False, [], {}, "fp8", "float8_e4m3fn"])
    if kind == 3:
        return [odd(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(TEXTS): odd(rng, depth - 1) for _ in range(rng.randrange(4))}


def mutated(rng: random.Random, value: Any, depth: int = 4) -> Any:
    """The value with one place in it changed, mostly deep inside."""
    if depth and isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        how = rng.random()
        changed = dict(value)
        if how < 0.1:
            del changed[key]
        elif how < 0.2:
            changed[rng.choice(TEXTS)] = changed.pop(key)
        elif how < 0.3:
            changed[rng.choice(TEXTS)] = changed[key]
        elif key == "dtype" and how < 0.9:
            changed[key] = rng.choice(DTYPES)
        else:
            changed[key] = mutated(rng, value[key], depth - 1)
        return changed
    if depth and isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        how = rng.random()
        if how < 0.15:
            return [*value[:place], *value[place + 1 :]]
        if how < 0.3:
            return [*value[:place], rng.choice(NUMBERS), *value[place:]]
        return [*value[:place], mutated(rng, value[place], depth - 1), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice([-8, -1, 1, 8])
    return odd(rng)


def text_of(rng: random.Random, content: Any) -> bytes:
    """JSON, rarely not quite."""
    text = json.dumps(content, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    how = rng.random()
    if how < 0.05 and text:
        place = rng.randrange(len(text))
        text = text[:place] + rng.randbytes(1) + text[place + 1 :]
    elif how < 0.08:
        text = text[: rng.randrange(len(text) + 1)]
    elif how < 0.1:
        text += rng.choice([b" ", b"\0", b"{}", b"\n\n", b"x"])
    elif how < 0.12:
        text = rng.choice([b" ", b"\xef\xbb\xbf", b"\n"]) + text
    elif how < 0.14:  # the same key twice
        text = text[:-1] + b"," + text[1:]
    elif how < 0.15:
        text = b'{"x":' * 5000 + text
    return text


def a_file(rng: random.Random, directory: Path) -> Path:
    """One ``.safetensors`` file."""
    content, data = good(rng)
    for _ in range(rng.randrange(4)):
        changed = mutated(rng, content)
        content = changed if isinstance(changed, dict) or rng.random() < 0.1 else content
    how = rng.random()
    if how < 0.1:
        data = data[: rng.randrange(len(data) + 1)]
    elif how < 0.2:
        data += rng.randbytes(rng.randrange(9))
    raw = header(text_of(rng, content), data)
    if rng.random() < 0.05:
        raw = rng.choice(LENGTHS).to_bytes(8, "little") + raw[8:]
    file = directory / "model.safetensors"
    file.write_bytes(raw)
    return file


def shards(rng: random.Random, directory: Path) -> Path:
    """Two sound shards, and an index that may not be."""
    content, data = good(rng)
    first, begin = {}, 0
    names = [name for name in content if name != "__metadata__"]
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {}
    middle = rng.randrange(len(names) + 1)
    for file, part in zip(files, (names[:middle], names[middle:]), strict=True):
        first = {name: dict(content[name]) for name in part}
        end = max((entry["data_offsets"][1] for entry in first.values()), default=begin)
        for entry in first.values():
            entry["data_offsets"] = [place - begin for place in entry["data_offsets"]]
        (directory / file).write_bytes(header(first, data[begin:end]))
        weight_map |= dict.fromkeys(part, file)
        begin = end
    index: Any = {"metadata": {"total_size": len(data)}, "weight_map": weight_map}
    for _ in range(rng.randrange(3)):
        index = mutated(rng, index)
    (directory / "model.safetensors.index.json").write_bytes(text_of(rng, index))
    return directory


CONFIG = {
    "model_type": "llama",
    "quantization_config": {
        "quant_method": "compressed-tensors", "weight_block_size": [128, 128], "fmt": "e4m3", "quant_algo": "FP8",
        "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8, "strategy": "group",
                                                  "group_size": 32, "block_structure": [128, 128]}}},
        "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}, "layer_quant_config": {"a": {"weight": [{}]}},
        "quant_type": {"default": {"_type": "Float8WeightOnlyConfig"}},
        "quantized_layers": {"a": {"quant_algo": "FP8"}},
    },
}  # fmt: skip
METHODS = [
    "fp8",
    "compressed-tensors",
    "modelopt",
    "quark",
    "torchao",
    "auto-round",
    "mistral",
    "quanto",
    "tensorrt-llm",
]


def configs(rng: random.Random, directory: Path) -> Path:
    """A sound file with configs that may not be."""
    file = directory / "model.safetensors"
    file.write_bytes(header(*good(rng)))
    for name in rng.sample(["config.json", "hf_quant_config.json", "params.json", "quanto_qmap.json"], 2):
        section = {**CONFIG["quantization_config"], "quant_method": rng.choice(METHODS)}  # type: ignore[dict-item]
        key = "quantization_config" if name == "config.json" else "quantization"
        content: Any = {**CONFIG, key: section}
        for _ in range(rng.randrange(1, 5)):
            content = mutated(rng, content, depth=6)
        (directory / name).write_bytes(text_of(rng, content))
    return directory


KINDS: dict[str, Callable[[random.Random, Path], Path]] = {"file": a_file, "shards": shards, "configs": configs}


def make(seed: int, directory: Path) -> tuple[str, Path]:
    """The checkpoint of a seed, written into an empty directory: its kind, and the path to load."""
    rng = random.Random(seed)
    kind = rng.choice(["file", "file", "shards", "configs"])
    return kind, KINDS[kind](rng, directory)


if __name__ == "__main__":
    from neuron_fp8_loader import load_state_dict

    place = Path(f"fuzz-{sys.argv[1]}")
    place.mkdir(exist_ok=True)
    kind, path = make(int(sys.argv[1]), place)
    print(kind, *sorted(file.name for file in place.iterdir()), flush=True)
    print(load_state_dict(path, nan="keep", unscaled="keep"))
