"""The hook in vLLM and its Neuron plugin: gates, guard, and that nothing is broken or left behind."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuron_fp8_loader import OptionError, WeightError, neuron_view
from neuron_fp8_loader.integrations import vllm_neuron
from neuron_fp8_loader.integrations.post_import import PostImport
from neuron_fp8_loader.integrations.vllm import register
from neuron_fp8_loader.integrations.vllm_neuron.design import declares
from neuron_fp8_loader.integrations.vllm_neuron.flag import ENV, GUARD_ENV
from tests.integrations.test_vllm_neuron_static import MODELOPT, projections
from tests.integrations.vllm_neuron_standin import PACKAGES, STANDIN, Plugin, in_a_worker, static_llama
from tests.oracle import bf16_reference
from tests.support import ROOT, digests, random_codes, save, shared

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def test_without_the_flag_the_gates_are_as_they_were(plugin: Plugin, tmp_path: Path) -> None:
    path = static_llama(tmp_path, projections(), {"quantization_config": FP8})
    with pytest.raises(ValueError, match="fp8 quantization is currently not supported in neuron"):
        plugin.configure(path)
    with pytest.raises(ValueError, match="only supports compressed-tensors for KV cache"):
        plugin.configure(shared("ct_fp8_dynamic_moe"))


NONSENSE = [
    {"architectures": ["Qwen3ForCausalLM"], "quantization_config": MODELOPT},
    {"architectures": ["Qwen3ForCausalLM"], "quantization_config": FP8, "overrides": {"quantization_config": {}}},
]


@pytest.mark.parametrize("config", NONSENSE, ids=["modelopt", "overridden"])
def test_never_nonsense_in_silence(
    plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    """What the plugin loads without a word today: FP8 bytes cast to bfloat16, their scales dropped."""
    config = dict(config)
    overrides = config.pop("overrides", None)
    before = projections()
    path = static_llama(tmp_path, before, config)
    with pytest.raises(WeightError, match=rf"_proj_weight: torch.float8_e4m3fn(.|\n)*{ENV}=1(.|\n)*{GUARD_ENV}=0"):
        plugin.load(path, hf_overrides=overrides)
    monkeypatch.setenv(GUARD_ENV, "0")
    o = before["model.layers.0.self_attn.o_proj.weight"]
    loaded = plugin.load(path, hf_overrides=overrides).model.layers[0].self_attn.o_proj_weight
    assert torch.equal(loaded, o.bfloat16().T)
    monkeypatch.delenv(GUARD_ENV)
    loaded = plugin.load(path, hf_overrides=overrides, quantization="neuron_fp8").model.layers[0].self_attn
    scale = before["model.layers.0.self_attn.o_proj.weight_scale"].double()
    assert torch.equal(loaded.o_proj_weight, (o.double() * scale).float().bfloat16().T)


def test_the_guard_watches_load_sharded_too(plugin: Plugin, tmp_path: Path) -> None:
    plugin.module("vllm.plugins").load_general_plugins()
    static_llama(tmp_path, projections(), {})
    name = "model.layers.0.mlp.up_proj.weight"
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        model = torch.nn.Module()
        model.up = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        checkpoint = plugin.checkpoints.SafetensorsCheckpoint(str(tmp_path))
        if dtype == torch.bfloat16:
            with pytest.raises(WeightError, match=r"up: torch\.float8_e4m3fn for torch\.bfloat16"):
                checkpoint.load_sharded(0, 1, model, {"up": name}, torch.device("cpu"))
        else:
            assert (
                checkpoint.load_sharded(0, 1, model, {"up": name}, torch.device("cpu")).state_dict["up"].dtype == dtype
            )


@pytest.mark.parametrize("name", ["ct_nvfp4", "ct_int8_w8a8"])
def test_other_formats_are_left_to_vllm(plugin: Plugin, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = shared(name)
    errors = []
    for flag in ("", "1"):
        monkeypatch.setenv(ENV, flag)
        with pytest.raises(ValueError, match=r".") as info:
            plugin.configure(path)
        errors.append(str(info.value))
    assert errors[0] == errors[1]
    monkeypatch.delenv(ENV)
    with pytest.raises(OptionError, match=r"holds no float8_e4m3fn weights.*compressed-tensors"):
        plugin.configure(path, quantization="neuron_fp8")


def test_a_bfloat16_model_is_not_touched_by_the_environment(
    plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {n: t.bfloat16() if t.dtype == torch.float8_e4m3fn else t for n, t in projections().items()}
    before = {n: t for n, t in before.items() if not n.endswith("_scale")}
    path = static_llama(tmp_path, before, {})
    monkeypatch.setenv(ENV, "1")
    config = plugin.configure(path)
    assert (config.model_config.quantization, config.additional_config) == (None, {})
    got = plugin.worker(config).load_model().model.model.layers[0].mlp.up_proj_weight
    assert torch.equal(got, before["model.layers.0.mlp.up_proj.weight"].T)


def test_the_name_reaches_the_workers_and_ends_with_the_model(
    plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are processes of their own: what they inherit is the environment."""
    path = static_llama(tmp_path, projections(), {"quantization_config": MODELOPT})
    plugin.configure(path, quantization="neuron_fp8")
    assert os.environ[ENV] == "1"
    plugin.configure(path)  # another model, without the flag
    assert ENV not in os.environ


def test_one_line_says_what_happens(plugin: Plugin, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = static_llama(tmp_path, projections(), {"quantization_config": MODELOPT})
    caplog.set_level("INFO", logger="vllm.neuron_fp8_loader")
    for rank in (0, 1):
        plugin.load(path, quantization="neuron_fp8", rank=rank, tp=2)
    lines = [r.getMessage() for r in caplog.records if r.name == "vllm.neuron_fp8_loader"]
    said = f"neuron_fp8_loader: {path}: kept FP8 in the plugin's static layers, rescaled by half"
    assert lines == [said, f"neuron_fp8_loader: {path}: 7 FP8 weights: 7 as FP8, rescaled by half", said]


def test_nothing_is_written(plugin: Plugin, tmp_path: Path) -> None:
    path = static_llama(tmp_path, projections(), {"quantization_config": MODELOPT})
    before = digests(path)
    plugin.load(path, quantization="neuron_fp8")
    assert digests(path) == before


def test_models_registered_early_are_overwritten(plugin: Plugin, tmp_path: Path) -> None:
    """By the plugin's worker: what acts is at the reading point, which no registration moves."""
    registry = plugin.module("vllm.registry").ModelRegistry
    registry.register_model("LlamaForCausalLM", object)
    path = static_llama(tmp_path, projections(), {"quantization_config": MODELOPT})
    model = plugin.load(path, quantization="neuron_fp8")
    assert registry.models["LlamaForCausalLM"] is type(model)
    assert model.model.layers[0].mlp.up_proj_weight.dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("text", ["2", "{", '{"layout": "per_channel"}', '{"nonsense": 1}', '{"dequantize": ["a"]}'])
def test_a_flag_that_cannot_be(plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = static_llama(tmp_path, projections(), {"quantization_config": FP8})
    monkeypatch.setenv(ENV, text)
    with pytest.raises(OptionError, match=ENV):
        plugin.configure(path)


# -- versions that are not known -----------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", ["_get_slice", "_process_param", "load_sharded_pipelined"])
def test_an_unknown_reader_stays_as_it_is(
    plugin: Plugin, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    checkpoint = plugin.checkpoints.SafetensorsCheckpoint
    setattr(checkpoint, f"{absent}_of_another_version", getattr(checkpoint, absent))
    delattr(checkpoint, absent)
    before = dict(vars(checkpoint))
    path = static_llama(tmp_path, projections(), {"quantization_config": FP8})
    for kwargs, text in (({}, "not supported in neuron"), ({"quantization": "neuron_fp8"}, "does not match")):
        with pytest.raises(ValueError, match=text):  # vLLM's own words
            plugin.configure(path, **kwargs)
    monkeypatch.setenv(ENV, "1")
    with pytest.raises(ValueError, match="not supported in neuron"):
        plugin.configure(path)
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 1
    assert f"SafetensorsCheckpoint has no {absent}; this version of vllm_neuron is not known" in warned[0]
    assert dict(vars(checkpoint)) == before
    with pytest.raises(OptionError, match="reads checkpoints in a way"):  # no config that vLLM could object to
        plugin.configure(static_llama(tmp_path / "b", projections(), {}), quantization="neuron_fp8")


def test_unknown_static_layers_rescale_once_more(
    plugin: Plugin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their own 240/448 cannot be switched off: weights times scales stay right, and are rounded once more."""
    static = plugin.module("vllm_neuron.model.llama3.model_static_fp8")
    source = Path(static.__file__).read_text().replace("_needs_downscale", "_another_name")
    del static._needs_downscale
    exec(source, vars(static))
    before = projections()
    path = static_llama(tmp_path, before, {"quantization_config": MODELOPT})
    mlp = plugin.load(path, quantization="neuron_fp8").model.layers[0].mlp
    assert "model_static_fp8 has no _needs_downscale" in caplog.text
    down, scale = (before[f"model.layers.0.mlp.down_proj.{what}"] for what in ("weight", "weight_scale"))
    assert torch.equal(mlp.down_weight_scale, (scale * 2 * (448 / 240)).expand(128, 1))
    got = neuron_view(mlp.down_proj_weight.data).double() * mlp.down_weight_scale[0, 0].double()
    want = down.double().T * scale.double()
    assert (got - want).abs().max() <= want.abs().max() / 16  # a code's half step, at the top


def test_an_exception_of_ours_does_not_reach_the_import(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from neuron_fp8_loader.integrations.vllm_neuron import hook

    def fail(*args: object) -> bool:
        raise RuntimeError("out of order")

    monkeypatch.setattr(hook, "_wrap", fail)
    register()
    assert plugin.checkpoints.SafetensorsCheckpoint
    assert plugin.module("vllm_neuron.vllm.platform").NeuronPlatform
    assert caplog.text.count("RuntimeError: out of order") == 2


def test_registering_that_fails_is_logged(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ImportError("half an installation")

    monkeypatch.setattr(vllm_neuron, "enable", fail)
    register()
    assert "half an installation" in caplog.text
    assert "the vLLM Neuron plugin stays as it is" in caplog.text


# -- coming and going ----------------------------------------------------------------------------------------------


def _state(plugin: Plugin) -> list[Any]:
    modules = [plugin.module(f"vllm_neuron.{name}") for name in ("utils.checkpoints", "vllm.platform")]
    static = [
        plugin.module(f"vllm_neuron.model.llama3.{n}") for n in ("model_static_fp8", "weight_loaders_static_fp8")
    ]
    quantization = plugin.module("vllm.model_executor.layers.quantization")
    return [
        dict(vars(modules[0].SafetensorsCheckpoint)),
        dict(vars(modules[1].NeuronPlatform)),
        list(modules[1].NeuronPlatform.supported_quantization),
        *[dict(vars(module)) for module in static],
        list(quantization.QUANTIZATION_METHODS),
    ]


@pytest.mark.parametrize("when", ["before", "after"])
def test_enable_and_disable(plugin: Plugin, when: str) -> None:
    """Twice each; before the imports, and after them."""
    if when == "after":
        before = _state(plugin)
    for _ in range(2):
        vllm_neuron.enable()
    during = _state(plugin)
    assert during[-1][-1] == during[2][-1] == "neuron_fp8"
    assert during[2].count("neuron_fp8") == 1
    assert during[0]["_get_slice"].__wrapped__
    for _ in range(2):
        vllm_neuron.disable()
    after = _state(plugin)
    if when == "after":
        assert after == before
    assert "neuron_fp8" not in after[2] + after[-1]
    assert not hasattr(after[0]["_get_slice"], "__wrapped__")


def test_nothing_is_imported_early() -> None:
    """As in a process of vLLM's: the plugin is loaded, nothing of vLLM is; and again while a module is imported."""
    code = (
        "import sys\n"
        "from neuron_fp8_loader.integrations.vllm import register\n"
        "register()\n"
        f"assert not [m for m in sys.modules if m.split('.')[0] in {PACKAGES!r}]\n"
        "from vllm_neuron.utils.checkpoints import SafetensorsCheckpoint\n"
        "print(SafetensorsCheckpoint._neuron_fp8_reads)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{STANDIN}:{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "True\n"


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers(plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    """What a worker inherits is the environment, and of a fork the hook, which is enabled a second time there."""
    weight = random_codes((8, 64))
    save(tmp_path / "model.safetensors", {"a.weight": weight, "a.weight_scale": torch.full((8, 1), 0.3)})
    monkeypatch.setenv(ENV, "1")
    register()
    assert plugin.checkpoints.SafetensorsCheckpoint._neuron_fp8_reads
    context = multiprocessing.get_context(start)
    parent, child = context.Pipe(duplex=False)
    process = context.Process(target=in_a_worker, args=(str(tmp_path), child))
    process.start()
    child.close()
    bits = parent.recv()
    process.join(20)
    assert process.exitcode == 0
    want = bf16_reference(weight, torch.full((8, 1), 0.3), "row")
    np.testing.assert_array_equal(np.array(bits, dtype=np.int16).view(np.uint16), want)


@pytest.mark.parametrize("there", ["nothing", "vllm alone", "a broken plugin", "an empty plugin"])
def test_vllm_starts_whatever_is_installed(tmp_path: Path, there: str) -> None:
    """The variable is set, and there is no plugin, or one that cannot be imported, or whose names are others."""
    reader = tmp_path / "vllm_neuron" / "utils" / "checkpoints.py"
    if there == "vllm alone":
        (tmp_path / "vllm").symlink_to(STANDIN / "vllm")
    if "plugin" in there:
        reader.parent.mkdir(parents=True)
        for directory in (reader.parent, reader.parent.parent):
            (directory / "__init__.py").write_text("")
        reader.write_text("raise KeyError('NEURON_RT')" if "broken" in there else "")
    code = (
        "from neuron_fp8_loader.integrations.vllm import register\n"
        "for _ in range(2):\n"
        "    register()\n"
        "try:\n"
        "    import vllm_neuron.utils.checkpoints\n"
        "except Exception as error:\n"
        "    print(type(error).__name__)\n"
        "print('started')\n"
    )
    started = {
        flag: subprocess.Popen(
            [sys.executable, "-c", code], env={"PYTHONPATH": f"{tmp_path}:{ROOT}", ENV: flag}, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for flag in ("1", "nonsense", '{"nan": "keep"}')
    }  # fmt: skip
    said = {"a broken plugin": "KeyError\n", "an empty plugin": ""}.get(there, "ModuleNotFoundError\n")
    for flag, process in started.items():  # side by side: most of their time is importing
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, (flag, stderr)
        assert stdout == f"{said}started\n", flag
        assert "Traceback" not in stderr or "stays as it is" in stderr, flag


def test_both_stacks_side_by_side(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    """NxD Inference is installed, too: each hook finds its own, and both leave."""
    import neuron_fp8_loader

    monkeypatch.syspath_prepend(str(STANDIN.parent / "standin"))
    try:
        register()
        config = importlib.import_module("neuronx_distributed_inference.models.config").NeuronConfig
        assert config.__init__.__wrapped__
        assert plugin.checkpoints.SafetensorsCheckpoint._get_slice.__wrapped__
    finally:
        neuron_fp8_loader.disable()
        vllm_neuron.disable()
        for name in [n for n in sys.modules if n.split(".")[0] == "neuronx_distributed_inference"]:
            del sys.modules[name]
    assert not hasattr(config.__init__, "__wrapped__")
    assert not hasattr(plugin.checkpoints.SafetensorsCheckpoint._get_slice, "__wrapped__")


def test_disable_after_use(plugin: Plugin, tmp_path: Path) -> None:
    """Also what a load has left: the variable for the workers, the name among vLLM's; and it can come again."""
    path = static_llama(tmp_path, projections(), {"quantization_config": MODELOPT})
    before = _state(plugin)
    for _ in range(2):
        vllm_neuron.enable()
        plugin.load(path, quantization="neuron_fp8")
        assert os.environ[ENV] == "1"
        vllm_neuron.disable()
        assert ENV not in os.environ
        assert _state(plugin) == before


def test_the_plugin_on_nxd_inference_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same name, without a reader: that hook has nothing to do there."""
    package = tmp_path / "vllm_neuron"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not to be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not vllm_neuron.is_installed()
    (package / "utils").mkdir()
    (package / "utils" / "checkpoints.py").write_text("")
    assert vllm_neuron.is_installed()


def test_a_module_that_is_being_imported_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import led to ours: what it will hold is not there yet."""
    (tmp_path / "underway_a.py").write_text("import underway_b\nname = 1\n")
    (tmp_path / "underway_b.py").write_text("import sys\nsys.modules['underway_hook'].install()\n")
    (tmp_path / "underway_c.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[bool] = []
    hook = PostImport({"underway_a": lambda module: seen.append(hasattr(module, "name"))})
    monkeypatch.setitem(sys.modules, "underway_hook", hook)
    try:
        importlib.import_module("underway_a")
        assert seen == []
        importlib.import_module("underway_c")
        assert seen == [True]
    finally:
        hook.remove()
        for name in "abc":
            sys.modules.pop(f"underway_{name}", None)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, None),
        ({"quant_method": ""}, None),
        (MODELOPT, "static"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}, "static"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, None),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, None),
        (FP8, "fp8"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "static"),
        ({"quant_method": "fbgemm_fp8"}, "fp8"),
        ({"quant_method": "gptq"}, None),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int8"}}}, None),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {"type": "float"}, "config_groups": {}}, None),
    ],
)
def test_what_a_config_declares(config: dict[str, Any] | None, expected: str | None) -> None:
    assert declares(config) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ct_fp8_static", "static"), ("quark_fp8_tensor_kv", "static"), ("modelopt_fp8_kv", "static"),
        ("ct_fp8_dynamic_moe", "fp8"), ("hf_fp8_block", "fp8"), ("ct_mxfp8", "fp8"), ("torchao_fp8_wo", "fp8"),
        ("ct_nvfp4", None), ("ct_int8_w8a8", None),
    ],
)  # fmt: skip
def test_what_real_configs_declare(name: str, expected: str | None) -> None:
    import json

    config = json.loads((shared(name) / "config.json").read_text()).get("quantization_config")
    assert declares(config) == expected
