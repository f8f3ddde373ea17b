"""The options of the command line are those of a load: the same names, words and defaults, the same recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file

from neuron_fp8_loader import Options, load_state_dict
from neuron_fp8_loader.cli import main
from neuron_fp8_loader.options import CHOICES, What
from tests.cli.helpers import one_line, run, run_json
from tests.support import DATA, TINY, same_bytes


@pytest.mark.parametrize("command", ["inspect", "verify", "export"])
def test_every_option_of_a_load(command: str) -> None:
    made = {p.name: p for p in main.commands[command].params if isinstance(p, click.Option)}
    defaults = Options()
    for name in vars(What()).keys() - {"experts", "keep", "qkv"}:  # which tools do not take, tensor by tensor
        assert made[name].opts == [f"--{name.replace('_', '-')}"]
        if name in CHOICES:
            assert tuple(made[name].type.choices) == CHOICES[name]  # type: ignore[attr-defined]
        if name in CHOICES and name != "layout":  # which --for decides
            assert made[name].default == getattr(defaults, name)


@pytest.mark.parametrize("argument", ["--version", "--help", "inspect --help", "config -h"])
def test_help_does_not_wait_for_torch(argument: str) -> None:
    program = (
        "import sys\nfrom neuron_fp8_loader.cli import main\n"
        f"try: main({argument.split()!r}, prog_name='neuron-fp8')\n"
        "except SystemExit as left: code = left.code\n"
        "heavy = {'torch', 'numpy', 'rich', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "neuron-fp8" in done.stdout


@pytest.mark.parametrize(
    ("checkpoint", "options", "keywords"),
    [
        ("hf_fp8_block", ["--layout", "per_channel"], {"layout": "per_channel"}),
        ("modelopt_fp8_kv", ["--layout", "per_tensor"], {"layout": "per_tensor"}),
        ("tiny", ["--dequantize", "*.self_attn.*", "--dequantize", "*.0.mlp.up_proj"],
         {"dequantize": ["*.self_attn.*", "*.0.mlp.up_proj"], "layout": "per_channel"}),
    ],
)  # fmt: skip
def test_inspect_predicts_what_export_writes(
    tmp_path: Path, checkpoint: str, options: list[str], keywords: dict[str, object]
) -> None:
    path, out = TINY if checkpoint == "tiny" else DATA / checkpoint, tmp_path / "out"
    predicted = run_json("inspect", path, *options)["load"]
    exported = run_json("export", path, out, *options, code=0)
    want = load_state_dict(path, **keywords)  # type: ignore[arg-type]
    written = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    names = {name: name.replace("weight_scale_inv", "weight_scale") for name in want}  # as NxD and others know it
    assert written.keys() == set(names.values())
    assert all(same_bytes(written[names[name]], t) for name, t in want.items())
    before = {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}
    weights = [name for name, t in before.items() if t.dtype == torch.float8_e4m3fn]
    assert predicted["dequantized"] == sum(written[name].dtype == torch.bfloat16 for name in weights)
    assert predicted["rescaled"] == exported["rescaled"]
    assert predicted["requantized"] == (len(weights) if checkpoint == "hf_fp8_block" else 0)
    checked = run_json("verify", path, *options, code=0)
    assert checked["values"] == sum(before[name].numel() for name in weights)


def test_what_cannot_be_done_is_said_as_it_was_asked_for(tmp_path: Path) -> None:
    for command, *rest in ("inspect",), ("verify",), ("export", tmp_path / "out"):
        text = one_line(run(command, TINY, *rest, "--dequantize", "*.nothing.*"))
        assert "--dequantize '*.nothing.*' matches no FP8 module" in text
    assert not (tmp_path / "out").exists()
