"""The checkpoints in the repository are the real ones, cut: every byte kept is the producer's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data import cut
from safetensors import safe_open
from support import DATA, SHARED, digests, same_bytes

CUT = {
    "ct_fp8_dynamic_moe": 128,
    "ct_nvfp4": 128,
    "derived_split_shards": 192,
    "hf_fp8_block": 192,
    "modelopt_fp8_kv": 128,
}


def test_all_are_listed() -> None:
    assert {path.parent.name for path in DATA.glob("*/config.json")} == set(CUT)
    readme = (DATA / "README.md").read_text()
    assert all(f"| `{name}` |" in readme for name in CUT)


@pytest.mark.parametrize("name", CUT)
def test_the_sizes_are_those_of_the_config(name: str) -> None:
    """Every tensor of a layer, and of both layers the same: nothing but width was cut."""
    config = json.loads((DATA / name / "config.json").read_text())
    shapes = {}
    for file in (DATA / name).glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            shapes |= {key: f.get_slice(key).get_shape() for key in f.keys()}  # noqa: SIM118
    assert shapes["model.embed_tokens.weight"] == [config["vocab_size"], CUT[name]] == [64, config["hidden_size"]]
    layers = [{k.split(".", 3)[3]: s for k, s in shapes.items() if k.startswith(f"model.layers.{n}.")} for n in (0, 1)]
    assert layers[0] == layers[1]
    assert len(shapes) == 2 * len(layers[0]) + 3


@pytest.mark.parametrize("name", CUT)
def test_the_cut_can_be_made_again(name: str, tmp_path: Path) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no shared checkpoint {name}")
    cut.main(SHARED / name, tmp_path / name, CUT[name])
    assert digests(tmp_path / name) == digests(DATA / name)
    for file in (DATA / name).glob("*.safetensors"):
        with safe_open(file, "pt") as kept, safe_open(SHARED / name / file.name, "pt") as whole:
            for key in kept.keys():  # noqa: SIM118
                part = kept.get_tensor(key)
                assert same_bytes(part, whole.get_tensor(key)[tuple(map(slice, part.shape))])
