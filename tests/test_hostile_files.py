"""Files that are something else than they seem, and numbers, names and paths that cannot be."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest
import safetensors
import torch
from support import header, random_codes, same_bytes, save, save_shards, write_index

from neuron_fp8_loader import load_checkpoint, load_file, load_state_dict, plan_checkpoint
from neuron_fp8_loader.checkpoint import open_checkpoint
from neuron_fp8_loader.errors import CheckpointError, OptionError, PlanError
from neuron_fp8_loader.tools.copying import Form, config_after
from neuron_fp8_loader.tools.export import ExportError, prepare_export
from neuron_fp8_loader.tools.settings import config_in

A, B, C = ({name: torch.full((2, 3), value)} for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0)))


def error_of(path: object) -> str:
    with pytest.raises(CheckpointError) as error:
        load_state_dict(path)  # type: ignore[arg-type]
    return str(error.value)


def pair(name: str, seed: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": random_codes((64, 64), seed), f"{name}.weight_scale": torch.rand(64, 1) + 1}


# -- what is no file ------------------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # their names must be short
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


SPECIAL = [(fifo, "a FIFO"), (unix_socket, "a socket"), (device, "a device"), (folder, "a directory")]


@pytest.mark.parametrize(("make", "kind"), SPECIAL, ids=[kind for _, kind in SPECIAL])
def test_what_is_no_file_is_refused_at_once(tmp_path, make, kind):
    def place(name: str) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        return directory

    def check(path: Path, culprit: Path) -> None:
        assert f"{culprit}: is {kind}, where a file is expected" in error_of(path)

    single = place("single")
    make(single / "model.safetensors")
    check(single, single / "model.safetensors")
    if kind != "a directory":
        check(single / "model.safetensors", single / "model.safetensors")
        with pytest.raises(CheckpointError, match=kind):
            load_file(single / "model.safetensors")

    binary = place("bin")
    make(binary / "pytorch_model.bin")
    check(binary, binary / "pytorch_model.bin")

    shards = place("shards")
    files = save_shards(shards, A, B)
    files[0].unlink()
    make(files[0])
    check(shards, files[0])
    check(files[1], files[0])

    index = place("index")
    files = save_shards(index, A, B, index=False)
    make(index / "model.safetensors.index.json")
    check(index, index / "model.safetensors.index.json")
    check(files[0], index / "model.safetensors.index.json")

    other = place("other")
    save(other / "x.safetensors", A)
    make(other / "tool.index.json")  # not its own: passed over, without a wait
    assert list(load_state_dict(other / "x.safetensors")) == ["a"]

    config = place("config")
    save(config / "model.safetensors", A)
    make(config / "config.json")
    (warning,) = plan_checkpoint(config).warnings
    assert f"config.json cannot be read (is {kind}" in warning
    assert config_in(config) == {}  # without a wait
    with pytest.raises(ExportError, match="no FP8 weights"):
        prepare_export(config, place("out"), stack="nxd")


def test_json_has_limits(tmp_path, monkeypatch):
    save_shards(tmp_path, A, B)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map":' + '{"a":' * 200_000)
    assert f"{index}: not a checkpoint index: nested too deep" in error_of(tmp_path)
    with index.open("r+b") as handle:
        handle.truncate((1 << 30) + 1)
    assert f"{index}: 1073741825 bytes, which is too long" in error_of(tmp_path)
    index.unlink()
    with (tmp_path / "config.json").open("wb") as handle:
        handle.truncate((64 << 20) + 1)
    (warning,) = plan_checkpoint(tmp_path).warnings
    assert "config.json cannot be read (67108865 bytes, which is too long" in warning
    (tmp_path / "config.json").write_text('{"a":' * 200_000)
    assert config_in(tmp_path) == {}
    with pytest.raises(CheckpointError, match="nested too deep"):
        config_after(tmp_path / "config.json", Form(None))


# -- numbers and odd values from files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["model-00001-of-9999999999"], "9999999998 of 9999999999 shards missing: 00002, 00003, .* [.][.][.]"),
        (["model-00001-of-00000"], "numbered 00001 of 0; expected"),
        (["model-00001-of-00003", "model-00002-of-00003", "model-00009-of-00003"], "00001, 00002, 00009 of 3"),
        (["model-00001-of-00002", "model-1-of-00002"], "1 of 2 shards missing: 00002"),
        (["model-00000-of-00002", "model-00002-of-00002"], "both from 0 and to 2|numbered"),
    ],
)  # fmt: skip
def test_numbers_of_shards(tmp_path, names, says):
    for name in names:
        save(tmp_path / f"{name}.safetensors", {name: torch.ones(1)})
    with pytest.raises(CheckpointError, match=says):
        load_state_dict(tmp_path)


def test_shards_numbered_from_0(tmp_path):
    for n in range(2):
        save(tmp_path / f"model-{n:05d}-of-00002.safetensors", {f"t{n}": torch.ones(1)})
    assert sorted(load_state_dict(tmp_path)) == ["t0", "t1"]


BLOCKS: list[object] = [
    [2_000_000_000, 64], [2**62, 2**62], [2**70, 1], [10**400, 1], [-128, 128], [True, True], [128.0, 128.0], [0, 0],
    "128", [128], {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: str(b)[:20])
def test_declared_blocks_size_nothing(tmp_path, block):
    """A block no larger than the weight covers what a block of 2 x 10^9 rows does, and takes no 32 GB for it."""
    weight, scale = random_codes((100, 100)), torch.tensor([[1.5, 2.5]])
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale}
    save(tmp_path / "model.safetensors", tensors)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_checkpoint(tmp_path, dequantize=["a"]) if block == BLOCKS[0] else load_checkpoint(tmp_path)
    (found,) = loaded.plan.pairs
    assert found.granularity.block is not None
    assert max(found.granularity.block) <= 128
    if block == BLOCKS[0]:
        expected = weight.float() * scale.repeat_interleave(64, 1)[:, :100]
        assert torch.equal(loaded.state_dict["a.weight"], expected.bfloat16())
    else:
        assert any("config.json declares blocks of" in text for text in loaded.plan.warnings)


HEADERS = {
    "a length beyond int64": {"t": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}},
    "strides beyond int64": {"t": {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}},
    "half a byte": {"t": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}},
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=list(HEADERS))
def test_shapes_that_torch_cannot_hold(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(header(content, b"\0" * content["t"]["data_offsets"][1]))
    assert f"{file}: t " in error_of(file)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no float4")
def test_f4_with_an_even_last_dimension(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(header({"t": {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]}}, bytes(range(6))))
    with safetensors.safe_open(str(file), "pt") as handle:
        assert same_bytes(load_state_dict(file)["t"], handle.get_tensor("t"))


def test_metadata_null(tmp_path):
    file = tmp_path / "model.safetensors"
    content = {"__metadata__": None, "t": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
    file.write_bytes(header(content, b"ab"))
    assert load_checkpoint(file).metadata == {}
    assert load_state_dict(file)["t"].tolist() == [97, 98]


@pytest.mark.parametrize("metadata", [None, [1], "text", 7])
def test_odd_metadata_in_an_index(tmp_path, metadata):

    source = tmp_path / "in"
    source.mkdir()
    files = save_shards(source, pair("a", 1), pair("b", 2))
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "metadata": metadata}))
    assert len(load_state_dict(source)) == 4
    prepare_export(source, tmp_path / "out", dequantize=["a"]).run()
    assert "total_size" in json.loads((tmp_path / "out" / index.name).read_text())["metadata"]
    assert len(load_state_dict(tmp_path / "out")) == 3
    assert len(files) == 2


@pytest.mark.parametrize("name", ["", ".", "x\0y", "/"])
def test_odd_names_in_an_index(tmp_path, name):
    save(tmp_path / "one.safetensors", A)
    index = write_index(tmp_path / "model.safetensors.index.json", {"a": "one.safetensors", "b": name})
    assert str(index) in error_of(tmp_path)


def test_a_name_in_an_index_that_is_too_long(tmp_path):
    save(tmp_path / "one.safetensors", A)
    write_index(tmp_path / "model.safetensors.index.json", {"a": "one.safetensors", "b": "x" * 300 + ".safetensors"})
    assert "missing shard xxx" in error_of(tmp_path)
    assert list(load_state_dict(tmp_path / "one.safetensors")) == ["a"]


def test_a_directory_that_cannot_be_listed(tmp_path, monkeypatch):
    save_shards(tmp_path, A, B)

    def refused(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refused)
    assert f"{tmp_path}: cannot be listed: Permission denied" in error_of(tmp_path)


# -- paths ------------------------------------------------------------------------------------------------------


def test_paths_that_are_none(tmp_path, monkeypatch):
    save(tmp_path / "model.safetensors", A)
    monkeypatch.chdir(tmp_path)
    assert "the path is empty" in error_of("")
    assert "File name too long" in error_of("x" * 5000)
    assert re.search("null (byte|character)", error_of("a\0b"))  # as this Python has it
    for wrong in (None, 3, ["x"]):
        with pytest.raises(OptionError, match="expected a path"):
            load_state_dict(wrong)  # type: ignore[arg-type]
    (tmp_path / "link.safetensors").symlink_to("link.safetensors")
    assert "link.safetensors" in error_of("link.safetensors")


def test_what_looks_like_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = error_of("Qwen/Qwen3-8B-FP8")
    assert "Qwen/Qwen3-8B-FP8: is neither a path nor a repository in the Hub cache" in hub
    assert "hf download Qwen/Qwen3-8B-FP8" in hub
    assert error_of("ftp://b//x").startswith("ftp://b//x: is a URL")
    assert error_of(tmp_path / "Qwen" / "x").endswith("no such file or directory")

    root = tmp_path / "models--org--name"
    snapshot = root / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    assert error_of(root).startswith(f"{snapshot}: no checkpoint here")  # the one that there is
    (root / "snapshots" / "fedcba").mkdir()
    assert "root of a Hub cache; give the snapshot in it" in error_of(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("0123abc")
    assert error_of(root).startswith(f"{snapshot}: no checkpoint here")

    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234567\n"
    for name in ("model.safetensors", "pytorch_model.bin"):
        directory = tmp_path / f"lfs-{name}"
        directory.mkdir()
        (directory / name).write_bytes(pointer)
        assert re.search(rf"{directory / name}: is a Git LFS pointer.*git lfs pull", error_of(directory))

    other = tmp_path / "other"
    other.mkdir()
    for name, says in (("m.gguf", "GGUF"), ("m.pt", "torch.save"), ("m.pth", "torch.save"), ("m.txt", "expected a")):
        (other / name).write_bytes(b"GGUF")
        assert says in error_of(other / name)
        with pytest.raises(CheckpointError, match=says):
            load_file(other / name)
    assert "no checkpoint here; m.gguf is a GGUF file" in error_of(other)
    (other / "renamed.safetensors").write_bytes(b"GGUF" + b"\3" * 100)
    assert "GGUF" in error_of(other / "renamed.safetensors")
    with pytest.raises(CheckpointError, match=r"is a directory; load_file takes one .*, load_state_dict a directory"):
        load_file(tmp_path)


def test_a_path_of_bytes(tmp_path):
    with pytest.raises(OptionError, match="expected a path, not a bytes"):
        open_checkpoint(os.fsencode(tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2**40, 0), (2**40, 4, 0), (2**40, 0, 4)], ids=str)
def test_rows_without_values_size_no_scales(tmp_path, shape):
    """A file of 200 bytes would ask for terabytes."""
    content = {
        name: {"dtype": dtype, "shape": list(size), "data_offsets": [0, end]}
        for name, dtype, size, end in (("m", "F8_E4M3", shape, 0), ("m_weight_scale", "F32", (1,), 4))
    }
    (tmp_path / "model.safetensors").write_bytes(header(content, bytes(4)))
    transposed = shape == (2**40, 4, 0)  # [experts, in, out] by its convention: there are no rows
    if transposed:
        assert load_state_dict(tmp_path, layout="per_channel")["m_weight_scale"].shape == (2**40, 1, 0)
        return
    with pytest.raises(PlanError, match="rows without values"):
        load_state_dict(tmp_path, layout="per_channel")
    assert load_state_dict(tmp_path)["m"].shape == shape
