"""``neuron-fp8 export``: the copy is what a load gives; interrupted, it leaves nothing half-written and resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from neuron_fp8_loader import WeightError, kernel, load_state_dict
from neuron_fp8_loader.load import parts
from neuron_fp8_loader.tools import export as exporting
from neuron_fp8_loader.tools.export import STATE, ExportError, prepare_export
from neuron_fp8_loader.tools.shards import NOTE
from neuron_fp8_loader.tools.verify import verify_checkpoint
from tests.cli.helpers import KEEP, codes, layer, one_line, run, run_json, sharded, single
from tests.support import CONTROLS, REAL, ROOT, TINY, shared


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    def raw(t: torch.Tensor) -> bytes:
        flat = t.contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""

    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and one[n].shape == other[n].shape and raw(one[n]) == raw(other[n]) for n in one
    )


def on_disk(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", ["tiny", *REAL])
def test_the_copy_is_what_a_load_gives(tmp_path: Path, name: str) -> None:
    path, out = TINY if name == "tiny" else shared(name), tmp_path / "out"
    if name in CONTROLS:
        assert "no FP8 weights" in one_line(run("export", path, out))
        prepare_export(path, out).run()
        assert same(on_disk(out), load_state_dict(path))
        return
    data = run_json("export", path, out, *KEEP, code=0)
    assert data["finished"]
    assert same(on_disk(out), load_state_dict(path))
    for file in path.iterdir():
        copy = out / file.name
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, "pt") as old, safetensors.safe_open(copy, "pt") as new:
                assert old.offset_keys() == new.offset_keys()
                assert {**(old.metadata() or {}), NOTE: new.metadata()[NOTE]} == new.metadata()
                assert json.loads(new.metadata()[NOTE])["weights_rescaled"] == data["rescaled"]
        else:
            assert copy.read_bytes() == file.read_bytes()
    assert {f.name for f in out.iterdir()} == {f.name for f in path.iterdir()} | {STATE}
    again = run_json("export", out, tmp_path / "again", *KEEP, code=0)  # what is converted needs no conversion
    assert again["rescaled"] == 0


def test_pairs_over_shards_are_decided_together(tmp_path: Path) -> None:
    one, two = layer(0), layer(1)
    weight, scale = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale"
    path = sharded(tmp_path / "c", {weight: one[weight]}, {scale: one[scale], **two})
    run("export", path, tmp_path / "out")
    assert same(on_disk(tmp_path / "out"), load_state_dict(path))


def test_memory_is_bounded_by_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is written a few tensors at a time."""
    path = single(tmp_path / "c", {k: v for n in range(8) for k, v in layer(n).items()})
    sizes = []
    load = parts.Parts.load

    def seen(self: parts.Parts, infos: Any) -> Any:
        sizes.append(sum(info.nbytes for info in infos))
        return load(self, infos)

    monkeypatch.setattr(parts.Parts, "load", seen)
    monkeypatch.setattr(parts.batches, "__defaults__", (1000,))
    run("export", path, tmp_path / "out")
    assert len(sizes) > 4
    assert max(sizes) <= 1000
    assert same(on_disk(tmp_path / "out"), load_state_dict(path))


def test_dequantized_weights_make_the_file_longer(tmp_path: Path) -> None:
    path = sharded(tmp_path / "c", {"x.weight": codes(0x7E, 0x01, 0x33, shape=(3, 5)), "y": torch.ones(3)}, layer(0))
    assert "no scale to make up for" in one_line(run("export", path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert run("export", path, tmp_path / "out", "--unscaled", "dequantize").exit_code == 0
    made = on_disk(tmp_path / "out")
    assert same(made, load_state_dict(path, unscaled="dequantize"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in made.values())


def test_bin_and_fnuz(tmp_path: Path) -> None:
    source = tmp_path / "c"
    source.mkdir()
    fnuz = torch.arange(128, dtype=torch.uint8).view(8, 16).view(torch.float8_e4m3fnuz)
    torch.save(layer(0) | {"z.weight": fnuz, "step": 3}, source / "pytorch_model.bin")
    assert run("export", source, tmp_path / "out", *KEEP).exit_code == 0
    made = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert made.pop("step") == 3
    loaded = load_state_dict(source)
    loaded.pop("step", None)
    assert same(made, loaded)
    path = single(tmp_path / "f", {"z.weight": fnuz, "z.weight_scale": torch.ones(1)})
    run("export", path, tmp_path / "out2", *KEEP)
    assert same(on_disk(tmp_path / "out2"), load_state_dict(path))


def test_other_files(tmp_path: Path) -> None:
    path = sharded(tmp_path / "c", layer(0), layer(1))
    (path / "tokenizer").mkdir()
    for name in ("tokenizer/vocab.txt", "model.py", ".hidden", "consolidated.safetensors", "x.gguf"):
        (path / name).write_text(name)
    data = run_json("export", path, tmp_path / "out", code=0)
    assert data["carried_over"] == ["config.json", "model.py", "tokenizer/vocab.txt"]
    assert (tmp_path / "out" / "tokenizer" / "vocab.txt").read_text() == "tokenizer/vocab.txt"
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


def test_a_file_among_many_goes_alone(tmp_path: Path) -> None:
    path = single(tmp_path / "models", layer(0))
    (path / "notes.txt").write_text("not of this model")
    assert run_json("export", path / "model.safetensors", path / "converted", code=0)["carried_over"] == []
    assert same(on_disk(path / "converted"), load_state_dict(path / "model.safetensors"))


def test_what_it_refuses(tmp_path: Path) -> None:
    path = sharded(tmp_path / "c", layer(0), layer(1))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("precious")
    for out, said in (
        (path, "lies in the checkpoint"),
        (path / "deep" / "out", "lies in the checkpoint"),
        (foreign, "not empty"),
        (foreign / "mine.txt", "is a file"),
    ):
        before = sorted(tmp_path.rglob("*"))
        assert said in one_line(run("export", path, out))
        assert sorted(tmp_path.rglob("*")) == before
    assert "s3://bucket/out: is a URL" in one_line(run("export", path, "s3://bucket/out"))
    assert "one of 2 shards" in one_line(run("export", path / "model-00001-of-00002.safetensors", tmp_path / "o"))
    assert run("export", path, tmp_path / "out").exit_code == 0
    assert "other options" in one_line(run("export", path, tmp_path / "out", "--method", "ratio"))
    assert "other files" in one_line(run("export", single(tmp_path / "d", layer(0)), tmp_path / "out"))


def test_refused_weights_leave_nothing(tmp_path: Path) -> None:
    path = sharded(tmp_path / "c", layer(0), {"y.weight": codes(0x7F, shape=(2, 2)), "y.weight_scale": torch.ones(1)})
    with pytest.raises(WeightError):
        prepare_export(path, tmp_path / "out").run()
    assert not (tmp_path / "out").exists()
    assert "NaN codes" in one_line(run("export", path, tmp_path / "out"))


@pytest.mark.parametrize("options", [{"layout": "per_channel"}, {"dequantize": ["*"]}])
@pytest.mark.parametrize("name", ["hf_fp8_block", "derived_split_shards", "modelopt_fp8_kv", "ct_fp8_dynamic_moe"])
def test_an_export_is_what_a_load_with_its_options_gives(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    path, out = shared(name), tmp_path / "out"
    prepare_export(path, out, **options).run()
    wanted = load_state_dict(path, **options)
    written = {n: t for file in out.glob("*.safetensors") for n, t in load_file(file).items()}
    assert written.keys() == wanted.keys()
    for tensor, value in wanted.items():
        assert (written[tensor].dtype, written[tensor].shape) == (value.dtype, value.shape), tensor
        assert torch.equal(written[tensor].view(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), tensor
    checked = verify_checkpoint(path, **options)
    assert checked.ok, checked.problems
    if (out / "model.safetensors.index.json").exists():
        assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].keys() == wanted.keys()


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sharded(tmp_path / "c", layer(0), layer(1))
    needed = run_json("export", path, tmp_path / "out", "--dry-run", code=0)["bytes"]
    assert needed == sum(f.stat().st_size for f in path.iterdir() if f.suffix != ".json" or f.name == "config.json")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    assert "needed" in one_line(run("export", path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_two_at_once(tmp_path: Path) -> None:
    path = sharded(tmp_path / "c", layer(0), layer(1))
    export = prepare_export(path, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with exporting._locked(tmp_path / "out"), pytest.raises(ExportError, match="another export"):
        export.run()


@contextmanager
def failing_at(monkeypatch: pytest.MonkeyPatch, shard: str, error: BaseException) -> Iterator[None]:
    """Break off in the middle of writing ``shard``."""
    load = parts.Parts.load
    count = {"n": 0}

    def breaking(self: parts.Parts, infos: Any) -> Any:
        if infos[0].file.name == shard:
            count["n"] += 1
            if count["n"] == 2:
                raise error
        return load(self, infos)

    with monkeypatch.context() as patch:
        patch.setattr(parts.Parts, "load", breaking)
        patch.setattr(parts.batches, "__defaults__", (600,))
        yield


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_broken_off_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    path, out = sharded(tmp_path / "c", layer(0), layer(1), layer(2)), tmp_path / "out"
    with failing_at(monkeypatch, "model-00002-of-00003.safetensors", error):
        result = run("export", path, out)
    assert result.exit_code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert len(result.stderr.strip().splitlines()) == 1
    assert {f.name for f in out.iterdir()} == {STATE, "config.json", "model-00001-of-00003.safetensors"}
    assert run("inspect", out).exit_code == 2  # nothing that looks finished
    first = (out / "model-00001-of-00003.safetensors").stat().st_mtime_ns
    (out / "model-00002-of-00003.safetensors.partial").write_bytes(b"left by a kill")
    assert run_json("export", path, out, code=0)["shards_resumed"] == 1
    assert (out / "model-00001-of-00003.safetensors").stat().st_mtime_ns == first
    assert not list(out.glob("*.partial"))
    assert same(on_disk(out), load_state_dict(path))
    assert "finished already" in run("export", path, out).stdout


def test_a_changed_original_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = sharded(tmp_path / "c", layer(0), layer(1)), tmp_path / "out"
    with failing_at(monkeypatch, "model-00002-of-00002.safetensors", KeyboardInterrupt()):
        run("export", path, out)
    os.utime(path / "model-00001-of-00002.safetensors", (1, 1))
    assert "delete it" in one_line(run("export", path, out))


@pytest.mark.skipif(kernel.active != kernel.paths()[0], reason="tested with the fastest kernel path")
def test_sigint_to_the_process(tmp_path: Path) -> None:
    """The real signal, to a process that takes its time over the second of two shards."""
    many = {name: tensor for number in range(1, 200) for name, tensor in layer(number).items()}
    path, out = sharded(tmp_path / "c", layer(0), many), tmp_path / "out"
    program = (
        "import time, neuron_fp8_loader.load.parts as p\n"
        "load = p.Parts.load\n"
        "p.batches.__defaults__ = (600,)\n"
        "p.Parts.load = lambda self, infos: (time.sleep(0.05), load(self, infos))[1]\n"
        "from neuron_fp8_loader.cli import main\n"
        "main(prog_name='neuron-fp8')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, "export", str(path), str(out)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("model-00002*.partial")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.strip() == "neuron-fp8: interrupted"
    assert {f.name for f in out.iterdir()} == {STATE, "config.json", "model-00001-of-00002.safetensors"}
    assert run("export", path, out).exit_code == 0
    assert same(on_disk(out), load_state_dict(path))


def test_an_interrupt_before_the_system_says_that_a_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.open

    def interrupted(path: Any, *args: Any, **kwargs: Any) -> int:
        handle = really(path, *args, **kwargs)
        if str(path).endswith("safetensors.partial"):
            os.close(handle)
            raise KeyboardInterrupt
        return handle

    path, out = sharded(tmp_path / "c", layer(0), layer(1)), tmp_path / "out"
    monkeypatch.setattr(os, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_export(path, out).run()
    assert not list(out.glob("*.partial"))


def test_split_shards_of_a_real_checkpoint(tmp_path: Path) -> None:
    path = shared("derived_split_shards")
    run("export", path / "model.safetensors.index.json", tmp_path / "out", *KEEP)
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (path / index).read_bytes()
    assert run("verify", tmp_path / "out", "--against", path).exit_code == 0


# -- a directory that others can write to ------------------------------------------------------------------------


@pytest.mark.parametrize("ext", [".safetensors", ".bin"])
def test_a_planted_link_is_not_followed(tmp_path: Path, ext: str) -> None:
    """A link under the name that each file has before it is whole, to a file that is not ours."""
    path, out, theirs = tmp_path / "c", tmp_path / "out", tmp_path / "theirs"
    if ext == ".bin":
        path.mkdir()
        torch.save(layer(0), path / "pytorch_model.bin")
        (path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    else:
        sharded(path, layer(0), {"norm.weight": torch.ones(3)})
    made = prepare_export(path, out)
    made.state = made._decided()
    out.mkdir()
    (out / STATE).write_text(json.dumps(made.state))  # an export that was broken off
    theirs.write_text("precious")
    for name in [STATE, *(file.name for file in path.iterdir())]:
        (out / f"{name}.partial").symlink_to(theirs)
    prepare_export(path, out).run()
    assert theirs.read_text() == "precious"
    assert {file.name for file in out.iterdir()} == {STATE, *(file.name for file in path.iterdir())}
    assert not any(file.is_symlink() for file in out.iterdir())
    assert run("verify", out, "--against", path).exit_code == 0


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("kind", ["shards", "configs"])
def test_a_linked_subdirectory_is_not_followed(tmp_path: Path, kind: str, started: bool) -> None:
    """Nor is it taken for the export's own; OUT itself may be a link."""
    path, out, theirs = tmp_path / "c", tmp_path / "out", tmp_path / "theirs"
    for directory in (path / "sub" / "deep", out, theirs / "deep"):
        directory.mkdir(parents=True)
    if kind == "shards":
        file = "sub/deep/model-00001-of-00001.safetensors"
        save_file(layer(0), path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(layer(0), file)}))
    else:
        save_file(layer(0), path / "model.safetensors")
        (path / "config.json").write_text("{}")
        (path / "sub" / "deep" / "vocab.txt").write_text("x")
    made = prepare_export(path, out)
    made.state = made._decided()
    linked = tmp_path / "linked"
    linked.symlink_to(out)
    if started:
        (out / STATE).write_text(json.dumps(made.state))
        (out / "sub").symlink_to(theirs)
        with pytest.raises(ExportError, match="is a link or no directory"):
            prepare_export(path, linked)
    else:  # planted while it runs, after all has been checked
        (out / "sub").symlink_to(theirs)
        with pytest.raises(ExportError, match="is a link or no directory"):
            made.run()
    assert not [file for file in theirs.rglob("*") if file.is_file()]
    (out / "sub").unlink()
    prepare_export(path, linked).run()
    assert (out / "sub" / "deep").is_dir()
    assert run("verify", out, "--against", path).exit_code == 0


def test_a_link_in_the_place_of_a_shard_is_not_taken_for_it(tmp_path: Path) -> None:
    path, out, theirs = sharded(tmp_path / "c", layer(0), layer(1)), tmp_path / "out", tmp_path / "theirs"
    theirs.write_text("precious")
    made = prepare_export(path, out)
    out.mkdir()
    (out / STATE).write_text(json.dumps(made._decided()))
    first = sorted(path.glob("*.safetensors"))[0].name
    (out / first).symlink_to(theirs)
    prepare_export(path, out).run()
    assert theirs.read_text() == "precious"
    assert same(on_disk(out), load_state_dict(path))


@pytest.mark.parametrize("planted", [False, True])
def test_a_run_killed_as_it_wrote_its_note_is_resumed(tmp_path: Path, planted: bool) -> None:
    path, out, theirs = sharded(tmp_path / "c", layer(0)), tmp_path / "out", tmp_path / "theirs"
    out.mkdir()
    left = out / f"{STATE}.partial"
    if planted:
        theirs.write_text("precious")
        left.symlink_to(theirs)
    else:
        left.write_text('{"version": "0.1')
    assert run("export", path, out).exit_code == 0
    assert not planted or theirs.read_text() == "precious"
    assert same(on_disk(out), load_state_dict(path))


def test_anything_else_in_it_is_still_refused(tmp_path: Path) -> None:
    path, out = sharded(tmp_path / "c", layer(0)), tmp_path / "out"
    out.mkdir()
    (out / f"{STATE}.partial").write_text("{")
    (out / "thesis.tex").write_text("years of work")
    assert "not an export of ours" in one_line(run("export", path, out))
    assert {f.name for f in out.iterdir()} == {f"{STATE}.partial", "thesis.tex"}


def test_a_directory_in_the_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    path, out = sharded(tmp_path / "c", layer(0)), tmp_path / "out"
    (out / f"{STATE}.partial").mkdir(parents=True)
    assert f"{STATE}.partial" in one_line(run("export", path, out))
