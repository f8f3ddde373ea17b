"""What ``neuron-fp8 config`` prints, on the stand-in of NxD Inference: the load that it describes goes through.

``real_config.py`` does the same with the real one, where its sources are at hand.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.cli.helpers import run_json
from tests.integrations.at_hand import FP8, Tensors, dequantized
from tests.integrations.conftest import Standin
from tests.support import CONTROLS, REAL, ieee_e4m3, shared


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
