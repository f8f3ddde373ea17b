"""``enable()`` and ``disable()``: the hook in NxD Inference, whether it is imported already or not."""

from __future__ import annotations

import logging
from types import ModuleType

from .loading import (
    READERS,
    checkpoint_loader_fn,
    get_state_dict,
    invoke_preshard_hook,
    load_module,
    reader,
    save_quantized_state_dict,
)
from .neuron_config import init_fused_spec, init_inference_config, init_neuron_config
from .patches import Patches
from .post_import import PostImport
from .quantizing import convert

log = logging.getLogger("neuron_fp8_loader")

_PACKAGE = "neuronx_distributed_inference"
_patches = Patches()
_hook: PostImport | None = None


def enable() -> None:
    """Let NeuronConfig take ``fp8_rescale``, and rescale what NxD Inference loads under it.

    Before or after NxD Inference is imported, as often as one likes. Nothing is imported, and without the flag
    nothing changes. Works with NxD Inference as it was read: 0.9 (Neuron SDK 2.29).
    """
    global _hook
    if _hook is None:
        _hook = PostImport(
            {
                f"{_PACKAGE}.models.config": _patch_config,
                f"{_PACKAGE}.modules.checkpoint": _patch_checkpoint,
                f"{_PACKAGE}.models.application_base": _patch_application,
                f"{_PACKAGE}.models.model_wrapper": _patch_wrapper,
                "neuronx_distributed.trace.trace": _patch_trace,
            }
        )
        _hook.install()


def disable() -> None:
    """Undo ``enable()``: every name that it replaced is put back. Environment variables that the flag set stay."""
    global _hook
    if _hook is not None:
        _hook.remove()
        _patches.restore()
        _hook = None


def _patch_config(module: ModuleType) -> None:
    _wrap(module, "NeuronConfig.__init__", init_neuron_config)
    _wrap(module, "FusedSpecNeuronConfig.__init__", init_fused_spec)
    _wrap(module, "InferenceConfig.__init__", init_inference_config)


def _patch_checkpoint(module: ModuleType) -> None:
    # looked up by name in load_state_dict at every call, so names of that bound elsewhere go through here too
    for name, file_name in READERS.items():
        _wrap(module, name, reader(file_name))


def _patch_application(module: ModuleType) -> None:
    _wrap(module, "NeuronApplicationBase.get_state_dict", get_state_dict)
    _wrap(module, "NeuronApplicationBase.checkpoint_loader_fn", checkpoint_loader_fn)
    _wrap(module, "NeuronApplicationBase.save_quantized_state_dict", save_quantized_state_dict)


def _patch_wrapper(module: ModuleType) -> None:
    _wrap(module, "DecoderModelInstance.load_module", load_module)
    _wrap(module, "convert", convert)


def _patch_trace(module: ModuleType) -> None:
    _wrap(module, "invoke_preshard_hook", invoke_preshard_hook)


def _wrap(module: ModuleType, path: str, wrapper: object) -> None:
    head, _, name = path.rpartition(".")
    owner = getattr(module, head, None) if head else module
    if owner is None or not _patches.wrap(owner, name, wrapper):  # type: ignore[arg-type]
        log.warning("%s has no %s; is this a version of NxD Inference that is not known yet?", module.__name__, path)
