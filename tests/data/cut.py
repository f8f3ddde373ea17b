"""Cut a real checkpoint small, keeping every tensor: ``python tests/data/cut.py SOURCE OUT HIDDEN``.

Of each tensor the leading rows and columns are kept, and of each scale the entries that belong to them. The bytes
kept are the producer's. Heads, keys, MLP and vocabulary shrink too, so that the result is still a model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

SIZES = {512: 64, 448: 192, 384: 192, 128: 64}
"""Vocabulary, MLP (two widths), keys (and a MoE expert); the hidden size, 256, is an argument."""
SIZE_KEYS = {"hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size"}


def weight_of(scale: str, shapes: dict[str, list[int]]) -> str | None:
    """The tensor whose shape decides that of ``scale``, where it is one."""
    for suffix in ("_scale_inv", "_scale"):
        stem = scale.removesuffix(suffix)
        for name in (stem, stem + "_packed"):
            if stem != scale and name in shapes:
                return name
    return None


def kept(name: str, shapes: dict[str, list[int]], sizes: dict[int, int]) -> list[int]:
    """How much of each dimension is kept."""
    shape, weight = shapes[name], weight_of(name, shapes)
    if weight is None:
        values = [2 if name.endswith("_packed") and i else 1 for i in range(len(shape))]  # FP4: two a byte
        return [sizes.get(n * v, n * v) // v for n, v in zip(shape, values, strict=True)]
    if len(shape) != len(shapes[weight]):
        assert shape in ([], [1]), f"{name}: {shape}"  # one for the whole tensor
        return shape
    whole = zip(shape, shapes[weight], kept(weight, shapes, sizes), strict=True)
    return [1 if s == 1 else -(-now * s // before) for s, before, now in whole]


def main(source: Path, out: Path, hidden: int) -> None:
    out.mkdir(parents=True)
    sizes = SIZES | {256: hidden}
    files, total = {}, 0
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            files[file.name] = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118
    shapes = {name: list(t.shape) for tensors, _ in files.values() for name, t in tensors.items()}
    for file_name, (tensors, metadata) in files.items():
        cut = {n: t[tuple(map(slice, kept(n, shapes, sizes)))].clone().contiguous() for n, t in tensors.items()}
        total += sum(t.nbytes for t in cut.values())
        save_file(cut, out / file_name, metadata)
    for path in (*source.glob("*config.json"), *source.glob("*.index.json")):
        if path.name == "generation_config.json":
            continue
        content = json.loads(path.read_text())
        content |= {key: sizes[content[key]] for key in SIZE_KEYS & content.keys()}
        if "num_attention_heads" in content:
            content |= {"num_attention_heads": hidden // 64, "num_key_value_heads": 1}
        if "weight_map" in content:
            content["metadata"]["total_size"] = total
        (out / path.name).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
