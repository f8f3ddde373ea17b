"""What ``neuron-fp8 config`` prints, on the stand-in of NxD Inference: the load that it describes goes through.

``real_config.py`` does the same with the real one, where its sources are at hand.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.helpers import run_json
from tests.integrations.at_hand import FP8, Tensors, dequantized
from tests.integrations.conftest import Standin
from tests.support import CONTROLS, REAL, TINY, ieee_e4m3, shared


def load(nxdi: Standin, path: Path, *args: object) -> Tensors:
    given = run_json("config", path, *args, code=0)["neuron_config"]
    config = nxdi.config.InferenceConfig(nxdi.config.MoENeuronConfig(**given))
    assert config.neuron_config.modules_to_not_convert == given["modules_to_not_convert"]
    app = nxdi.application.NeuronApplicationBase(str(path), config)
    loaded: Tensors = app.checkpoint_loader_fn()
    return loaded


def least(loaded: Tensors, exact: Tensors) -> float:
    """The worst row's SQNR in dB; what is no longer FP8 is rounded to bfloat16, once."""
    worst = np.inf
    for name, value in exact.items():
        got = loaded[name.removeprefix("model.")]
        if got.dtype != FP8:
            assert torch.equal(got, value.to(got.dtype)), name
            continue
        module = name.removeprefix("model.").removesuffix(".weight")
        scale = loaded.get(f"{module}.scale", loaded.get(f"{module}_scale"))
        assert scale is not None
        want, read = value.double().numpy(), ieee_e4m3(got) * scale.double().numpy()
        assert np.isfinite(read).all()
        noise = np.square(want - read).sum(axis=-1)
        worst = min(
            worst, (10 * np.log10(np.square(want).sum(axis=-1)[noise > 0] / noise[noise > 0])).min(initial=np.inf)
        )
    return worst


@pytest.mark.parametrize("name", [name for name in REAL if name not in CONTROLS])
def test_real_checkpoints(enabled: Standin, name: str) -> None:
    path = shared(name)
    exact = dequantized({n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()})
    found = least(load(enabled, path, "--tp", 4), exact)
    assert found > (25 if any(part in name for part in ("_block", "_pb_wo", "split_shards")) else 50)


def test_queries_keys_and_values_with_a_bias_are_listed(enabled: Standin, tmp_path: Path) -> None:
    tensors = {n: t for file in sorted(TINY.glob("*.safetensors")) for n, t in load_file(file).items()}
    for name, tensor in list(tensors.items()):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):  # as in Qwen2, GLM-4.5, Seed-OSS
            tensors[name.removesuffix("weight") + "bias"] = torch.ones(len(tensor), dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    loaded = load(enabled, tmp_path, "--tp", 4)
    kinds = {n.split(".")[-2]: t.dtype for n, t in loaded.items() if n.endswith("_proj.weight")}
    assert {name for name, kind in kinds.items() if kind == torch.bfloat16} == {"q_proj", "k_proj", "v_proj"}
    assert least(loaded, dequantized(tensors)) > 100
