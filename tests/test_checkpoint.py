"""Finding the files of a checkpoint, and saying what is wrong with them: every file and tensor, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as original
from support import header, same_bytes, save, save_shards, write_index

from neuron_fp8_loader import load_checkpoint, load_file, load_state_dict, plan_checkpoint
from neuron_fp8_loader.checkpoint import open_checkpoint
from neuron_fp8_loader.errors import CheckpointError

A, B, C = ({name: torch.full((2, 3), value)} for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0)))
ALL = A | B | C


def same(loaded: dict, expected: dict = ALL) -> None:
    assert sorted(loaded) == sorted(expected)
    for name, tensor in expected.items():
        assert same_bytes(loaded[name], tensor)


def error_of(path: Path) -> str:
    """The text of the error, which a plan gives as a load does."""
    with pytest.raises(CheckpointError):
        load_state_dict(path)
    with pytest.raises(CheckpointError) as error:
        plan_checkpoint(path)
    return str(error.value)


# -- what is found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "anything.safetensors"])
def test_a_single_file(tmp_path, name):
    file = save(tmp_path / name, ALL)
    same(load_state_dict(tmp_path))
    same(load_state_dict(file))
    same(load_state_dict(str(file)))
    same(load_file(file))


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "other"])
def test_shards_with_an_index(tmp_path, stem):
    files = save_shards(tmp_path, A, B, C, stem=stem)
    same(load_state_dict(tmp_path))
    same(load_state_dict(tmp_path / f"{stem}.safetensors.index.json"))
    same(load_file(files[1]), B)
    checkpoint = open_checkpoint(files[1])
    assert checkpoint.files == tuple(files)
    assert checkpoint.selected == {files[1]}


def test_numbered_shards_without_an_index(tmp_path):
    files = save_shards(tmp_path, A, B, C, index=False)
    same(load_state_dict(tmp_path))
    same(load_file(files[0]), A)


def test_one_file_with_an_index_of_its_own(tmp_path):
    save(tmp_path / "model.safetensors", A)
    index = write_index(
        tmp_path / "model.safetensors.index.json", {"a": "model.safetensors", "z": "model.safetensors"}
    )
    assert "the index places z in model.safetensors, which does not hold it" in error_of(tmp_path)
    write_index(index, {"a": "model.safetensors"})
    same(load_state_dict(tmp_path), A)


def test_one_file_beside_the_index_of_shards_that_are_gone(tmp_path):
    save(tmp_path / "model.safetensors", ALL)
    write_index(tmp_path / "model.safetensors.index.json", {"a": "model-00001-of-00002.safetensors"})
    same(load_state_dict(tmp_path))


def test_consolidated_beside_shards_follows_the_index(tmp_path):
    save_shards(tmp_path, A, B)
    save(tmp_path / "consolidated.safetensors", {"layers.0.w": torch.ones(1)})
    same(load_state_dict(tmp_path), A | B)
    same(load_state_dict(tmp_path / "consolidated.safetensors"), {"layers.0.w": torch.ones(1)})


@pytest.mark.parametrize("stem", ["pytorch_model", "diffusion_pytorch_model"])
def test_bin_files(tmp_path, stem):
    torch.save(ALL, tmp_path / f"{stem}.bin")
    same(load_state_dict(tmp_path))
    same(load_state_dict(tmp_path / f"{stem}.bin"))


def test_old_bin_files(tmp_path):
    torch.save(ALL, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    same(load_state_dict(tmp_path))


def test_bin_shards(tmp_path):
    files = save_shards(tmp_path, A, B, C, stem="pytorch_model", ext=".bin")
    same(load_state_dict(tmp_path))
    same(load_file(files[2]), C)


def test_safetensors_before_a_left_over_bin_index(tmp_path):
    save_shards(tmp_path, A, stem="pytorch_model", ext=".bin")
    save_shards(tmp_path, B, C)
    same(load_state_dict(tmp_path), B | C)
    (tmp_path / "model.safetensors.index.json").unlink()
    same(load_state_dict(tmp_path), B | C)


def test_shards_in_a_subdirectory_and_links(tmp_path):
    """As in a Hugging Face cache: the shards are links to files of other names."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for name, tensors in (("one", A), ("two", B)):
        save(tmp_path / "blobs" / name, tensors)
        (tmp_path / "snapshot" / f"{name}.safetensors").symlink_to(tmp_path / "blobs" / name)
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    write_index(tmp_path / "snapshot" / "model.safetensors.index.json", weight_map)
    same(load_state_dict(tmp_path / "snapshot"), A | B)
    same(load_file(tmp_path / "snapshot" / "two.safetensors"), B)


def test_metadata_of_the_files_read(tmp_path):
    file = save(tmp_path / "model.safetensors", A, {"format": "pt", "made": "by hand"})
    assert load_checkpoint(file).metadata == {"format": "pt", "made": "by hand"}


def test_headers_alone_are_read(tmp_path):
    """A plan of a file whose data was never written to the disk (a sparse file of 4 GB)."""
    length = 1 << 32
    content = header({"a": {"dtype": "U8", "shape": [length], "data_offsets": [0, length]}}, b"")
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with file.open("r+b") as handle:
        try:
            handle.truncate(len(content) + length)
        except OSError:
            pytest.skip("no sparse files of this size here")
    assert plan_checkpoint(file).tensors["a"].nbytes == length


def test_key_order_is_that_of_load_file(tmp_path):
    names = ["z", "a", "m", "b2", "b10"]
    tensors = {n: torch.zeros(i, dtype=torch.uint8 if i % 2 else torch.float32) for i, n in enumerate(names)}
    file = save(tmp_path / "model.safetensors", tensors)
    assert list(load_state_dict(tmp_path)) == list(original(file))
