"""NxD Inference's own way: its Llama, compiled and loaded by it, with ``fp8_rescale`` and without."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import neuron_fp8_loader

from .backend import Missing, Outcome, timed_runs
from .model import Case, Tensors
from .neuron import Neuron, neuron_versions, platform, require_package, set_environment

_MODELS = "neuronx_distributed_inference.models.llama.modeling_llama"


def installed() -> bool:
    """Is NxD Inference there (and not the public index's placeholder)?"""
    return importlib.util.find_spec("neuronx_distributed_inference") is not None


def neuron_config(case: Case, rescale: bool, **overrides: Any) -> dict[str, Any]:
    """Keyword arguments of NeuronConfig for this checkpoint: what a user writes, and the flag."""
    length = max(128, case.tokens)
    arguments: dict[str, Any] = {
        "tp_degree": 1,
        "batch_size": 1,
        "seq_len": length,
        "max_context_length": length,
        "torch_dtype": case.dtype,
        "quantized": True,
        "quantized_checkpoints_path": str(case.directory),
        "quantization_dtype": "f8e4m3",  # "f8e4m3fn" would leave the compiler flag out
        "quantization_type": "per_channel_symmetric",
        "modules_to_not_convert": ["lm_head"],
    }
    if rescale:
        arguments["fp8_rescale"] = case.method
    return arguments | overrides


def build_app(case: Case, rescale: bool, **overrides: Any) -> Any:
    """NxD Inference's application object; no weight has been read yet."""
    models = importlib.import_module(_MODELS)
    adapter = importlib.import_module("neuronx_distributed_inference.utils.hf_adapter")
    config_class = models.LlamaInferenceConfig
    config = config_class(
        config_class.get_neuron_config_cls()(**neuron_config(case, rescale, **overrides)),
        load_config=adapter.load_pretrained_config(str(case.directory)),
    )
    return models.NeuronLlamaForCausalLM(str(case.directory), config)


def last_logits(app: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last token of the prompt, float32 [vocabulary]; context encoding gives no others."""
    app.reset()
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    output = app(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions)
    logits: torch.Tensor = output.logits
    return logits[:, -1].float().cpu().reshape(-1)


class NxdInference:
    """``compile`` and ``load`` of NxD Inference. It reads the checkpoint itself, through the loader's hook."""

    name = "neuron, NxD Inference"
    tolerance = 0.05
    exact = False

    def require(self) -> None:
        Neuron().require()
        require_package("neuronx_distributed", "neuronx-distributed")
        require_package("neuronx_distributed_inference", "neuronx-distributed-inference")
        if not hasattr(neuron_fp8_loader, "enable"):
            raise Missing(f"neuron_fp8_loader {neuron_fp8_loader.__version__} has no hook for NxD Inference")

    def versions(self) -> dict[str, str]:
        return {**neuron_versions(), "platform": platform() or "unknown"}

    def reference(self, case: Case) -> torch.Tensor:
        return case.reference()[-1]

    def run(self, case: Case, tensors: Tensors) -> Outcome:
        rescale = tensors is case.loaded
        set_environment()
        if rescale:
            getattr(neuron_fp8_loader, "enable")()  # noqa: B009  (the hook is optional: see require)
        with tempfile.TemporaryDirectory(prefix="neuron-fp8-compiled-") as compiled, torch.no_grad():
            begin = time.perf_counter()
            app = build_app(case, rescale)
            app.compile(str(Path(compiled)))
            compile_s = time.perf_counter() - begin
            begin = time.perf_counter()
            app.load(str(Path(compiled)))
            load_s = time.perf_counter() - begin
            logits = last_logits(app, case.ids)
            seconds = timed_runs(lambda: last_logits(app, case.ids))
        details = {"stack": "NxD Inference compile and load", "load_s": load_s}
        return Outcome(logits, compile_s, seconds, details)
