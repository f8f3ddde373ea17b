"""Which files make up a checkpoint, what is read of them, and how often."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from faults import Faulty
from support import random_codes, save, save_shards, write_index

from neuron_fp8_loader import load_file, load_state_dict, plan_checkpoint
from neuron_fp8_loader.checkpoint import headers, regular
from neuron_fp8_loader.checkpoint import index as indexes
from neuron_fp8_loader.errors import CheckpointError
from neuron_fp8_loader.host.cache import forget
from neuron_fp8_loader.tools.scan import scan_checkpoint
from neuron_fp8_loader.tools.verify import verify_checkpoint

A, B, C = ({name: torch.full((2, 3), value)} for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0)))


@pytest.fixture
def settled(monkeypatch):
    """Take all files for old: what was written just now is not trusted to stay as it is."""
    monkeypatch.setattr(regular, "_SETTLED", -(10**15))
    forget()


def error_of(path: object) -> str:
    with pytest.raises(CheckpointError) as error:
        load_state_dict(path)  # type: ignore[arg-type]
    return str(error.value)


# -- indexes that are another's ---------------------------------------------------------------------------------

FOREIGN = {
    "of other files": '{"weight_map": {"x": "other-00001-of-00002.safetensors"}}',
    "of another tool": '{"version": 3, "files": []}',
    "broken": "{",
    "empty": "",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=list(FOREIGN))
@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_a_foreign_index_does_not_stop_a_single_file(tmp_path, name, content):
    file = save(tmp_path / name, A)
    (tmp_path / "tool.index.json").write_text(content)
    for path in (file, tmp_path):
        assert list(load_state_dict(path)) == ["a"]


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "variant.safetensors.index.json"])
def test_an_index_of_files_that_are_not_here(tmp_path, name):
    """Another form of the checkpoint, of which only the index was fetched."""
    file = save(tmp_path / "consolidated.safetensors", A)
    write_index(tmp_path / name, {"x": "model-00001-of-00001.safetensors"})
    for path in (file, tmp_path):
        assert list(load_state_dict(path)) == ["a"]


def test_an_index_that_lists_a_single_file_among_missing_ones(tmp_path):
    file = save(tmp_path / "model.safetensors", A)
    write_index(tmp_path / "all.index.json", {"a": "model.safetensors", "z": "gone.safetensors"})
    assert list(load_state_dict(file)) == ["a"]


def test_two_indexes_for_one_file(tmp_path):
    save_shards(tmp_path, A, B, index=False)
    one, two = sorted(tmp_path.glob("*.safetensors"))
    write_index(tmp_path / "x.index.json", {"a": one.name, "b": two.name})
    assert list(load_file(one)) == ["a"]
    write_index(tmp_path / "y.index.json", {"a": one.name})
    text = error_of(one)
    assert "x.index.json, y.index.json" in text
    assert "give the path of one of them" in text
    write_index(tmp_path / "model.safetensors.index.json", {"a": one.name, "b": two.name})
    assert list(load_file(one)) == ["a"]


def test_an_index_that_contradicts_says_what_to_do(tmp_path):
    save(tmp_path / "model.safetensors", A)
    write_index(tmp_path / "model.safetensors.index.json", {"b": "model.safetensors"})
    assert "If model.safetensors.index.json belongs to other files, move it away" in error_of(tmp_path)


def test_a_broken_index_beside_a_numbered_shard_is_not_passed_over(tmp_path):
    one, _ = save_shards(tmp_path, A, B)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json" in error_of(one)


# -- one shard of several ---------------------------------------------------------------------------------------


def pair(name: str, seed: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": random_codes((64, 64), seed), f"{name}.weight_scale": torch.rand(64, 1) + 1}


def test_shards_in_a_folder_do_not_hide_the_config(tmp_path):
    (tmp_path / "shards").mkdir()
    files = save_shards(tmp_path / "shards", pair("a", 1), pair("b", 2), index=False)
    weight_map = {f"{n}.weight{s}": f"shards/{f.name}" for n, f in zip("ab", files) for s in ("", "_scale")}  # noqa: B905
    index = write_index(tmp_path / "model.safetensors.index.json", weight_map)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    for path in (tmp_path, index, files[0]):
        assert plan_checkpoint(path).declared.source == "config.json"
        assert len(plan_checkpoint(path).pairs) == 2
    assert sorted(load_file(files[1])) == ["b.weight", "b.weight_scale"]


@pytest.mark.parametrize("what", [load_file, scan_checkpoint, verify_checkpoint], ids=lambda f: f.__name__)
def test_one_shard_alone_is_read(tmp_path, monkeypatch, what):
    files = save_shards(tmp_path, pair("a", 1), pair("b", 2), pair("c", 3))
    reads = Faulty(monkeypatch)
    what(files[1])
    data = {file: reads.read_of(file, len(headers_of(file))) for file in files}
    assert data[files[0]] == data[files[2]] == 0
    assert data[files[1]] > 0


def headers_of(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def test_shards_one_by_one_parse_everything_once(tmp_path, monkeypatch, settled):
    shards = [pair(f"layer{i}", i) | {f"{i}.norm": torch.ones(3)} for i in range(8)]
    files = save_shards(tmp_path, *shards)
    parsed: list[str] = []
    for module, name in ((headers, "_of_safetensors"), (indexes, "_read")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda file, *a, real=real: (parsed.append(file.name), real(file, *a))[1])
    reads = Faulty(monkeypatch)
    for file in files:
        load_file(file)
    assert sorted(parsed) == sorted([*(file.name for file in files), "model.safetensors.index.json"])
    for file in files:  # its digest, its header, and its data
        assert reads.read_of(file) <= 2 * (len(headers_of(file)) + 64) + file.stat().st_size
    count = len(reads.reads)
    load_file(files[3])
    assert {entry[0] for entry in reads.reads[count:]} == {str(files[3])}
    assert len(parsed) == 9


def test_the_key_of_a_header_has_its_length_in_it(tmp_path):
    """A file whose header says less than its length does not pass for the one that it was, whatever its times say."""
    text = b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b" " * 8)
    os.utime(file, ns=(10**18, 10**18))
    assert load_state_dict(file)["a"].shape == (8,)
    before = headers.digest_of(file, regular.stamp(file))
    with file.open("r+b") as handle:  # the same inode, size and time: the data is taken for the header's end
        handle.write((len(text) + 8).to_bytes(8, "little"))
    os.utime(file, ns=(10**18, 10**18))
    assert "not a complete safetensors file" in error_of(file)
    assert headers.digest_of(file, regular.stamp(file)) != before
