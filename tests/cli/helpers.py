"""Running the command line in-process, and checkpoints to run it on."""

from __future__ import annotations

import json
import os
import re
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from neuron_fp8_loader.cli import main

UPDATE = bool(os.environ.get("NEURON_FP8_UPDATE_GOLDEN"))
"""Set to write golden files and docs/cli.md anew instead of comparing with them."""


KEEP = ("--layout", "keep")
"""Shapes and names as on disk, for tests of what every load does."""

_APART: dict[str, Any] = {} if "mix_stderr" not in signature(CliRunner).parameters else {"mix_stderr": False}
"""Click 8.1 is to be asked to keep stderr apart; 8.2 always does."""


def runner(**options: Any) -> CliRunner:
    """Of any click, with stdout and stderr apart."""
    return CliRunner(**_APART, **options)


def run(*args: object) -> Result:
    """Run ``neuron-fp8``; a traceback fails the test."""
    result = runner().invoke(main, [str(arg) for arg in args], prog_name="neuron-fp8")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_json(*args: object, code: int | None = None) -> dict[str, Any]:
    """Run a command with --json; its one object."""
    result = run(*args, "--json")
    assert code is None or result.exit_code == code, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    assert data["schema"] == 1
    return data


def codes(*magnitudes: int, shape: tuple[int, ...]) -> torch.Tensor:
    """float8_e4m3fn whose bytes repeat ``magnitudes``."""
    count = int(torch.Size(shape).numel())
    repeated = (list(magnitudes) * (count // len(magnitudes) + 1))[:count]
    return torch.tensor(repeated, dtype=torch.uint8).view(shape).view(torch.float8_e4m3fn)


HOT, COOL = (0x7E, 0x78, 0x11, 0x85), (0x77, 0x10, 0xF7, 0x00)
"""Codes that do not fit Neuron, and codes that do."""


def layer(number: int, *, hot: bool = True, shape: tuple[int, int] = (32, 16)) -> dict[str, torch.Tensor]:
    """One FP8 linear with its row scale."""
    name = f"model.layers.{number}.mlp.up_proj.weight"
    return {name: codes(*(HOT if hot else COOL), shape=shape), f"{name}_scale": torch.full((shape[0], 1), 0.5)}


def sharded(directory: Path, *shards: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of numbered shards with an index and a config."""
    directory.mkdir(parents=True)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(t.nbytes for tensors in shards for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}')
    return directory


def single(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of one file."""
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    return directory


def one_line(result: Result) -> str:
    """The one line that a broken input must leave on stderr."""
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2, result.output
    assert len(lines) == 1, lines
    assert lines[0].startswith("neuron-fp8: ")
    assert "Traceback" not in result.output
    return lines[0]


def steady(text: str) -> str:
    """Output without what differs from machine to machine and from run to run."""
    return re.sub(r"[\d.]+ [kMGT]?B free", "N GB free", text)
