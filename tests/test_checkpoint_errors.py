"""What is wrong with the files of a checkpoint: every file and tensor named, all problems at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import torch
from support import header, save, save_shards, write_index

from neuron_fp8_loader import load_file, load_state_dict, plan_checkpoint
from neuron_fp8_loader.errors import CheckpointError

A, B, C = ({name: torch.full((2, 3), value)} for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0)))
ALL = A | B | C


def error_of(path: Path) -> str:
    """The text of the error, which a plan gives as a load does."""
    with pytest.raises(CheckpointError):
        load_state_dict(path)
    with pytest.raises(CheckpointError) as error:
        plan_checkpoint(path)
    return str(error.value)


def test_missing_and_extra_shards_are_reported_together(tmp_path):
    files = save_shards(tmp_path, A, B, C)
    files[0].unlink()
    files[2].unlink()
    save(tmp_path / "model-00009-of-00003.safetensors", {"x": torch.ones(1)})
    text = error_of(tmp_path)
    assert "model.safetensors.index.json" in text
    assert "3 problems" in text
    assert "missing shard model-00001-of-00003.safetensors" in text
    assert "missing shard model-00003-of-00003.safetensors" in text
    assert "extra shard model-00009-of-00003.safetensors" in text


def test_missing_shards_without_an_index(tmp_path):
    files = save_shards(tmp_path, A, B, C, {"d": torch.ones(1)}, index=False)
    files[1].unlink()
    files[3].unlink()
    text = error_of(tmp_path)
    assert str(tmp_path) in text
    assert "2 of 4 shards missing: 00002, 00004" in text


def test_index_and_shards_disagree_in_every_way(tmp_path):
    one, two = save_shards(tmp_path, A | {"moved": torch.ones(1)}, B | {"unlisted": torch.ones(1)})
    weight_map = {"a": one.name, "b": two.name, "moved": two.name, "nowhere": one.name}
    index = write_index(tmp_path / "model.safetensors.index.json", weight_map)
    text = error_of(tmp_path)
    assert str(index) in text
    assert "3 problems" in text
    assert f"the index places moved in {two.name}; it is in {one.name}" in text
    assert f"the index places nowhere in {one.name}, which does not hold it" in text
    assert f"unlisted is in {two.name} but not in the index" in text
    assert error_of(one) == text


@pytest.mark.parametrize("index", [True, False])
def test_duplicate_keys(tmp_path, index):
    one, two = save_shards(tmp_path, A | B | {"only here": torch.ones(1)}, B | C | A, index=index)
    text = error_of(tmp_path)
    assert f"a is in {one.name} and again in {two.name}" in text
    assert f"b is in {one.name} and again in {two.name}" in text
    assert "not in the index" not in text


def test_loose_files_without_an_index(tmp_path):
    save(tmp_path / "one.safetensors", A)
    save(tmp_path / "two.safetensors", B)
    text = error_of(tmp_path)
    assert "2 .safetensors files and no index" in text
    assert "one.safetensors, two.safetensors" in text


def test_two_sets_of_shards_without_an_index(tmp_path):
    save_shards(tmp_path, A, B, index=False)
    save_shards(tmp_path, A, B, C, index=False)
    assert "5 .safetensors files and no index" in error_of(tmp_path)


def test_two_indexes(tmp_path):
    save_shards(tmp_path, A, B, stem="one")
    save_shards(tmp_path, A, B, stem="two")
    text = error_of(tmp_path)
    assert "one.safetensors.index.json" in text
    assert "two.safetensors.index.json" in text
    assert sorted(load_state_dict(tmp_path / "two.safetensors.index.json")) == ["a", "b"]


def test_nothing_there(tmp_path):
    assert "no such file" in error_of(tmp_path / "absent")
    assert "no checkpoint here" in error_of(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert "expected a directory, a .safetensors or .bin file, or an index" in error_of(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match="takes one"):
        load_file(tmp_path)


def test_a_dtype_that_an_old_safetensors_does_not_know_is_no_damage(tmp_path, monkeypatch):
    tensor = {"dtype": "F8_E4M3FNUZ", "shape": [24], "data_offsets": [0, 24]}
    (tmp_path / "model.safetensors").write_bytes(header({"a.weight": tensor}))

    def old(*args, **kwargs):  # what 0.6.1 says
        raise safetensors.SafetensorError(
            "Error while deserializing header: invalid JSON in header: unknown variant `F8_E4M3FNUZ`, expected one of "
            "`BOOL`, `F4` at line 1 column 153"
        )

    monkeypatch.setattr(safetensors, "safe_open", old)
    text = error_of(tmp_path)
    assert "does not know the dtype F8_E4M3FNUZ" in text
    assert "pip install --upgrade safetensors" in text
    assert "download" not in text


@pytest.mark.parametrize("cut", [0, 4, 8, 20, -1, -5])
def test_a_truncated_file(tmp_path, cut):
    file = save(tmp_path / "model.safetensors", ALL)
    file.write_bytes(file.read_bytes()[:cut])
    text = error_of(tmp_path)
    assert str(file) in text
    assert "not a complete safetensors file" in text


def test_a_file_with_a_tail(tmp_path):
    file = save(tmp_path / "model.safetensors", ALL)
    file.write_bytes(file.read_bytes() + b"tail")
    assert str(file) in error_of(tmp_path)


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 64,
        header(b"not json at all"),
        header([]),
        header({"a": {**ENTRY, "data_offsets": [0, 20]}}),
        header({"a": {**ENTRY, "data_offsets": [4, 28]}}, b"\0" * 28),
        header({"a": {**ENTRY, "shape": [2, 4]}}),
        header({"a": {**ENTRY, "shape": [-2, 3]}}),
        header({"a": {**ENTRY, "shape": [1 << 40, 1 << 40]}}),
        header({"a": {**ENTRY, "dtype": "F33"}}),
        header({"a": ENTRY, "b": ENTRY}),
        (1 << 63).to_bytes(8, "little") + b"{}",
    ],
)
def test_hostile_headers(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert str(file) in error_of(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "\xff\xfe"],
)
def test_garbage_for_an_index(tmp_path, content):
    save_shards(tmp_path, A, B)
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content.encode("latin-1"))
    assert str(index) in error_of(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "x/../../secret.safetensors", "/etc/secret.safetensors"])
def test_an_index_cannot_lead_outside(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    save(tmp_path / "secret.safetensors", A)
    index = write_index(inside / "model.safetensors.index.json", {"a": name})
    text = error_of(inside)
    assert str(index) in text
    assert "outside its directory" in text


def test_an_index_of_two_formats(tmp_path):
    save(tmp_path / "one.safetensors", A)
    torch.save(B, tmp_path / "two.bin")
    write_index(tmp_path / "model.safetensors.index.json", {"a": "one.safetensors", "b": "two.bin"})
    assert "several formats" in error_of(tmp_path)


class Dangerous:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("content", [{"a": Dangerous()}, [1, 2], "text"])
def test_bin_files_hold_plain_tensors_only(tmp_path, content, capsys):
    file = tmp_path / "pytorch_model.bin"
    torch.save(content, file)
    assert str(file) in error_of(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_a_garbage_bin_file(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"garbage")
    assert "pytorch_model.bin" in error_of(tmp_path)


def test_a_nested_bin_file_with_fp8_inside(tmp_path):
    torch.save({"epoch": 3, "model": {"w": torch.ones(2).to(torch.float8_e4m3fn)}}, tmp_path / "pytorch_model.bin")
    assert "'model' is a dict with FP8 tensors inside" in error_of(tmp_path)


def test_unreadable_dtype(tmp_path):
    content = header({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"\0" * 3)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in error_of(tmp_path)


def test_no_permission(tmp_path):
    file = save(tmp_path / "model.safetensors", A)
    file.chmod(0)
    try:
        file.open("rb").close()
    except PermissionError:
        assert str(file) in error_of(tmp_path)
    finally:
        file.chmod(0o600)
