"""What NxD Inference calls to read a HF checkpoint: replaced, under the flag, by reading that rescales."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import describe
from ..checkpoint.declared import read_declared
from ..conventions import module_of
from ..errors import Shown, listing
from ..load.files import load_checkpoint
from ..load.state_dict import rescale_by
from ..options import Options
from ..plan import Pair, Plan, make_plan, make_recipe, plan_checkpoint
from .cast import Elements
from .check import check_ready, is_weight
from .complete import as_their_layers, check_complete, codes_as_values, scales_of
from .converting import quick
from .experts import parts_of
from .explain import explained
from .flag import BLOCKWISE, FLAG, dequantized, experts_apart, options_for, parse, quantization_type
from .fused_scales import Form, attach_scales
from .generation import check_fused_kernel
from .keys import nxd_names, quantizes_itself, reads_scale_inv, renamed
from .modules import Modules, check_plain, experts_of, modules_of, not_quantized, one_each, patterns
from .names import paths_of, short_name
from .neuron_config import find_plan, has_fp8
from .places import behind, standing_in
from .qkv import fused_again, interleaved_as_floats, parts_dequantized, split_with_rows, unfused
from .row_scales import Rows
from .stacks import as_taken, check_alike, only_of, takes

log = logging.getLogger("neuron_fp8_loader")

READERS = {
    "load_safetensors": "model.safetensors",
    "load_safetensors_sharded": "model.safetensors.index.json",
    "load_diffusers_safetensors": "diffusion_pytorch_model.safetensors",
    "load_safetensors_sharded_diffusers_model": "diffusion_pytorch_model.safetensors.index.json",
    "load_pytorch_model_bin": "pytorch_model.bin",
    "load_pytorch_model_bin_sharded": "pytorch_model.bin.index.json",
}
"""Functions of NxD Inference's modules/checkpoint.py, and what each reads in the directory that it is given."""


@dataclass
class Session:
    """One load under the flag.

    Attributes:
        options: for the loader.
        quantized: are there quantized layers, which look for scales under names of their own?
        blocks: do the experts, and only they, take blocks?
        own_scales: does the model read ``weight_scale_inv`` by itself, in the shape that it has?
        read_ready: was the state dict read by the loader, and so is rescaled?
        entries: ``modules_to_not_convert``.
        app: the application, where it is known; its model tells which modules are quantized.
        prefix: of the draft or the target in the model.
        scales: of the FP8 weights that the model's conversion was given.
        unscaled: modules whose FP8 weights have no scale, by the paths that they may have.
        pairs: of the checkpoint, by ``short_name`` of the module.
        modules: of the model, where it is known.
    """

    options: dict[str, Any]
    quantized: bool = True
    blocks: bool = False
    own_scales: bool = False
    read_ready: bool = False
    entries: tuple[str, ...] = ()
    app: Any = None
    prefix: str = ""
    scales: dict[str, str] = field(default_factory=dict)
    unscaled: set[str] = field(default_factory=set)
    pairs: dict[str, Pair] = field(default_factory=dict)
    modules: Modules | None = None

    def options_for(self, plan: Plan) -> dict[str, Any]:
        """The options, but that scales which the model reads by itself keep their shapes, and that FP8 modules which
        NxD does not quantize become bfloat16.

        Raises:
            OptionError: a module that is not FP8 goes to a quantized layer.
        """
        self.unscaled |= {path for name in plan.unscaled for path in paths_of(module_of(name))}
        if self._keeps_names(plan):
            if not self.quantized:  # experts that become bfloat16 are to lie as the model takes them, too
                floats = dequantized(plan, self.options)
                self.pairs = {short_name(pair.module): pair for pair in plan.pairs if pair.weight in floats}
            return {**self.options, "layout": "keep", **interleaved_as_floats(plan, self.options)}
        modules = modules_of(self.app) if self.app is not None else None
        if modules is not None and self.prefix:
            modules = modules.below(self.prefix)
        self.modules = modules
        self.pairs = {short_name(pair.module): pair for pair in plan.pairs}
        more = fused_again(plan, not_quantized(unfused(plan), self.entries, modules))
        options = {**self.options, **split_with_rows(plan, self.options)}
        if more:
            log.info("%s: as bfloat16, for NxD does not quantize %s", plan.source, listing("FP8 module", more, 5))
            given = Options.of(self.options).dequantize
            options["dequantize"] = [*given, *patterns(plan, more)]
        if Options.of(self.options).layout == "per_channel":
            kept = experts_of(plan) if self.blocks else one_each(plan)
            options["keep"] = [*Options.of(self.options).keep, *patterns(plan, kept)]
        if modules is not None:
            check_plain(unfused(plan), parts_dequantized(plan, options), modules, self.entries)
        return options

    def named(self, state_dict: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """With the names that the layers of the model look for."""
        return state_dict if self._keeps_names(plan) else renamed(state_dict, nxd_names(unfused(plan)), plan.source)

    def _keeps_names(self, plan: Plan) -> bool:
        # no model reads interleaved blocks by itself: row i has not the scale i // 128
        if self.quantized and plan.interleaved:
            return False
        return not self.quantized or (self.own_scales and any(p.scale.endswith("_scale_inv") for p in plan.pairs))


_session: ContextVar[Session | None] = ContextVar("neuron_fp8_loader_session", default=None)
_application: ContextVar[Any] = ContextVar("neuron_fp8_loader_application", default=None)


@contextmanager
def _within(session: Session | None) -> Iterator[None]:
    token = _session.set(session)
    try:
        yield
    finally:
        _session.reset(token)


def _session_for(config: Any, model: type) -> Session | None:
    neuron_config = getattr(config, "neuron_config", None)
    options = options_for(neuron_config)
    if options is None:
        return None
    quantized = bool(getattr(neuron_config, "quantized", False))
    own = _quantizes_itself(model, neuron_config) if quantized else reads_scale_inv(model)
    entries = tuple(getattr(neuron_config, "modules_to_not_convert", None) or ())
    prefix = getattr(model, "_FUSED_PREFIX", "")
    blocks = experts_apart(neuron_config) and quantization_type(neuron_config) == BLOCKWISE
    app = _application.get()
    return Session(options, quantized, blocks, own, entries=entries, app=app, prefix=prefix)


def _quantizes_itself(model: type, neuron_config: Any) -> bool:
    """As ``quantizes_itself``, but for models around whose conversion experts can be put, and whose layers take one
    scale for all experts only if they are asked to."""
    form = takes(model)
    one_for_all = quantization_type(neuron_config) == "per_tensor_symmetric"
    around = form is not None and form.block and not (form.stacked and one_for_all)
    return not around and quantizes_itself(model)


def reader(file_name: str) -> Callable[..., Any]:
    """The replacement of one of ``READERS``: outside a load under the flag it calls the original."""

    def read(original: Callable[..., Any], state_dict_dir: str, *args: Any, **kwargs: Any) -> Any:
        session = _session.get()
        if session is None:
            return original(state_dict_dir, *args, **kwargs)
        path = behind(state_dict_dir, file_name)
        options = session.options_for(plan_checkpoint(path))
        loaded = load_checkpoint(path, **options)
        session.read_ready = True
        return session.named(loaded.state_dict, loaded.plan)

    return read


def get_state_dict(original: Callable[..., Any], cls: type, path: str, config: Any, *args: Any, **kwargs: Any) -> Any:
    """``NeuronApplicationBase.get_state_dict``: draft and target each come through here, with their own config."""
    session = _session_for(config, cls)
    with _within(session):  # None too: a draft without the flag is not the target's business
        if session is None:
            return original(cls, path, config, *args, **kwargs)
        with explained(Shown(path)):
            state_dict = original(_ready_before_conversion(cls, session, path, config), path, config, *args, **kwargs)
    _check(state_dict, path, session)
    if not config.neuron_config.is_mlp_quantized() or session.quantized:
        head = f"{session.prefix}." if session.prefix else ""
        mine = {name.removeprefix(head): value for name, value in state_dict.items()}
        unscaled = session.unscaled if session.options.get("unscaled") != "dequantize" else ()
        check_complete(mine, session.scales, Shown(path), quantized=session.quantized, unscaled=unscaled)
    return state_dict


def _ready_before_conversion(cls: Any, session: Session, path: str, config: Any) -> type:
    """``cls``, but that what was read by another way (one file, a HF model) is rescaled before it is converted, and
    that the scales of experts follow their weights.

    A conversion may fuse, split and rename; before it, weights and scales still have the names of the checkpoint.
    """
    convert = cls.convert_hf_to_neuron_state_dict

    def convert_ready(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not session.read_ready:
            infos = {n: describe(n, t) for n, t in state_dict.items() if isinstance(t, torch.Tensor)}
            where = Path(path)
            plan = make_plan(infos, cls.__name__, read_declared(where if where.is_dir() else where.parent))
            options = Options.of(session.options_for(plan))
            state_dict, _ = rescale_by(state_dict, make_recipe(plan, options), options, inplace=True)
            state_dict = session.named(state_dict, plan)
        session.scales.update(scales_of(state_dict))
        taken, threads = takes(cls), Options.of(session.options).thread_count()
        parts = parts_of(state_dict, session.pairs, taken.experts(config) if taken else 0)
        rows, elements = Rows.of(state_dict), Elements.of(state_dict)
        check_alike(state_dict, taken, Shown(path), floats=not session.quantized and not session.own_scales)
        fp8 = [] if session.quantized else [n for n, t in state_dict.items() if is_weight(n, t, state_dict)]
        with quick(threads):
            placed = as_taken(state_dict, taken, session.pairs)
            try:
                converted = convert(state_dict, *args, **kwargs)
            except Exception as error:
                if fp8:
                    raise codes_as_values(Shown(path), fp8) from error
                raise
        converted.update(only_of(converted, placed))
        elements.check(converted, Shown(path))
        if session.quantized:
            rows.attach(converted, Shown(path))
        if parts:
            form = Form.of(config.neuron_config, session.modules)
            attach_scales(converted, parts, form, Shown(path), threads)
        as_their_layers(converted, session.modules, Shown(path), threads)
        return converted

    namespace = {
        "convert_hf_to_neuron_state_dict": staticmethod(convert_ready),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    return types.new_class(cls.__name__, (cls,), {}, lambda body: body.update(namespace))


def checkpoint_loader_fn(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """``NeuronApplicationBase.checkpoint_loader_fn``: for applications with a ``get_state_dict`` of their own."""
    token = _application.set(self)
    try:
        session = _session_for(self.config, type(self))
        off = session is None
        with (
            _within(session),
            standing_in(None if off else self.config.neuron_config),
            nullcontext() if off else _reading_through(self),
        ):
            state_dict = original(self, *args, **kwargs)
    finally:
        _application.reset(token)
    if session is not None and not all(_inherits(kind, "get_state_dict") for kind in _applications(self)):
        _check(state_dict, str(getattr(self, "model_path", type(self).__name__)), session)
    return state_dict


@contextmanager
def _reading_through(app: Any) -> Iterator[None]:
    """NxD Inference's own ``get_state_dict`` for an application whose class reads past it (``Takes.reads``)."""
    form = takes(type(app))
    if form is None or not form.reads:
        yield
        return
    base = next(base for base in type(app).__mro__ if base.__name__ == "NeuronApplicationBase")
    app.get_state_dict = vars(base)["get_state_dict"].__get__(None, type(app))
    try:
        yield
    finally:
        del app.get_state_dict


def _applications(app: Any) -> list[type]:
    draft = getattr(getattr(app, "fused_spec_config", None), "draft_model_cls", None)
    return [type(app)] if draft is None else [type(app), draft]


def _inherits(kind: type, name: str) -> bool:
    owner = next(base for base in kind.__mro__ if name in vars(base))
    return owner.__name__ == "NeuronApplicationBase"


def save_quantized_state_dict(
    original: Callable[..., Any], cls: type, model_path: str, config: Any, *args: Any, **kwargs: Any
) -> Any:
    """``NeuronApplicationBase.save_quantized_state_dict``, which would quantize the model anew and write it over the
    FP8 checkpoint. Under the flag, on any platform, it does not."""
    neuron_config = getattr(config, "neuron_config", None)
    path = getattr(neuron_config, "quantized_checkpoints_path", None)
    if parse(getattr(neuron_config, FLAG, None)) is not None:
        plan = find_plan(path)
        if plan is not None and has_fp8(plan):
            log.info("%s holds FP8 weights already: nothing is quantized, nothing written", path)
            return None
    return original(cls, model_path, config, *args, **kwargs)


def _check(state_dict: Mapping[str, Any], path: str | Path, session: Session) -> None:
    check_ready(state_dict, Shown(path), Options.of(session.options))


def invoke_preshard_hook(original: Callable[..., Any], module: Any, checkpoint: Any, prefix: str = "") -> Any:
    """NxD's ``trace.trace.invoke_preshard_hook``, which calls itself for the modules below."""
    neuron_config = getattr(getattr(module, "config", None), "neuron_config", None)
    if prefix or options_for(neuron_config) is None:
        return original(module, checkpoint, prefix)
    with explained(type(module).__name__):
        return original(module, checkpoint, prefix)


def load_module(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """``DecoderModelInstance.load_module``, which swaps layers for quantized ones."""
    if parse(getattr(self.neuron_config, FLAG, None)) is None:
        return original(self, *args, **kwargs)
    name = getattr(self.model_cls, "__name__", "the model")
    with explained(name):
        result = original(self, *args, **kwargs)
    if isinstance(self.module, torch.nn.Module):
        check_fused_kernel(self.module, self.neuron_config, name)
    return result
