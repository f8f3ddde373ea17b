"""The modules of the model that NxD will fill: which of them are FP8, and which weight of a checkpoint goes where.

A name in the checkpoint does not tell whether its layer is quantized: that hangs on the class of the module, which is
seen in the built model alone (a quantized layer's ``weight`` is FP8 there, on the meta device).
"""

from __future__ import annotations

import glob
import itertools
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..codes.formats import E4M3FN
from ..errors import OptionError, listing
from ..plan import Plan
from .names import checkpoint_modules, contradictions, never_quantized, paths_of

log = logging.getLogger("neuron_fp8_loader")

Shapes = tuple[tuple[int, ...], tuple[int, ...]]

_LAYER = re.compile(r"(?:^|\.)((?:layers|h|blocks|transformer_blocks|single_transformer_blocks)\.\d+)\.")
_QKV = re.compile(r"\.(self_attn|attn|attention)\.([qkv]_proj|qkv_proj|Wqkv)$")


class Modules:
    """The weights of a built model.

    Attributes:
        quantized: path of a module, from the model's root -> is its weight FP8?
        shapes: path of a quantized module -> the shapes of its weight and of its scale, on one rank.
        others: path of a module -> its other paths, for NxD's fused kernels hold the experts' modules once more
            (``mlp.moe_fused_tkg.expert_mlps``).
    """

    def __init__(
        self,
        quantized: Mapping[str, bool],
        shapes: Mapping[str, Shapes] | None = None,
        others: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.quantized, self.shapes, self.others = dict(quantized), dict(shapes or {}), dict(others or {})
        self._places: dict[tuple[str, str], list[str]] = {}
        for path in self.quantized:
            self._places.setdefault(_place(path), []).append(path)

    def below(self, prefix: str) -> Modules:
        """Those of a draft or a target, by paths of their own."""
        head = prefix + "."
        return Modules(
            {p.removeprefix(head): q for p, q in self.quantized.items() if p.startswith(head)},
            {p.removeprefix(head): s for p, s in self.shapes.items() if p.startswith(head)},
            {
                p.removeprefix(head): [o.removeprefix(head) for o in os]
                for p, os in self.others.items()
                if p.startswith(head)
            },
        )

    def find(self, module: str) -> str | None:
        """The module that takes the weight of a module of the checkpoint; None where that is not known.

        NxD puts blocks in between (``self_attn.qkv_proj.q_proj``, ``feed_forward.moe.expert_mlps``), so the path may
        have more parts than the name, in the same order.
        """
        for name in paths_of(module):
            if name in self.quantized:
                return name
            # experts are where the model has its MoE module, whatever the block is called
            head, fused, last = name.partition(".expert_mlps.")
            parts = [*head.split(".")[:2], "expert_mlps", *last.split(".")] if fused else name.split(".")
            found = [p for p in self._places.get(_place(name), ()) if _is_within(parts, p.split("."))]
            if found:
                return min(found, key=len)
        return None

    def entries_for(self, paths: Iterable[str]) -> list[str]:
        """Entries of ``modules_to_not_convert`` that keep these modules from being quantized, and no others.

        NxD looks at every path of a module, and one that no entry is part of is enough to have it quantized: a block
        that holds them all where that hits nothing else, else each path.
        """
        chosen, found = set(paths), {}
        for path in sorted(chosen):
            every = [path, *self.others.get(path, ())]
            block = _common(every)
            hit = {p for p, q in self.quantized.items() if q and any(block in o for o in (p, *self.others.get(p, ())))}
            found.update(dict.fromkeys([block] if block and hit <= chosen else every))
        return list(found)


def _common(paths: Sequence[str]) -> str:
    """The parts with which all paths begin."""
    first = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*(p.split(".") for p in paths), strict=False))
    return ".".join(parts[0] for parts in first)


def _place(path: str) -> tuple[str, str]:
    layer = _LAYER.search(path)
    return layer[1] if layer else "", path.rpartition(".")[2]


def _is_within(parts: list[str], path: list[str]) -> bool:
    rest = iter(path)
    return all(part in rest for part in parts)


def modules_of(app: Any) -> Modules | None:
    """The modules of an application's model: of the one that its builder has made, else of one made for this.

    Returns:
        None where there is no model to look at; the log says why.
    """
    try:
        models = _built(app) or [_build(app)]
    except Exception as error:  # whatever a model's constructor does; the names of the checkpoint have to do
        log.info("the model could not be built, so modules are known by their names: %s", error)
        return None
    quantized: dict[str, bool] = {}
    shapes: dict[str, Shapes] = {}
    others: dict[str, list[str]] = {}
    for model in models:
        paths: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            paths.setdefault(id(module), []).append(path)
        others.update({path: more for path, *more in paths.values() if more})
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if name.endswith(".weight") and parameter.dim() > 1:
                path = name.removesuffix(".weight")
                quantized[path] = parameter.dtype == E4M3FN
                scale = parameters.get(f"{path}.scale")
                if scale is not None:
                    shapes[path] = tuple(parameter.shape), tuple(scale.shape)
    return Modules(quantized, shapes, others)


def _built(app: Any) -> list[torch.nn.Module]:
    collection = getattr(getattr(app, "_builder", None), "model_collection", None) or {}
    found = (getattr(container.model_instance, "module", None) for container in collection.values())
    return [module for module in found if isinstance(module, torch.nn.Module)]


def _build(app: Any) -> torch.nn.Module:
    instance = app.models[0].get_model_instance()
    on_device: Any = getattr(sys.modules["neuronx_distributed.utils.model_utils"], "init_on_device")  # noqa: B009
    with _parallel(app.neuron_config), on_device(torch.device("meta"), force_custom_init_on_device=True):
        instance.load_module()
    module: torch.nn.Module = instance.module
    return module


@contextmanager
def _parallel(neuron_config: Any) -> Iterator[None]:
    """NxD's parallel state, as ModelBuilder sets it up to shard a checkpoint, unless there is one."""
    state: Any = sys.modules["neuronx_distributed.parallel_layers.parallel_state"]
    if state.model_parallel_is_initialized():
        yield
        return
    mock: Callable[..., Any] = sys.modules["neuronx_distributed.trace.mock_torchdist"].mock_distributed
    with mock(world_size=neuron_config.world_size):
        torch.distributed.init_process_group(backend="xla", rank=0, world_size=neuron_config.world_size)
        state.initialize_model_parallel(
            tensor_model_parallel_size=neuron_config.tp_degree,
            pipeline_model_parallel_size=neuron_config.pp_degree,
            expert_model_parallel_size=neuron_config.ep_degree,
            skip_collective_init=True,
            lnc_size=neuron_config.logical_nc_config,
        )
        try:
            yield
        finally:
            state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


# -- what that means for a checkpoint --------------------------------------------------------------------------


def with_bias(plan: Plan) -> list[str]:
    """FP8 projections of queries, keys and values that have a bias: NxD Inference cannot load them quantized."""
    names = (pair.module for pair in plan.pairs)
    return [name for name in names if _QKV.search(name) and f"{name}.bias" in plan.tensors]


def not_quantized(plan: Plan, entries: Collection[str], modules: Modules | None) -> list[str]:
    """The FP8 modules of a checkpoint whose layers NxD does not quantize, so that they must become bfloat16.

    Args:
        plan: of the checkpoint.
        entries: ``modules_to_not_convert``, which answers for modules not found in the model.
        modules: of the model, or None.
    """
    listed = set(contradictions(plan, entries)[0]) | set(with_bias(plan))
    always = set(never_quantized(plan))
    found = []
    for pair in plan.pairs:
        name = pair.module
        path = modules.find(name) if modules else None
        if name in always or (name in listed if path is None or modules is None else not modules.quantized[path]):
            found.append(name)
    return found


def check_plain(plan: Plan, dequantized: Collection[str], modules: Modules, entries: Sequence[str] = ()) -> None:
    """Raise OptionError where a weight that is not FP8 goes to a quantized layer: an entry of the list is missing.

    Args:
        plan: of the checkpoint.
        dequantized: names of FP8 weights that the load turns into bfloat16.
        modules: of the model.
        entries: ``modules_to_not_convert``, which the message completes.
    """
    wrong: dict[str, str] = {}
    for name in checkpoint_modules(plan, dequantized):
        path = modules.find(name)
        if path is not None and modules.quantized[path]:
            wrong.setdefault(path, name)
    if wrong:
        found = [f"{path}, for {name}" for path, name in wrong.items()]
        raise OptionError(
            f"{plan.source}: not FP8, or not any more, but NxD would quantize {listing('module', found)}\n"
            "No entry of modules_to_not_convert is part of every path that the model has for them. At compilation as "
            f"at loading, set modules_to_not_convert={[*entries, *modules.entries_for(wrong)]}"
        )


def experts_of(plan: Plan) -> list[str]:
    """The FP8 modules of a checkpoint that are experts, one by one or in a stack."""
    return [p.module for p in plan.pairs if ".experts." in p.module and len(plan.tensors[p.weight].shape) in (2, 3)]


def one_each(plan: Plan) -> list[str]:
    """Matrices of experts one below another (DBRX) with a scale for each, which only the model's config can tell."""
    return [
        p.module
        for p in plan.pairs
        if ".experts.mlp." in p.module and p.granularity.kind == "unknown" and len(plan.tensors[p.scale].shape) == 1
    ]


def patterns(plan: Plan, chosen: Iterable[str]) -> list[str]:
    """Patterns that match these modules and no other FP8 module, few where whole families are chosen."""
    wanted = set(chosen)
    families: dict[str, list[str]] = {}
    for pair in plan.pairs:
        families.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", pair.module), []).append(pair.module)
    found = []
    for family, members in families.items():
        inside = [name for name in members if name in wanted]
        whole = len(inside) == len(members) > 1 and glob.escape(family.replace("*", "")) == family.replace("*", "")
        # a * also stands for more parts of a name than one
        others = re.compile(re.escape(family).replace(r"\*", ".*"))
        if whole and not any(others.fullmatch(m[0]) for f, m in families.items() if f != family):
            found.append(family)
        else:
            found += map(glob.escape, inside)
    return found
