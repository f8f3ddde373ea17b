"""The examples that run on a CPU are run; of the others, what can be. The rest of them: real_cases.py."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from tests.integrations.conftest import Standin
from tests.integrations.vllm_neuron_standin import Plugin
from tests.support import ROOT, TINY, shared

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


@pytest.mark.parametrize(("name", "dtype"), [("modelopt_fp8_kv", "float8_e4m3fn"), ("hf_fp8_block", "bfloat16")])
def test_the_vllm_neuron_plugin(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, dtype: str
) -> None:
    """On the stand-in, from vllm's LLM to the parameters of every rank."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    importlib.import_module("vllm_neuron_offline").main(str(shared(name)), "2")
    assert capsys.readouterr().out == "The capital of France is (a stand-in)\n"
    loaded = plugin.module("vllm").LLM.loaded
    assert [str(m.model.layers[0].mlp.up_proj_weight.dtype) for m in loaded] == [f"torch.{dtype}"] * 2


@pytest.mark.parametrize("name", ["nxd_inference", "vllm_offline", "model_builder_v1", "model_builder_v2"])
def test_the_others_are_sound_python(name: str) -> None:
    compile((EXAMPLES / f"{name}.py").read_text(), name, "exec")


@pytest.mark.parametrize("name", ["model_builder_v1", "model_builder_v2", "nxd_inference", "vllm_offline"])
def test_without_arguments_an_example_says_what_it_takes(name: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"python examples/{name}.py CHECKPOINT" in done.stderr
    assert "Traceback" not in done.stderr
