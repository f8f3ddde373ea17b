"""The compile check: two readings of the bytes that are not the package's, and stand-ins for the Neuron packages.

The stand-ins have the real signatures: ``torch_neuronx.trace`` as the SDK documents it, NxD Inference's as its
sources have them (checked against a checkout where NXDI_SRC names one).
"""

from __future__ import annotations

import ast
import importlib.machinery
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support import ROOT, SHARED, ieee_e4m3

import neuron_fp8_loader
from benchmarks.llama import Linear, Llama, Shape
from benchmarks.neuron_compile import backend, neuron
from benchmarks.neuron_compile.__main__ import main
from benchmarks.neuron_compile.check import check, problems
from benchmarks.neuron_compile.emulate import Emulate
from benchmarks.neuron_compile.model import Case, judge, make_case
from benchmarks.neuron_compile.neuron import Neuron
from benchmarks.neuron_compile.nxdi import NxdInference
from benchmarks.neuron_compile.xla_cpu import XlaCpu

SMALL = Shape(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)
TOKENS = 8
QUICK = ["--hidden=64", "--tokens=8"]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return make_case(tmp_path / "llama", SMALL, TOKENS, torch.float32)


def as_a_device(weight: torch.Tensor) -> torch.Tensor:
    """float32 values of FP8 bytes by ml_dtypes' IEEE e4m3."""
    return torch.from_numpy(ieee_e4m3(weight).astype(np.float32))


def on_the_device(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose FP8 linears read their bytes as the device does, whatever they did before."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.read = as_a_device
    return model


# -- the model and its judge ---------------------------------------------------------------------------------


def test_the_checkpoint_needs_the_loader(case: Case) -> None:
    fp8 = [name for name, tensor in case.raw.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(fp8) == 7 * SMALL.num_hidden_layers
    for name in fp8:
        assert not np.isfinite(ieee_e4m3(case.raw[name])).all()
        assert np.isfinite(ieee_e4m3(case.loaded[name])).all()
        assert case.raw[name + "_scale"].shape == (case.raw[name].shape[0], 1)


def test_codes_that_halve_exactly(tmp_path: Path) -> None:
    exact = make_case(tmp_path / "a", SMALL, TOKENS, torch.float32, exact=True)
    every = make_case(tmp_path / "b", SMALL, TOKENS, torch.float32, exact=False)
    for made, lost in ((exact, False), (every, True)):
        rounded = 0
        for tensor in made.raw.values():
            if tensor.dtype == torch.float8_e4m3fn:
                codes = tensor.view(torch.uint8).numpy()
                half = (codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) / 2).astype(ml_dtypes.float8_e4m3fn)
                rounded += (half.astype(np.float32) * 2 != codes.view(ml_dtypes.float8_e4m3fn)).sum()
        assert (rounded > 0) == lost


def test_judge() -> None:
    reference = torch.tensor([[1.0, -4.0], [2.0, 0.0]])
    assert judge(reference.clone(), reference)["equal"]
    seen = judge(torch.tensor([[1.0, -4.0], [2.0, 1.0]]), reference)
    assert seen["largest_error"] == 0.25
    assert not seen["equal"]
    bad = judge(torch.tensor([[float("nan"), float("inf")], [2.0, 0.0]]), reference)
    assert (bad["finite"], bad["nan"], bad["inf"], bad["largest_error"]) == (False, 1, 1, None)


# -- readings that need no device ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [Emulate, XlaCpu])
def test_without_not_finite_with_finite_and_equal(
    tmp_path: Path, make: Callable[[], backend.Backend], dtype: torch.dtype
) -> None:
    if make is XlaCpu:
        pytest.importorskip("jax")
    entry = check(make(), make_case(tmp_path, SMALL, TOKENS, dtype))
    assert entry["without"]["nan"] == entry["without"]["outputs"] == TOKENS * SMALL.vocab_size
    assert entry["with"]["finite"]
    assert entry["with"]["equal"]
    assert entry["problems"] == []


@pytest.mark.parametrize(("make", "method"), [(Emulate, "half"), (Emulate, "ratio"), (XlaCpu, "half")])
def test_codes_as_they_come(tmp_path: Path, make: Callable[[], backend.Backend], method: str) -> None:
    if make is XlaCpu:
        pytest.importorskip("jax")
    entry = check(make(), make_case(tmp_path, SMALL, TOKENS, torch.float32, method, exact=False))
    assert entry["problems"] == []
    assert 0 < entry["with"]["largest_error"] < (1e-4 if method == "half" else 0.2)


def test_xla_sees_neurons_type(case: Case) -> None:
    pytest.importorskip("jax")
    assert XlaCpu().run(case, case.loaded).details["hlo_types"] == ["f8e4m3"]
    assert XlaCpu()._run(case, case.raw, "float8_e4m3fn").details["hlo_types"] == ["f8e4m3fn"]


def test_emulation_reads_as_ml_dtypes(case: Case) -> None:
    with torch.no_grad():
        expected = case.llama(case.loaded, as_a_device)(case.ids)[0]
    assert torch.equal(Emulate().run(case, case.loaded).logits, expected)


# -- what the check can tell apart ---------------------------------------------------------------------------


def one_weight(case: Case) -> str:
    return f"model.layers.{SMALL.num_hidden_layers - 1}.mlp.down_proj.weight"


def test_a_scale_that_was_not_doubled_is_a_problem(case: Case) -> None:
    name = one_weight(case) + "_scale"
    broken = replace(case, loaded=case.loaded | {name: case.raw[name]})
    entry = check(Emulate(), broken)
    assert entry["with"]["finite"]
    assert "not equal to the e4m3fn reference" in entry["problems"][0]


def test_a_weight_that_was_left_is_a_problem(case: Case) -> None:
    name = one_weight(case)
    broken = replace(case, loaded=case.loaded | {name: case.raw[name]})
    assert "are nan" in check(Emulate(), broken)["problems"][0]


def test_too_far_from_the_reference_is_a_problem(case: Case) -> None:
    seen = judge(case.reference() * 1.5, case.reference())
    assert "more than 0.05" in problems(Neuron(), case, seen)[0]
    assert problems(Neuron(), case, judge(case.reference() * 1.01, case.reference())) == []


def test_a_runtime_that_refuses_is_reported(case: Case) -> None:
    class Refusing(Emulate):
        def run(self, case: Case, tensors: Any) -> backend.Outcome:
            if tensors is case.raw:
                raise RuntimeError("Failed to execute the model status=1003 message=Numerical Error\nmore")
            return super().run(case, tensors)

    entry = check(Refusing(), case)
    assert entry["without"]["refused"] == "Failed to execute the model status=1003 message=Numerical Error"
    assert entry["problems"] == []


# -- the command ---------------------------------------------------------------------------------------------


def test_command(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--backend=emulate", *QUICK, f"--out={tmp_path}"])
    assert done.exit_code == 0, done.output
    (entry,) = json.loads((tmp_path / "neuron_compile.json").read_text())["results"]["backends"]
    assert entry["backend"] == "emulate"
    assert entry["with"]["equal"]


def test_command_fails_where_the_loaded_model_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_loader(directory: Path, **options: Any) -> dict[str, torch.Tensor]:
        return load_file(directory / "model.safetensors")

    monkeypatch.setattr(neuron_fp8_loader, "load_state_dict", no_loader)
    done = CliRunner().invoke(main, ["--backend=emulate", *QUICK, f"--out={tmp_path}"])
    assert done.exit_code == 1
    assert "outputs are nan" in done.output


def test_command_fails_clearly_without_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron, "devices", list)
    done = CliRunner().invoke(main, ["--backend=neuron", "--backend=emulate", *QUICK, f"--out={tmp_path}"])
    assert done.exit_code == 2
    assert "no Neuron device" in done.output
    assert not (tmp_path / "neuron_compile.json").exists()


def test_a_device_without_its_packages_is_no_reason_to_fall_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuron, "devices", lambda: ["/dev/neuron0"])
    monkeypatch.setattr(neuron.importlib.util, "find_spec", lambda name: None)
    done = CliRunner().invoke(main, [*QUICK, f"--out={tmp_path}"])
    assert done.exit_code == 2
    assert "torch-neuronx" in done.output


def test_a_placeholder_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron.metadata, "version", lambda name: "1.0")
    with pytest.raises(backend.Missing, match="empty placeholder"):
        neuron.require_package("torch_neuronx_that_is_not_there", "torch-neuronx")


# -- stand-ins for the Neuron packages -----------------------------------------------------------------------


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> types.ModuleType:
    """Put a module under ``name`` (and its parents) where import finds it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        full = ".".join(parts[:end])
        if full not in sys.modules or end == len(parts):
            module = types.ModuleType(full)
            module.__spec__ = importlib.machinery.ModuleSpec(full, None, is_package=True)
            monkeypatch.setitem(sys.modules, full, module)
    vars(sys.modules[name]).update(members)
    return sys.modules[name]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A trn2 host: a device, the compiler, no environment of its own. Gives what the stand-ins were called with."""
    monkeypatch.setattr(neuron, "devices", lambda: ["/dev/neuron0"])
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
    # deleted through monkeypatch, so that what the backend sets is taken back too
    for name in (*neuron.ENVIRONMENT, "NEURON_CC_FLAGS", "TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    install(monkeypatch, "neuronxcc")
    return {"calls": []}


def environment() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in neuron.ENVIRONMENT}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, host: dict[str, Any]) -> dict[str, Any]:
    def trace(
        func: Any, example_inputs: Any, *_: Any, input_output_aliases: Any = {}, compiler_workdir: Any = None,  # noqa: B006
        compiler_args: Any = None, partitioner_config: Any = None, inline_weights_to_neff: bool = True,
        cpu_backend: bool = False,
    ) -> Any:  # fmt: skip
        assert not _
        assert isinstance(example_inputs, tuple)
        host["calls"].append(
            {"args": compiler_args, "inline": inline_weights_to_neff, "cpu": cpu_backend, "env": environment(),
             "workdir": Path(compiler_workdir).is_dir(), "ids": example_inputs[0].dtype}
        )  # fmt: skip
        return on_the_device(func)

    install(monkeypatch, "torch_neuronx", trace=trace)
    return host


BOTH_SET = {"XLA_HANDLE_SPECIAL_SCALAR": "1", "UNSAFE_FP8FNCAST": "1"}
FLAG = "--internal-hlo2tensorizer-options='--experimental-unsafe-fp8e4m3fn-as-fp8e4m3'"


def test_trace(tmp_path: Path, traced: dict[str, Any]) -> None:
    done = CliRunner().invoke(main, ["--backend=neuron", *QUICK, f"--out={tmp_path}"])
    assert done.exit_code == 0, done.output
    assert len(traced["calls"]) == 2
    for call in traced["calls"]:
        assert FLAG in call["args"]
        assert "--auto-cast=none" in call["args"]
        assert call["env"] == BOTH_SET
        assert call["inline"] is False
        assert call["cpu"] is False
        assert call["workdir"]
        assert call["ids"] == torch.int32
    (entry,) = json.loads((tmp_path / "neuron_compile.json").read_text())["results"]["backends"]
    assert entry["details"]["stack"] == "torch_neuronx.trace"
    assert entry["dtype"] == "bfloat16"
    assert entry["versions"]["platform"] == "trn2"
    assert entry["with"]["equal"]
    assert not entry["without"]["finite"]
    assert entry["with"]["tokens_per_s"] > 0


def test_the_flag_survives_a_shell_split() -> None:
    import shlex

    # as the compiler's command line is made of it: one argument, its value unquoted
    words = shlex.split(Neuron().compiler_args)
    assert "--internal-hlo2tensorizer-options=--experimental-unsafe-fp8e4m3fn-as-fp8e4m3" in words


def test_trace_for_trn3_takes_no_flag(monkeypatch: pytest.MonkeyPatch, traced: dict[str, Any], case: Case) -> None:
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn3")
    Neuron().run(case, case.loaded)
    assert "fp8e4m3fn" not in traced["calls"][0]["args"]


def test_compile_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: dict[str, Any]) -> None:
    monkeypatch.setattr(neuron, "devices", list)
    done = CliRunner().invoke(main, ["--compile-only", "--target=trn1", *QUICK, f"--out={tmp_path}"])
    assert done.exit_code == 0, done.output
    assert all(call["cpu"] and call["args"].endswith("--target trn1") for call in traced["calls"])
    assert "compiled, not run" in done.output


def test_trace_that_gives_nan_fails(tmp_path: Path, traced: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = sys.modules["torch_neuronx"].trace

    def broken(func: Any, *args: Any, **options: Any) -> Any:
        model = real(func, *args, **options)
        return lambda ids: model(ids) * float("nan")

    monkeypatch.setattr(sys.modules["torch_neuronx"], "trace", broken)
    done = CliRunner().invoke(main, ["--backend=neuron", *QUICK, f"--out={tmp_path}"])
    assert done.exit_code == 1
    assert "outputs are nan" in done.output


def test_native_stack(monkeypatch: pytest.MonkeyPatch, host: dict[str, Any], case: Case) -> None:
    install(monkeypatch, "torch_neuronx")  # registers a device, has no trace
    monkeypatch.setattr(neuron, "TORCH_DEVICE", "cpu")

    def compile_(
        model: Any, *, fullgraph: bool = False, dynamic: bool | None = None, backend: Any = "inductor"
    ) -> Any:
        host["calls"].append({"backend": backend, "fullgraph": fullgraph, "dynamic": dynamic, "env": environment()})
        return on_the_device(model)

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setenv("NEURON_CC_FLAGS", "--verbose=35")
    one = Neuron()
    one.require()
    entry = check(one, case)
    assert entry["problems"] == []
    assert not entry["without"]["finite"]
    assert host["calls"][0] == {"backend": "neuron", "fullgraph": True, "dynamic": False, "env": BOTH_SET}
    assert os.environ["NEURON_CC_FLAGS"].startswith("--verbose=35 ")
    assert os.environ["NEURON_CC_FLAGS"].count(FLAG) == 1
    assert os.environ["TORCH_NEURONX_DISABLE_FALLBACK_EXECUTION"] == "1"
    with pytest.raises(backend.Missing, match="TorchNeuron"):
        Neuron(compile_only=True).require()


# -- NxD Inference -------------------------------------------------------------------------------------------


@pytest.fixture
def nxd_inference(monkeypatch: pytest.MonkeyPatch, traced: dict[str, Any]) -> dict[str, Any]:
    seen = traced | {"order": [], "neuron_config": []}

    class LlamaNeuronConfig:
        def __init__(self, **kwargs: Any) -> None:
            seen["neuron_config"].append(kwargs)
            self.kwargs = kwargs

    class LlamaInferenceConfig:
        def __init__(
            self, neuron_config: Any, fused_spec_config: Any = None, load_config: Any = None,
            metadata: dict[str, Any] | None = None, **kwargs: Any,
        ) -> None:  # fmt: skip
            self.neuron_config, self.path = neuron_config, load_config
            self.vocab_size = SMALL.vocab_size

        @classmethod
        def get_neuron_config_cls(cls) -> type:
            return LlamaNeuronConfig

    class NeuronLlamaForCausalLM:
        def __init__(self, model_path: str, config: Any = None, neuron_config: Any = None) -> None:
            self.model_path, self.config = model_path, config

        def compile(
            self, compiled_model_path: Any, debug: bool = False, pre_shard_weights_hook: Any = None,
            dry_run: bool = False, disable_fail_fast: bool = False,
        ) -> None:  # fmt: skip
            seen["order"].append(("compile", Path(compiled_model_path).is_dir(), environment()))

        def load(
            self, compiled_model_path: Any, start_rank_id: Any = None, local_ranks_size: Any = None,
            skip_warmup: bool = False,
        ) -> None:  # fmt: skip
            seen["order"].append(("load", Path(compiled_model_path).is_dir(), environment()))
            arguments = self.config.neuron_config.kwargs
            path = Path(arguments["quantized_checkpoints_path"])
            if arguments.get("fp8_rescale"):
                tensors = neuron_fp8_loader.load_state_dict(path, method=arguments["fp8_rescale"])
            else:
                tensors = load_file(path / "model.safetensors")
            self.model = Llama(Shape.of(path), tensors, TOKENS, arguments["torch_dtype"], as_a_device)

        def reset(self) -> None:
            pass

        def __call__(self, *, input_ids: Any, attention_mask: Any, position_ids: Any) -> Any:
            assert attention_mask.shape == position_ids.shape == input_ids.shape
            return types.SimpleNamespace(logits=self.model(input_ids)[:, -1:])

    root = "neuronx_distributed_inference"
    install(monkeypatch, "neuronx_distributed")
    install(monkeypatch, f"{root}.models.llama.modeling_llama", LlamaInferenceConfig=LlamaInferenceConfig,
            NeuronLlamaForCausalLM=NeuronLlamaForCausalLM)  # fmt: skip
    install(monkeypatch, f"{root}.utils.hf_adapter", load_pretrained_config=lambda path: path)
    monkeypatch.setattr(
        neuron_fp8_loader, "enable", lambda **options: seen["order"].append(("enable",)), raising=False
    )
    return seen


def test_nxd_inference(tmp_path: Path, nxd_inference: dict[str, Any]) -> None:
    done = CliRunner().invoke(main, ["--backend=neuron", *QUICK, f"--out={tmp_path}"])
    assert done.exit_code == 0, done.output
    entries = json.loads((tmp_path / "neuron_compile.json").read_text())["results"]["backends"]
    assert [entry["backend"] for entry in entries] == ["neuron", "neuron, NxD Inference"]
    nxd = entries[1]
    assert nxd["with"]["finite"]
    assert nxd["with"]["outputs"] == SMALL.vocab_size
    assert not nxd["without"]["finite"]
    assert nxd_inference["order"][:3] == [("enable",), ("compile", True, BOTH_SET), ("load", True, BOTH_SET)]
    with_flag, without = nxd_inference["neuron_config"]
    assert with_flag["quantized"] is True
    assert with_flag["quantization_dtype"] == "f8e4m3"  # or NxD Inference leaves the compiler flag out
    assert with_flag["quantization_type"] == "per_channel_symmetric"
    assert with_flag["torch_dtype"] == torch.bfloat16
    assert with_flag["fp8_rescale"] == "half"
    assert without | {"fp8_rescale": "half"} == with_flag | {
        "quantized_checkpoints_path": str(without["quantized_checkpoints_path"])
    }


def test_nxd_inference_without_the_hook(monkeypatch: pytest.MonkeyPatch, nxd_inference: dict[str, Any]) -> None:
    monkeypatch.delattr(neuron_fp8_loader, "enable")
    with pytest.raises(backend.Missing, match="no hook for NxD Inference"):
        NxdInference().require()


def _source(variable: str, package: str) -> Path:
    root = os.environ.get(variable)
    if not root:
        pytest.skip(f"{variable} names no checkout of {package}")
    found = [path for path in (Path(root) / package, Path(root) / "src" / package) if path.is_dir()]
    assert found, f"{variable}={root}: no {package}"
    return found[0]


def _parameters(file: Path, owner: str, function: str) -> list[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    scope: Any = tree if not owner else next(
        node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == owner
    )  # fmt: skip
    node = next(n for n in scope.body if isinstance(n, ast.FunctionDef) and n.name == function)
    return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def test_the_stand_ins_have_the_real_signatures(nxd_inference: dict[str, Any]) -> None:
    source = _source("NXDI_SRC", "neuronx_distributed_inference")
    models = sys.modules["neuronx_distributed_inference.models.llama.modeling_llama"]
    base = source / "models" / "application_base.py"
    import inspect

    for name in ("compile", "load"):
        ours = list(inspect.signature(getattr(models.NeuronLlamaForCausalLM, name)).parameters)
        assert ours == _parameters(base, "NeuronApplicationBase", name), name
    ours = list(inspect.signature(models.NeuronLlamaForCausalLM.__init__).parameters)
    assert ours == _parameters(base, "NeuronApplicationBase", "__init__")
    real = _parameters(source / "models" / "config.py", "InferenceConfig", "__init__")
    assert [p for p in inspect.signature(models.LlamaInferenceConfig.__init__).parameters if p != "kwargs"] == real
    llama = source / "models" / "llama" / "modeling_llama.py"
    assert _parameters(llama, "LlamaInferenceConfig", "get_neuron_config_cls") == ["cls"]
    assert "load_pretrained_config" in (source / "utils" / "hf_adapter.py").read_text(encoding="utf-8")
    flag = (source / "models" / "model_wrapper.py").read_text(encoding="utf-8")
    assert "--experimental-unsafe-fp8e4m3fn-as-fp8e4m3" in flag
    demo = (source / "inference_demo.py").read_text(encoding="utf-8")
    assert all(f'"{name}"' in demo for name in neuron.ENVIRONMENT)


def test_the_real_nxd_inference_takes_our_arguments(tmp_path: Path) -> None:
    """Its real sources on the CPU, built as the backend builds them: finite with the loader's tensors only."""
    _source("NXDI_SRC", "neuronx_distributed_inference")
    _source("NXD_SRC", "neuronx_distributed")
    harness = SHARED.parent / "nxdi_cpu"
    if not harness.is_dir():
        pytest.skip("no CPU harness for NxD Inference")
    script = tmp_path / "run.py"
    script.write_text(_ON_CPU)
    paths = os.pathsep.join([str(ROOT), str(harness), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["True", "False"]


_ON_CPU = """
import contextlib
import sys
from pathlib import Path
import harness
harness.quiet()
harness.install_stubs()
import torch
import neuron_fp8_loader
from benchmarks.llama import Shape
from benchmarks.neuron_compile import nxdi
from benchmarks.neuron_compile.model import judge, make_case

shape = Shape(hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1)
case = make_case(Path(sys.argv[1]) / "llama", shape, 8, torch.float32)
enable = getattr(neuron_fp8_loader, "enable", None)
if enable:
    enable()
for rescale, tensors in ((True, case.loaded), (False, case.raw)):
    app = nxdi.build_app(case, rescale and bool(enable), on_cpu=True, attn_kernel_enabled=False)
    # where there is no hook, its part is played here
    with contextlib.nullcontext() if enable else harness.loader_transform(lambda sd: dict(tensors)):
        harness.load_on_cpu(app)
    with harness.ieee_decode(True), torch.no_grad():
        seen = judge(nxdi.last_logits(app, case.ids), case.reference()[-1])
    print(seen["finite"] and seen["largest_error"] < 1e-3)
"""
