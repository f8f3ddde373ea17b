"""What ``neuron-fp8 config`` prints, on the real NxD Inference: every checkpoint at hand is built and loaded with it.

The keyword arguments are taken from the text, as somebody pastes it; nothing that concerns FP8 or degrees is added.
Every rank and row is held against the dequantized twin of the checkpoint, sharded by the same code.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_fp8_loader import Fp8LoaderError
from neuron_fp8_loader.cli.config import DEMO_MODELS
from tests.cli.helpers import run, run_json
from tests.integrations.at_hand import AT_HAND, Checkpoint, whole_model
from tests.integrations.contributed import there
from tests.integrations.moe_matrix import ROWS
from tests.integrations.real_moe import (
    HALVED,
    MX_BLOCKS,
    REQUANTIZED,
    TYPES,
    Ranks,
    checkpoint,
    misrounded,
    shards,
    worst,
)
from tests.support import shared

# on import it sets seeds by the groups that there are: none yet
demo = importlib.import_module("neuronx_distributed_inference.inference_demo")

Row = tuple[str, str, bool]
WHAT = ("quantized", "quantized_checkpoints_path", "quantization_dtype", "quantization_type", "modules_to_not_convert")
"""Beside ``fp8_rescale`` and degrees, what a set-up must say, so that no default of the harness takes part."""


def pasted(path: Path, *args: object) -> dict[str, Any]:
    """The keyword arguments that the Python of the text makes; --json and vLLM's line say the same."""
    done = run("config", path, *args)
    assert done.exit_code == 0, done.output
    python = done.stdout.partition("# Python\n")[2].partition("\n# vLLM")[0]
    found: list[dict[str, Any]] = []
    exec(python, {"NeuronConfig": lambda **given: found.append(given)})
    (given,) = found
    data = run_json("config", path, *args)
    assert data["neuron_config"] == given
    assert data["additional_config"] == {"override_neuron_config": given}
    (line,) = re.findall(r"--additional-config (.*)", done.stdout)
    assert json.loads(shlex.split(line)[0]) == data["additional_config"]
    assert {*WHAT, "fp8_rescale", "tp_degree"} <= given.keys()
    return given


def loaded(family: str, path: Path, *args: object) -> Ranks:
    given = pasted(path, *args)
    return shards(family, path, given["tp_degree"], **given)


@functools.cache
def twin(family: str, plain: Path, tp: int) -> Ranks:
    return shards(family, plain, tp, quantized=False, torch_dtype="float32", fp8_rescale=False)


def check(ranks: Ranks, twins: Ranks, *, experts: float, others: float) -> set[str]:
    """The least dB of every FP8 row; all else is the twin's, rounded to bfloat16. Returns the FP8 weights' names."""
    found = worst(ranks, twins)
    for name, least in found.items():
        assert least > (experts if ".expert_mlps." in name else others), (name, least)
    for name, codes in misrounded(ranks, twins).items():
        assert codes == 0, (name, codes)
    for rank, other in zip(ranks, twins, strict=True):
        for name, tensor in other.items():
            if name not in found:
                assert torch.equal(rank[name], tensor.to(rank[name].dtype)), name
    return set(found)


def has_blocks(row: Row) -> bool:
    return row[1] in ("block", "mx") and row[:2] != ("dbrx", "mx")


def check_row(row: Row, kind: str, ranks: Ranks, twins: Ranks) -> None:
    family, form, _ = row
    blocks = kind == "blockwise" or row[:2] == ("dbrx", "block")
    exact = form in ("channel", "tensor")
    least = HALVED if exact or blocks else REQUANTIZED
    names = check(ranks, twins, experts=least, others=HALVED if exact else REQUANTIZED)
    # the rows of DBRX's w2 are inputs: no layer of NxD's has scales for them
    floats = row[:2] in (("dbrx", "channel"), ("dbrx", "mx"))
    assert any(".expert_mlps." in name for name in names) != floats
    assert any(".self_attn." in name for name in names) != (family == "glm_moe_dsa")


@functools.cache
def at_hand(found: Checkpoint) -> tuple[Path, Path]:
    return whole_model(found, Path(tempfile.mkdtemp()))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("found", AT_HAND, ids=str)
def test_every_checkpoint_at_hand(found: Checkpoint, tp: int) -> None:
    path, plain = at_hand(found)
    least = REQUANTIZED if found.requantized else HALVED
    ranks = loaded(found.family, path, "--tp", tp)
    names = check(ranks, twin(found.family, plain, tp), experts=least, others=least)
    assert len(names) == found.fp8


FORMS = [
    (row, kind, tp)
    for row in ROWS
    for kind in ("", "blockwise")
    for tp in (1, 2, 4)
    if there(row[0]) and (not kind or has_blocks(row))
]


@pytest.mark.parametrize(("row", "kind", "tp"), FORMS)
def test_every_family(row: Row, kind: str, tp: int) -> None:
    path, plain = checkpoint(*row)
    ranks = loaded(row[0], path, "--tp", tp, *(("--experts", kind) if kind else ()))
    check_row(row, kind, ranks, twin(row[0], plain, tp))


# a refusal, and what would happen to somebody who went on without it; None: nothing bad
REFUSED: list[tuple[Row, tuple[object, ...], str, dict[str, Any] | None]] = [
    (("mixtral", "channel", False), ("--experts", "blockwise"), "no blocks; use 'expert_wise'", TYPES["blockwise"]),
    # as exact by rows: NxD would have the same scales, spread over blocks
    (("mixtral", "tensor", False), ("--experts", "blockwise"), "no blocks; use 'expert_wise'", None),
    (("dbrx", "channel", False), ("--experts", "expert_wise"), "w2 are inputs.*as bfloat16", TYPES["expert_wise"]),
    (("dbrx", "block", False), ("--experts", "expert_wise"), "w2 are inputs.*'blockwise'", TYPES["expert_wise"]),
    (("dbrx", "mx", False), ("--experts", "blockwise"), "no blocks that NxD takes", MX_BLOCKS),
    (("mixtral", "channel", False), ("--tp", 3), "256 cannot be split evenly", {"tp_degree": 3}),
    (
        ("mixtral", "block", False),
        ("--tp", 32, "--experts", "blockwise"),
        "only blocks of 8",
        {"tp_degree": 32, **TYPES["blockwise"]},
    ),
]


@pytest.mark.parametrize(("row", "args", "sentence", "insisted"), REFUSED)
def test_what_is_refused_does_not_load(
    row: Row, args: tuple[object, ...], sentence: str, insisted: dict[str, Any] | None
) -> None:
    path, _ = checkpoint(*row)
    refused = run("config", path, *args)
    assert refused.exit_code != 0
    assert re.search(sentence, " ".join(refused.stderr.split())), refused.stderr
    if insisted is None:
        return
    given = {**pasted(path, "--tp", 1), **insisted}
    given["fp8_rescale"], given["modules_to_not_convert"] = True, ["lm_head"]
    with pytest.raises((Fp8LoaderError, RuntimeError, AssertionError)):
        shards(row[0], path, given["tp_degree"], **given)


@pytest.mark.parametrize("row", [row for row in ROWS if row[0] in ("qwen3_moe", "mixtral", "dbrx")])
def test_inference_demo_is_told_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, row: Row) -> None:
    """Its printed command is run, up to the NeuronConfig that it makes."""
    path, _ = checkpoint(*row)
    args = ("--tp", 2, *(("--experts", "blockwise") if has_blocks(row) else ()))
    given = pasted(path, *args)
    text = run("config", path, *args, "--modules-file", tmp_path / "modules.json").stdout
    (command,) = re.findall(r"^python -c .*?(?=\n\n)", text, re.DOTALL | re.MULTILINE)
    program, *arguments = shlex.split(command.replace("\\\n", " "))[2:]
    made: list[Any] = []
    monkeypatch.setattr(
        demo, "run_inference", lambda model, args: made.append(demo.create_neuron_config(model, args)[1])
    )
    monkeypatch.setattr(demo, "create_neuron_config", demo.create_neuron_config)  # the program replaces it
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    exec(program, {})
    (neuron_config,) = made
    assert {name: vars(neuron_config)[name] for name in given} == given
    # of other models it runs none, and none is printed
    assert set(DEMO_MODELS) == set(demo.MODEL_TYPES)


@pytest.mark.parametrize(("name", "sentence"), [("ct_int8_w8a8", "int8"), ("ct_nvfp4", "NVFP4")])
def test_what_holds_no_fp8_gets_no_set_up(name: str, sentence: str) -> None:
    data = run_json("config", shared(name), "--tp", 2, code=1)
    assert data["neuron_config"] == {"tp_degree": 2}
    assert any(f"no FP8 weights: {sentence}" in note for note in data["notes"])
