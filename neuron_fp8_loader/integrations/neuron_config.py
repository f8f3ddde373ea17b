"""NeuronConfig: taking the flag, and setting right at construction what would go wrong, obscurely, much later."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ..checkpoint import describe, load_bin
from ..errors import Fp8LoaderError, OptionError, Shown, listing, printable
from ..plan import Plan, make_plan, plan_checkpoint
from .flag import BLOCKWISE, FLAG, FUSED_KERNEL, acts, dequantized, parse
from .keys import quantizes_itself
from .modules import experts_of, with_bias
from .names import absorbed, contradictions, misnamed, modules_to_not_convert, short_name
from .places import here, is_store
from .qkv import parts_dequantized, unfused
from .stacks import FAMILIES, takes

log = logging.getLogger("neuron_fp8_loader")

LIST = "modules_to_not_convert"
_OF_LAYER = re.compile(r"^layers\.(?P<number>\d+)")
_MLP_SHARED = re.compile(r"\.mlp\.shared_experts?\.")
_BESIDE = re.compile(r"^layers\.\d+\.mlp\.(shared_experts?\.)?(gate|up|down)_proj$")
_LAYER = re.compile(r"^layers\.\d+$")
_AMONG = re.compile(r"^(?P<layer>layers\.\d+)\.mlp(\.expert_mlps(?P<proj>\.mlp_op\.\w+)?)?$")
# without them XLA and the compiler take e4m3fn constants and casts for what they are on a GPU
ENVIRONMENT = {"XLA_HANDLE_SPECIAL_SCALAR": "1", "UNSAFE_FP8FNCAST": "1"}


def init_neuron_config(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """``NeuronConfig.__init__`` with one more keyword, ``fp8_rescale``; subclasses hand theirs up to it."""
    given = FLAG in kwargs
    value = kwargs.pop(FLAG, None)
    options = parse(value)
    if options is not None and acts():
        set_environment()
        if "quantized_checkpoints_path" in kwargs:
            kwargs["quantized_checkpoints_path"] = here(kwargs["quantized_checkpoints_path"])
        # the vision tower has a NeuronConfig of its own, with modules that the decoder's list does not name
        if kwargs.get("quantized") and not _is_vision(type(self)):
            _check_dtype(kwargs)
            _check_experts(self, kwargs, options)
            _settle_list(kwargs, kwargs.get("quantized_checkpoints_path"), options)
    original(self, *args, **kwargs)
    if given:
        setattr(self, FLAG, value)  # into neuron_config.json, and back through here


def init_fused_spec(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """``FusedSpecNeuronConfig.__init__``: the draft's config is mostly a copy of the target's, its list too."""
    original(self, *args, **kwargs)
    path = getattr(self, "draft_model_path", None)
    neuron_config: Any = getattr(getattr(self, "draft_config", None), "neuron_config", None)
    options = parse(getattr(neuron_config, FLAG, None))
    if options is None or not os.path.exists(path or "") or not acts():
        return
    settings = dict(vars(neuron_config))
    if not settings.get("quantized") or settings.get("enable_fused_speculation"):
        return  # the latter: it is the target's own
    plan = find_plan(settings.get("quantized_checkpoints_path"))
    if plan is not None and settings.get(LIST) == modules_to_not_convert(unfused(plan), _plain(plan, options)):
        settings[LIST] = None  # filled in for the target, or as good as
    _settle_list(settings, path, options, draft=True)
    if settings.get(LIST):
        setattr(neuron_config, LIST, settings[LIST])
    # the draft is read from draft_model_path whatever this says; a saved config must find its list to agree with it
    neuron_config.quantized_checkpoints_path = path


def init_inference_config(original: Callable[..., None], self: Any, neuron_config: Any, *args: Any, **kw: Any) -> None:
    """``InferenceConfig.__init__``: the first place where the model's class is known.

    A class that makes its own quantized weights has a list of its own, and would not set it over one filled in.
    """
    options_given = parse(getattr(neuron_config, FLAG, None)) is not None
    form = takes(type(self))
    # MiniMax-M2 speaks of scales that a script made, and has no list
    own = quantizes_itself(type(self)) and (form is None or form.stacked)
    given: list[str] = list(getattr(neuron_config, LIST, None) or ())
    own = own and options_given and bool(given) and bool(getattr(neuron_config, "quantized", False)) and acts()
    plan = _plan_for(neuron_config) if own else None
    shared = form.shared if form is not None else ""
    if plan is not None and given == modules_to_not_convert(plan, _plain(plan, _options(neuron_config))):
        more = []
        if form is not None and shared and any(_experts_in(form.block, given)):  # its own would leave them out
            more = [*_unlisted(plan, shared, given, math.inf), "self_attn"]
        setattr(neuron_config, LIST, [*given, *more] if more else None)
        plan = None
    original(self, neuron_config, *args, **kw)
    if plan is not None and shared:
        more = _unlisted(plan, shared, given, getattr(self, "num_hidden_layers", math.inf))
        if more:
            raise OptionError(
                f"{LIST}={given} lacks {more}, which {type(self).__name__} has in bfloat16, whatever the checkpoint "
                f"holds. Leave {LIST} out, for the model's own, or set {LIST}={[*given, *more]}"
            )
    given = getattr(neuron_config, LIST, None) or []
    if options_given and form is not None and form.block and given:
        entries = [*given, *_experts_in(form.block, given)]
        setattr(neuron_config, LIST, list(dict.fromkeys(entries)))


def _experts_in(block: str, entries: Iterable[str]) -> Iterator[str]:
    """Entries that name experts as most models do, ``layers.N.mlp``, in the block that a model has them in.

    The whole block where all experts are meant: a fused kernel's module holds them once more, by another path in it.
    """
    for entry in entries:
        match = _AMONG.match(entry)
        if match:
            yield f"{match['layer']}.{block}{'.expert_mlps' + match['proj'] if match['proj'] else ''}"


def _experts_of_checkpoints(entries: Iterable[str]) -> Iterator[str]:
    """Entries that name experts in the block that a model has them in, as most models do: the reverse."""
    for entry in entries:
        for block in {form.block for form in FAMILIES.values() if form.block}:
            layer, found, rest = entry.partition(f".{block}")
            if found and _LAYER.match(layer) and (not rest or rest.startswith(".expert_mlps")):
                yield f"{layer}.mlp{rest or '.expert_mlps'}"


def _plan_for(neuron_config: Any) -> Plan | None:
    """The plan of a config's checkpoint; None without one, or for one that no class reads."""
    try:
        plan = find_plan(getattr(neuron_config, "quantized_checkpoints_path", None))
    except Fp8LoaderError:
        return None
    return None if plan is None or plan.interleaved else plan


def _options(neuron_config: Any) -> dict[str, Any]:
    return parse(getattr(neuron_config, FLAG, None)) or {}


def _unlisted(plan: Plan, shared: str, given: Iterable[str], layers: float) -> list[str]:
    """Entries that a list lacks for a class with ``Takes.shared``, for its first layers.

    They are of what the model has in bfloat16 whatever the checkpoint holds: MLPs that are not experts, and what
    latent attention multiplies by itself.
    """
    found: dict[str, None] = {}
    beside = [pair.module for pair in plan.pairs if _BESIDE.match(short_name(pair.module))]
    for name in map(short_name, [*absorbed(plan), *beside]):
        layer, path = _OF_LAYER.match(name), _MLP_SHARED.sub(f".{shared}.", name)
        if layer is None or int(layer["number"]) >= layers or any(entry in path for entry in given):
            continue
        entry = f"{layer[0]}.mlp" if ".mlp." in path else shared if path != name else name.rpartition(".")[2]
        found[entry] = None
    return list(found)


def _plain(plan: Plan, options: Mapping[str, Any]) -> set[str]:
    """What the load turns into bfloat16 whatever the model is: what the options say, and qkv with a bias."""
    biased = set(with_bias(plan))
    return parts_dequantized(plan, options) | {p.weight for p in plan.pairs if p.module in biased}


def set_environment() -> None:
    """Set what the device code needs, where it is unset."""
    for name, value in ENVIRONMENT.items():
        there = os.environ.setdefault(name, value)
        if there != value:
            log.warning("%s=%s: %s needs %s=%s on this platform; it stays as it is", name, there, FLAG, name, value)


def _is_vision(kind: type) -> bool:
    return any(base.__name__ == "MultimodalVisionNeuronConfig" for base in kind.__mro__)


def _check_dtype(kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("quantized_mlp_kernel_enabled") or kwargs.get("activation_quantization_type"):
        return  # NeuronConfig itself sets "f8e4m3"
    dtype, path = kwargs.get("quantization_dtype", "int8"), kwargs.get("quantized_checkpoints_path")
    if dtype == "f8e4m3fn":
        reason = 'NxD Inference passes the compiler flag for FP8 weights for "f8e4m3" only'
    elif dtype != "f8e4m3" and _holds_fp8(path):
        reason = f"{Shown(path)} holds float8_e4m3fn weights, whose values would be cast"
    else:
        return
    raise OptionError(f'quantization_dtype="{dtype}": {reason}; with {FLAG} write quantization_dtype="f8e4m3"')


def _check_experts(neuron_config: Any, kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse what NxD gets wrong with FP8 experts, without an error.

    Sharded in one way for prompts and in another for generation, their weights are copied for the second way
    (``modules/moe/expert_mlps_v2.py``), and their scales are not. The fused kernel takes any scales for
    [experts, 2, inner], whatever shape they have (``modules/moe/moe_fused_tkg.py``).
    """
    hybrid = getattr(neuron_config, "hybrid_sharding_config", None) is not None
    kind = str(getattr(kwargs.get("quantization_type"), "value", kwargs.get("quantization_type")))
    kernel = bool(kwargs.get(FUSED_KERNEL)) and kind in (BLOCKWISE, "per_channel_symmetric")
    path = kwargs.get("quantized_checkpoints_path")
    if not hybrid and not kernel:
        return
    try:
        plan = find_plan(path)
    except Fp8LoaderError:
        return  # the load will raise it
    if plan is None:
        return
    floats = dequantized(plan, options)
    fp8 = set(experts_of(plan)) - {pair.module for pair in plan.pairs if pair.weight in floats}
    if fp8 and hybrid:
        raise OptionError(
            f"hybrid_sharding_config: NxD copies the weights of experts for it and not their scales, and "
            f"{len(fp8)} of {path} are FP8. Leave it out and set moe_tp_degree and moe_ep_degree, or have the experts "
            f'as bfloat16: {FLAG}={{"dequantize": ["*.experts.*"]}}'
        )
    if fp8:
        raise OptionError(
            f'{FUSED_KERNEL} with quantization_type="{kind}": the kernel takes one scale an output row '
            f"of each expert and would misread these; {len(fp8)} matrices of {path} are FP8 experts. Set "
            'quantization_type="expert_wise_per_channel_symmetric", or leave the kernel out'
        )


def _holds_fp8(path: Any) -> bool:
    try:
        plan = find_plan(path)
    except Fp8LoaderError:
        return False
    return plan is not None and has_fp8(plan)


def _settle_list(
    kwargs: MutableMapping[str, Any], path: Any, options: Mapping[str, Any], *, draft: bool = False
) -> None:
    """Fill ``modules_to_not_convert`` in from the checkpoint, or hold the user's list against it."""
    given = kwargs.get(LIST)
    if isinstance(given, str) or not all(isinstance(entry, str) for entry in given or ()):
        # NxD would take each letter of a text for an entry, and quantize nothing
        raise OptionError(f"{LIST}={given!r}: expected a list of texts, each a part of a module's path")
    try:
        plan = find_plan(path)
    except Fp8LoaderError as error:
        log.warning("%s is not checked: %s", LIST, error)  # the load, if there is one, will raise it
        return
    if plan is None:
        return
    if not draft and not has_fp8(plan):
        log.warning("%s: %s is set, but there are no float8_e4m3fn weights here", printable(str(path)), FLAG)
        return
    out, plan = _plain(plan, options), unfused(plan)
    if not given:
        filled = modules_to_not_convert(plan, out)
        if filled:
            log.info("%s: %s = %s", printable(str(path)), LIST, filled)
            kwargs[LIST] = filled
        return
    listed, missing = contradictions(plan, [*given, *_experts_of_checkpoints(given)], out)
    if listed:
        log.warning("%s names, so that they are loaded as bfloat16, %s", LIST, listing("FP8 module", listed, 5))
    instead = [f"{entry}: write {_some(found)}" for entry, found in misnamed(plan, given).items()]
    without = f"NxD Inference has no path with {listing('name', instead)}\n" if instead else ""
    if missing:
        problems = [f"not FP8 in the checkpoint, or not loaded so, and not listed: {name}" for name in missing]
        raise OptionError(
            f"{LIST} contradicts {Shown(path)}, {listing('module', problems)}\n"
            f"{without}NxD Inference looks for their scales in vain. "
            f"Leave {LIST} out to have it filled in, as {modules_to_not_convert(plan, out)}"
        )
    if without:
        log.warning("%s holds what does nothing: %s", LIST, without.rstrip())


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# -- checkpoints -----------------------------------------------------------------------------------------------


def has_fp8(plan: Plan) -> bool:
    """Are there FP8 weights?"""
    return bool(plan.fp8_weights)


def find_plan(path: Any) -> Plan | None:
    """The plan of the checkpoint at ``path``; None where there is none (yet).

    Raises:
        Fp8LoaderError: there is one, and it is damaged or ambiguous.
    """
    if is_store(path):
        return plan_checkpoint(path)
    if not isinstance(path, str | os.PathLike) or not os.path.exists(path):
        return None
    where = Path(path)
    files = sorted(where.iterdir()) if where.is_dir() else [where]
    files = [f for f in files if where.is_file() or f.name.endswith((".safetensors", ".bin", ".index.json"))]
    if not files:
        return None
    if where.is_file() and where.suffix not in (".safetensors", ".bin"):  # `torch.save`d by NxD Inference itself
        import torch

        loaded = load_bin(where, device="meta")
        return make_plan(
            {n: describe(n, t, where) for n, t in loaded.items() if isinstance(t, torch.Tensor)}, str(where)
        )
    return plan_checkpoint(where)
