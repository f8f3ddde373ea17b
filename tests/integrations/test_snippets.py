"""The Python of the pages runs, and the commands that they name are commands that there are."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import neuron_fp8_loader
from neuron_fp8_loader import conventions
from neuron_fp8_loader.cli import main
from tests import mimo
from tests.integrations.conftest import Standin
from tests.support import ROOT, blob, random_codes, save

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.S | re.M)
ELSEWHERE = ("s3://", "download=True")
"""What asks the network is run against servers of their own: test_store.py, test_hub.py."""


def _python() -> Iterator[Any]:
    for page in PAGES:
        for number, (indent, language, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
            if language == "python":
                code = re.sub(f"^{indent}", "", text, flags=re.M).replace(", ...)", ")")  # what the reader adds
                yield pytest.param(code, id=f"{page.name}-{number}")


def checkpoint(directory: Path) -> Path:
    """Two FP8 layers of attention and experts, of sizes that the pages' slices fit, with one scale a row."""
    directory.mkdir()
    tensors = {"lm_head.weight": torch.zeros(4096, 32, dtype=torch.bfloat16)}
    shapes = {"self_attn.q_proj": (1024, 32), "self_attn.o_proj": (32, 1024), "self_attn.k_proj": (64, 32)}
    shapes |= {f"mlp.experts.{e}.{p}_proj": (64, 32) for e in range(2) for p in ("gate", "up")}
    shapes |= {f"mlp.experts.{e}.down_proj": (32, 64) for e in range(2)}
    for seed, (module, shape) in enumerate(shapes.items()):
        tensors[f"model.layers.0.{module}.weight"] = random_codes(shape, seed)
        tensors[f"model.layers.0.{module}.weight_scale"] = torch.full((shape[0], 1), 0.5)
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(2, 32, dtype=torch.bfloat16)
    save(directory / "model.safetensors", tensors, {"format": "pt"})
    (directory / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": 2}')
    return directory


def module_for(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module whose state dict has these names, shapes and dtypes."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in dict(at.named_children()):
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.register_buffer(last, torch.empty_like(tensor))
    return root


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nxdi: Standin) -> Iterator[dict[str, Any]]:
    """The names that the pages take for granted."""
    monkeypatch.chdir(tmp_path)
    ckpt = checkpoint(tmp_path / "Llama-3.1-8B-FP8")
    for file in ("model.safetensors", "model-00001-of-00109.safetensors"):
        (tmp_path / file).symlink_to(ckpt / "model.safetensors")
    (tmp_path / "checkpoint").symlink_to(ckpt)
    before = conventions.conventions()

    def load() -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(ckpt / "model.safetensors")

    def build(router: None, tp_degree: int, checkpoint_loader: Any) -> None:
        fits(checkpoint_loader())

    def config(**settings: Any) -> None:
        made = nxdi.config.NeuronConfig(**settings)
        assert made.modules_to_not_convert == ["lm_head"]

    yield {
        **{name: getattr(neuron_fp8_loader, name) for name in neuron_fp8_loader.__all__},
        "NeuronConfig": config,
        "ModelBuilder": build,
        "ckpt": str(ckpt),
        "path": str(ckpt),
        "load": load,
        "state_dict": load(),
        "module": module_for(load()),
        "model": None,
        "shard_checkpoint": lambda state_dict, model: fits(state_dict),
        "rank": 1,
        "tp": 2,
    }
    for convention in conventions.conventions():
        if convention not in before:
            conventions.unregister(convention.name)


def fits(tensors: dict[str, torch.Tensor]) -> None:
    """No FP8 code above +-240: bytes of magnitude 0x77 at most."""
    weights = [t for t in tensors.values() if t.dtype == torch.float8_e4m3fn]
    assert weights
    assert max(byte & 0x7F for t in weights for byte in set(blob(t))) <= 0x77


@pytest.mark.parametrize("code", list(_python()))
def test_python_of_the_pages_runs(code: str, world: dict[str, Any], tmp_path: Path) -> None:
    if any(words in code for words in ELSEWHERE):
        assert compile(code, "page", "exec")
        return
    if "dcp" in code:
        dcp = pytest.importorskip("torch.distributed.checkpoint")
        if not hasattr(dcp, "HuggingFaceStorageReader"):
            pytest.skip("this torch has no HuggingFaceStorageReader")
        alone = partial(dcp.load, no_dist=True)
        world["dcp"] = SimpleNamespace(load=alone)
    if "qkv" in code:
        world["ckpt"] = str(mimo.checkpoint().write(tmp_path / "mimo"))
    exec(code, world)
    for name in ("state_dict", "shard", "part", "moe"):
        if f"{name} = " in code and "bfloat16" not in code:
            fits(world[name])
    if "rescale_on_load" in code:
        fits(world["module"].state_dict())


def _commands() -> Iterator[Any]:
    """Each `neuron-fp8 ...`, in blocks and in running text, without what does not belong to it."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = re.findall(r"`(?:\.venv/bin/)?(neuron-fp8 [^`]+)`", BLOCK.sub("", text))
        for _, _, block in BLOCK.findall(text):
            lines = block.splitlines()
            found += [line.removeprefix("$ ") for line in lines if re.match(r"(\$ )?neuron-fp8 ", line)]
        yield from (pytest.param(command, id=f"{page.name}: {command}") for command in dict.fromkeys(found))


@pytest.mark.parametrize("command", list(_commands()))
def test_commands_of_the_pages_are_taken(command: str) -> None:
    words = shlex.split(re.sub(r"\s+", " ", command), comments=True)[1:]
    name, *args = words
    if name.startswith("-"):
        assert name in ("--version", "--help")
        return
    if args:  # else it is the command's name alone
        main.commands[name].make_context(name, args)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", ["README.md", "docs/use.md"])
def test_vllms_additional_config(page: str, enabled: Standin, tmp_path: Path) -> None:
    ckpt = checkpoint(tmp_path / "ckpt")
    found = re.findall(r"--additional-config ('\{.*?\}\}')", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    assert found
    for text in found:
        given = json.loads(text.strip("'").replace("'$CKPT'", "CKPT").replace("CKPT", str(ckpt)))
        made = enabled.config.NeuronConfig(**given["override_neuron_config"])
        assert made.modules_to_not_convert == ["lm_head"]
