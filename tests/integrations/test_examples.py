"""The examples that run on a CPU are run; of the others, what can be. The rest of them: real_cases.py."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from tests.integrations.conftest import Standin
from tests.support import ROOT, TINY

EXAMPLES = ROOT / "examples"


def test_plain_torch() -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "plain_torch.py"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "as it is:        256 of 256 outputs are NaN",
        "rescale_on_load: 0 of 256 outputs are NaN",
    ]


def test_vllms_additional_config_is_what_neuron_config_takes(
    enabled: Standin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    override = importlib.import_module("vllm_offline").additional_config(str(TINY))["override_neuron_config"]
    config = enabled.config.NeuronConfig(**override)
    assert config.modules_to_not_convert == ["lm_head"]
    assert enabled.application.NeuronApplicationBase.get_state_dict(str(TINY), enabled.config.InferenceConfig(config))


@pytest.mark.parametrize("name", ["nxd_inference", "vllm_offline", "model_builder_v1", "model_builder_v2"])
def test_the_others_are_sound_python(name: str) -> None:
    compile((EXAMPLES / f"{name}.py").read_text(), name, "exec")
