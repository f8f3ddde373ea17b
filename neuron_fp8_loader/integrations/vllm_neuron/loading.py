"""What replaces methods of the plugin's ``SafetensorsCheckpoint``: the reader under the flag, and the guard always."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ...errors import OptionError, WeightError, listing
from ...options import Options
from . import flag
from .flag import ENV, GUARD_ENV, QUANTIZATION, log
from .gates import can_read
from .reader import Index, Reader

_READER = "_neuron_fp8_reader"
_FP8 = tuple(
    dtype for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2") if (dtype := getattr(torch, name, None))
)


def init(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
    """``SafetensorsCheckpoint.__init__``."""
    original(self, *args, **kwargs)
    options: Options | None = flag.options()
    if options is None:
        return
    absent = [name for name in _STATE if not hasattr(self, name)]
    if absent:
        raise OptionError(
            f"{ENV}: SafetensorsCheckpoint has no {', '.join(absent)}; this version of vllm_neuron is not known to "
            "neuron_fp8_loader. Leave the flag out, or install versions that go together"
        )
    reader = Reader(self, options, flag.target())
    index = Index(reader)
    index.update(self._tensor_name_to_file)
    self._tensor_name_to_file = index
    setattr(self, _READER, reader)


_STATE = ("_source", "_safetensor_file_names", "_tensor_name_to_file", "_open_safetensor_files")


def get_slice(original: Callable[..., Any], self: Any, name: str) -> Any:
    """``SafetensorsCheckpoint._get_slice``."""
    reader: Reader | None = getattr(self, _READER, None)
    return original(self, name) if reader is None else reader.slice(name, lambda other: original(self, other))


def load_sharded(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """``SafetensorsCheckpoint.load_sharded`` and ``load_sharded_pipelined``."""
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    model, mappings = given["model"], given.get("mappings") or {}
    override = given.get("dtype_override") or {}
    reader: Reader | None = getattr(self, _READER, None)
    if reader is not None:
        reader.expect(model, mappings, override)
    result = original(self, *args, **kwargs)
    if flag.guarded():
        wanted = {name: override.get(name, parameter.dtype) for name, parameter in model.named_parameters()}
        _check([(n, t.dtype, wanted[n]) for n, t in result.state_dict.items() if n in wanted])
    if reader is None:
        return result
    if given.get("rank") == 0 and (summary := reader.summary()):
        log.info("neuron_fp8_loader: %s", summary)
    known = reader.scale_names()
    return result._replace(unexpected_keys=[key for key in result.unexpected_keys if key not in known])


def process_param(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """``SafetensorsCheckpoint._process_param``, which casts what a loader gives to the parameter's dtype."""
    if not flag.guarded():
        return original(self, *args, **kwargs)
    given = inspect.signature(original).bind(self, *args, **kwargs)
    name, wanted = given.arguments["name"], given.arguments["target_dtype"]
    given.arguments["weight_loader"] = _Watched(given.arguments["weight_loader"], name, wanted)
    return original(*given.args, **given.kwargs)


class _Watched:
    """A weight loader, whose result is looked at before it is cast."""

    def __init__(self, loader: Any, name: str, wanted: torch.dtype) -> None:
        self._loader, self._name, self._wanted = loader, name, wanted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._loader.load(*args, **kwargs)
        _check([(self._name, tensor.dtype, self._wanted)])
        return tensor


def _check(loaded: Iterable[tuple[str, torch.dtype, torch.dtype]]) -> None:
    """Raise WeightError where FP8 is about to be cast to another dtype: (parameter, what there is, what is wanted)."""
    bad = [f"{name}: {has} for {wants}" for name, has, wants in loaded if has in _FP8 and wants != has]
    if bad:
        raise WeightError(
            f"FP8 weights would be cast without their scales, which gives fluent nonsense: {listing('case', bad)}\n"
            f"--quantization {QUANTIZATION}, or {ENV}=1 in the environment, has them read with their scales. If the "
            f"checkpoint has no scales, and its values are the weights, {GUARD_ENV}=0 lets them through."
        )


def needs_downscale(original: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
    """``_needs_downscale`` of the plugin's static layers: what the reader gives them is rescaled already.

    Where a version has no such name, the plugin rescales once more: consistent, but rounded once more as well.
    """
    return False if flag.asked() and can_read() else original(*args, **kwargs)
