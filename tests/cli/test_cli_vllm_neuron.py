"""``config --for vllm-neuron`` and what ``doctor`` says of that plugin."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from neuron_fp8_loader.codes.device import PLATFORM_ENV
from neuron_fp8_loader.integrations.vllm_neuron.flag import ENV, GUARD_ENV
from neuron_fp8_loader.tools import doctor
from tests.cli.helpers import run, run_json
from tests.support import TINY, shared


@pytest.mark.parametrize(
    ("name", "platform", "kept", "words"),
    [
        ("modelopt_fp8_kv", "trn2", True, "kept FP8 in the plugin's static layers, rescaled by half"),
        ("modelopt_fp8_kv", "trn3", True, "trn3 reads e4m3fn as it is"),
        ("hf_fp8_block", "trn2", False, "self_attn.q_proj has one scale per block 128x128"),
        ("ct_fp8_dynamic_moe", "trn3", False, "no static FP8 layers for Qwen3MoeForCausalLM"),
    ],
)
def test_config(monkeypatch: pytest.MonkeyPatch, name: str, platform: str, kept: bool, words: str) -> None:
    monkeypatch.setenv(PLATFORM_ENV, platform)
    data = run_json("config", shared(name), "--for", "vllm-neuron", "--tp", 4, code=0)
    path = str(shared(name).resolve())
    assert data["command"] == ["vllm", "serve", path, "--quantization", "neuron_fp8", "--tensor-parallel-size", "4"]
    assert data["kept"] is kept
    assert words in data["design"]
    text = run("config", shared(name), "--for", "vllm-neuron", "--tp", 4).stdout
    assert shlex.split(text.splitlines()[1]) == data["command"]
    assert "export NEURON_FP8_LOADER=1" in text
    assert f"# weights: {data['design']}" in text
    assert ("as bfloat16, weights take twice" in text) is not kept


@pytest.mark.parametrize(("tp", "told"), [(1, False), (2, False), (3, True), (4, False), (8, True)])
def test_config_tells_of_heads_that_do_not_divide(tp: int, told: bool) -> None:
    data = run_json("config", TINY, "--for", "vllm-neuron", "--tp", tp, code=0)
    assert any(f"--tensor-parallel-size {tp} does not divide the model's 4" in note for note in data["notes"]) is told


def test_config_with_another_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLATFORM_ENV, "trn2")
    text = run("config", shared("modelopt_fp8_kv"), "--for", "vllm-neuron", "--method", "ratio").stdout
    assert text.splitlines()[1].startswith("NEURON_FP8_LOADER=ratio vllm serve ")
    assert "rescaled by ratio" in text


@pytest.mark.parametrize("stack", ["nxd", "vllm-neuron"])
def test_config_without_the_models_config(tmp_path: Path, stack: str) -> None:
    def notes() -> str:
        return str(run_json("config", tmp_path, "--for", stack)["notes"])

    (tmp_path / "model.safetensors").symlink_to(TINY / "model.safetensors")
    assert "no config.json" in notes()
    (tmp_path / "config.json").symlink_to(TINY / "config.json")
    assert "no config.json" not in notes()


def test_config_without_fp8(tmp_path: Path) -> None:
    done = run("config", shared("ct_nvfp4"), "--for", "vllm-neuron")
    assert (done.exit_code, "no FP8 weights: NVFP4" in done.stdout) == (1, True)
    done = run("config", shared("modelopt_fp8_kv"), "--for", "vllm-neuron", "--modules-file", tmp_path / "m")
    assert (done.exit_code, "NxD Inference" in done.stderr) == (2, True)


def test_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm_neuron" / "utils").mkdir(parents=True)
    (tmp_path / "vllm_neuron" / "utils" / "checkpoints.py").write_text("")

    def said() -> str:
        return "\n".join(f"{f.level} {f.text}" for f in doctor.examine() if f.topic == "vllm")

    for name in (ENV, GUARD_ENV):
        monkeypatch.delenv(name, raising=False)
    assert "--quantization neuron_fp8" not in said()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "--quantization neuron_fp8 is its flag" in said()
    monkeypatch.setenv(ENV, "1")
    monkeypatch.setenv(GUARD_ENV, "0")
    assert f"ok {ENV} is set" in said()
    assert f"note {GUARD_ENV} is off" in said()
    monkeypatch.setenv(ENV, "nonsense")
    assert f"problem {ENV}=nonsense: expected 1, half" in said()
