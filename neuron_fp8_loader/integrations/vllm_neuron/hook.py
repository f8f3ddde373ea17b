"""``enable()`` and ``disable()``: the hook in vLLM and its Neuron plugin, whether they are imported already or not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from ..patches import Patches
from ..post_import import Callback, PostImport
from . import gates, loading
from .flag import QUANTIZATION, log, tell_workers

PACKAGE = "vllm_neuron"

_STATIC = "vllm_neuron.model.llama3.{}"
_patches = Patches()
_undo: list[Callable[[], None]] = []
_hook: PostImport | None = None


def is_installed() -> bool:
    """Is there a vllm_neuron with a reader of its own, and not the one on top of NxD Inference? Imports nothing."""
    spec = importlib.util.find_spec(PACKAGE)
    places = getattr(spec, "submodule_search_locations", None) or []
    return any((Path(place) / "utils" / "checkpoints.py").is_file() for place in places)


def enable() -> None:
    """Let vLLM take ``--quantization neuron_fp8``, and the plugin read FP8 under it; and stand guard in any case.

    Before or after vLLM is imported, as often as one likes. Nothing is imported, and nothing is ever raised while
    others are: what is not found is said once, and left as it is.
    """
    global _hook
    if _hook is None:
        _hook = PostImport(
            {
                "vllm.model_executor.layers.quantization": _harmless(_register_quantization),
                "vllm_neuron.vllm.platform": _harmless(_patch_platform),
                gates.READER: _harmless(_patch_reader),
                **{
                    _STATIC.format(name): _harmless(_patch_static)
                    for name in ("model_static_fp8", "weight_loaders_static_fp8")
                },
            }
        )
        _hook.install()


def disable() -> None:
    """Undo ``enable()``: every name that it replaced is put back."""
    global _hook
    if _hook is not None:
        _hook.remove()
        _patches.restore()
        while _undo:
            _undo.pop()()
        tell_workers(False)
        _hook = None


def _harmless(callback: Callback) -> Callback:
    def call(module: ModuleType) -> None:
        try:
            callback(module)
        except Exception:
            log.exception("neuron_fp8_loader: %s is not known in this version and stays as it is", module.__name__)

    return call


def _register_quantization(module: ModuleType) -> None:
    module.register_quantization_config(QUANTIZATION)(gates.quantization_config(module.QuantizationConfig))
    # vLLM adds the name to its platform's list by itself, if it has one
    platform = importlib.import_module("vllm.platforms").current_platform
    for names in (module.QUANTIZATION_METHODS, getattr(platform, "supported_quantization", None)):
        if isinstance(names, list):
            _undo.append(functools.partial(_remove, names))


def _remove(names: list[str]) -> None:
    if QUANTIZATION in names:
        names.remove(QUANTIZATION)


def _patch_platform(module: ModuleType) -> None:
    _wrap(module.NeuronPlatform, {"check_and_update_config": gates.check_and_update_config})


def _patch_reader(module: ModuleType) -> None:
    checkpoint: Any = module.SafetensorsCheckpoint
    done = _wrap(
        checkpoint,
        {
            "__init__": loading.init,
            "_get_slice": loading.get_slice,
            "load_sharded": loading.load_sharded,
            "load_sharded_pipelined": loading.load_sharded,
            "_process_param": loading.process_param,
        },
    )
    if done:
        checkpoint._neuron_fp8_reads = True
        _undo.append(lambda: delattr(checkpoint, "_neuron_fp8_reads"))


def _patch_static(module: ModuleType) -> None:
    _wrap(module, {"_needs_downscale": loading.needs_downscale})


def _wrap(owner: Any, wrappers: dict[str, Callable[..., Any]]) -> bool:
    """Replace all of these, or none of them where one is not there."""
    absent = [name for name in wrappers if vars(owner).get(name) is None]
    if absent:
        log.warning(
            "neuron_fp8_loader: %s has no %s; this version of vllm_neuron is not known and stays as it is",
            owner.__name__,
            ", ".join(absent),
        )
        return False
    for name, wrapper in wrappers.items():
        _patches.wrap(owner, name, wrapper)
    return True
