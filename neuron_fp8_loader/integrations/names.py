"""Checkpoint names and the names that NxD Inference gives the same modules: ``modules_to_not_convert``.

NxD leaves a linear layer unquantized if an entry of the list is a substring of its dotted path from the model's root
(``neuronx_distributed/quantization/quantize.py``). So an entry must be long enough to hit nothing else: ``mlp.gate``
would hit ``mlp.gate_proj`` too. Llama's fused QKV looks for ``layers.N.self_attn`` itself, and what switches the
quantized MLP kernel off for a layer for ``layers.N.mlp`` in any entry (``models/llama/modeling_llama.py``).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..conventions import module_of
from ..errors import listing, printable
from ..plan import Plan

log = logging.getLogger("neuron_fp8_loader")

_PLAIN = ("bfloat16", "float16", "float32", "float64")
# what stands before `layers.N` in checkpoints, and not in the decoder that NxD Inference builds
_PREFIX = re.compile(r"^((model|language_model|text_model|transformer|llm|thinker)\.)+")
_BLOCK = re.compile(
    r"^(?P<layer>(layers|h|blocks|transformer_blocks|single_transformer_blocks)\.\d+)\.(?P<child>[^.]+)"
)
_LAYER = re.compile(r"(^|\.)(layers|layer|blocks|block|h)\.\d+\.")
# parts with a NeuronConfig of their own, or that NxD Inference does not load
_OTHER_TOWER = re.compile(r"^(visual|vision\w*|audio\w*|image\w*|multi_modal\w*|multimodal\w*|mm_\w+|mtp\w*)(\.|$)")
_EMBEDDING = re.compile(r"(^|\.)(embed_\w+|\w*embeddings?|wte|wpe)$")
_ROUTER = re.compile(r"(^|\.)(mlp|block_sparse_moe|feed_forward|ffn|moe)\.(gate|router|router\.layer|gate\.wg)$")
_EXPERT = re.compile(r"\.(experts(\.\d+)?\.(?P<proj>gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3))$")
_SHARED = re.compile(r"\.shared_experts?(?=\.|$)")
_SHARED_OF_LAYER = re.compile(r"(^layers\.\d+)\.mlp\.shared_experts(?=\.)")  # where GLM-5.2 has them
_QKV = re.compile(r"\.(self_attn|attn|attention)\.(?P<part>[qkv]_proj)$")
# what NxD Inference builds from layers that it quantizes, in every model
_QUANTIZED = re.compile(r"(^lm_head|\.(([qkvo]|qkv|gate|up|gate_up|down)_proj|Wqkv|w1|w2|w3)|\.A_log|\.dt_bias)$")
# latent attention multiplies by this weight itself: a quantized layer there would never apply its scales
_ABSORBED = re.compile(r"\.kv_b_proj$")
_LATENT = ".kv_a_proj_with_mqa"
_PATTERN = re.compile(r"^re:|[*?\[]")
# vectors of linear attention (Qwen3.5), which its port keeps in layers so that they are sharded
_VECTORS = re.compile(r"\.linear_attn\.(A_log|dt_bias)$")
# DBRX
_ATTENTION_OF_BLOCK = re.compile(r"^blocks\.(\d+)\.norm_attn_norm\.attn\.")
_FFN_OF_BLOCK = re.compile(r"^blocks\.(\d+)\.ffn\.(experts\.)?(mlp\.)?")


@dataclass(frozen=True)
class _Module:
    """A linear layer of the checkpoint.

    Attributes:
        name: in the checkpoint, e.g. ``model.layers.0.self_attn.q_proj``.
        entry: how a list names it, and nothing but it, e.g. ``layers.0.self_attn.qkv_proj.q_proj``.
        paths: the paths that it may have in NxD Inference: whose model it is is not known here.
    """

    name: str
    entry: str
    paths: tuple[str, ...]


def modules_to_not_convert(plan: Plan, dequantized: Collection[str] = ()) -> list[str]:
    """The modules of a checkpoint that are not FP8, for NeuronConfig's ``modules_to_not_convert``.

    Args:
        plan: of the checkpoint.
        dequantized: names of FP8 weights that the load turns into bfloat16.

    Returns:
        names as NxD Inference matches them, in the order of the layers: whole blocks (``layers.0.self_attn``) where
        nothing in them is FP8, else single modules. No entry matches a module that is FP8. Embeddings and routers,
        which NxD never quantizes, are left out; ``lm_head`` is in where it is tied and so in no file. A module that
        cannot be named without hitting an FP8 one is left out too, with a warning.
    """
    fp8, plain = _modules(plan, dequantized)
    hot = [path for module in fp8 for path in module.paths]
    found: dict[str, None] = {}
    lost = []
    for module in plain:
        for entry in _from_wide_to_narrow(module):
            if not any(entry in path for path in hot):
                found.setdefault(entry)
                break
        else:
            lost.append(module.name)
    if lost:
        log.warning(
            "%s: modules_to_not_convert cannot name, without naming an FP8 module too, %s\n"
            "NxD Inference may miss their scales; dequantize the FP8 modules beside them.",
            printable(plan.source),
            listing("module", lost),
        )
    return sorted(found, key=_natural)


def contradictions(plan: Plan, given: Iterable[str], dequantized: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Where a list given by the user and the checkpoint disagree.

    Args:
        plan: of the checkpoint.
        given: ``modules_to_not_convert``.
        dequantized: as above.

    Returns:
        FP8 modules that the list names, which would be loaded without their scales; and modules that are neither FP8
        nor in the list, whose scales would be looked for in vain. Of the latter only those that every model of
        NxD Inference quantizes: projections of attention and MLP, experts, ``lm_head``. Names of the checkpoint.
    """
    entries, known = list(given), {}
    fp8, plain = _modules(plan, dequantized)
    for module in (*fp8, *plain):
        if module.paths not in known:  # those of all experts of a layer are the same
            known[module.paths] = _named(module, entries)
    missing = [m.name for m in plain if _QUANTIZED.search(m.paths[0]) and not known[m.paths]]
    return [m.name for m in fp8 if known[m.paths]], missing


def misnamed(plan: Plan, given: Iterable[str]) -> dict[str, list[str]]:
    """Entries that name modules as the checkpoint does, or by a pattern: they are part of no path, and match nothing.

    Args:
        plan: of the checkpoint.
        given: ``modules_to_not_convert``.

    Returns:
        entry -> the entries to write instead, which match the same modules and no others. Entries that mean no module
        which could be quantized are not in it: routers, norms, other towers.
    """
    fp8, plain = _modules(plan, ())
    modules = [*fp8, *plain]
    paths = {path for module in modules for path in module.paths}
    text = "\n".join(f".{module.name}." for module in modules)  # one search of it is quicker than one of each
    found = {}
    for entry in given:
        if any(entry in path for path in paths):
            continue
        name = entry.removesuffix(".weight").strip(".")
        if f".{name}." not in text and not _PATTERN.search(name):
            continue
        meant = {m.name: m for m in modules if _means(name, m.name)}
        if not meant:
            continue
        short = short_name(name)
        whole = [e for e in (short, f"{short}.") if {m.name for m in modules if _named(m, [e])} == meant.keys()]
        found[entry] = whole[:1] or sorted({m.entry for m in meant.values()}, key=_natural)
    return found


def _means(entry: str, name: str) -> bool:
    """By its parts; with ``re:`` as compressed-tensors lists what it ignores, or as a shell pattern."""
    if entry.startswith("re:"):
        try:
            return re.match(entry[3:], name) is not None
        except re.error:
            return False
    return fnmatchcase(name, entry) or f".{entry}." in f".{name}."


def _named(module: _Module, entries: Iterable[str]) -> bool:
    return any(entry in path for entry in entries for path in module.paths)


def short_name(name: str) -> str:
    """A name of the checkpoint without what stands before ``layers.N`` in it."""
    return _PREFIX.sub("", name)


def is_of_decoder(name: str) -> bool:
    """Is a tensor of the checkpoint of no other tower, and of no layer that predicts more tokens?"""
    return _OTHER_TOWER.match(short_name(name)) is None


def paths_of(module: str) -> tuple[str, ...]:
    """The paths that a module of the checkpoint may have in NxD Inference, and its own without ``model.`` first."""
    return tuple(dict.fromkeys((short_name(module), *_module(module).paths)))


def checkpoint_modules(plan: Plan, dequantized: Collection[str] = ()) -> list[str]:
    """The modules of the decoder in a checkpoint that are not FP8, by their names there."""
    return [module.name for module in _modules(plan, dequantized)[1]]


def absorbed(plan: Plan) -> list[str]:
    """The FP8 modules of a checkpoint whose weight latent attention uses without asking its layer."""
    return [pair.module for pair in plan.pairs if _ABSORBED.search(_PREFIX.sub("", pair.module))]


def never_quantized(plan: Plan) -> list[str]:
    """The FP8 modules of a checkpoint that no model has as FP8: routers, embeddings, and those whose weight it uses
    without asking its layer."""
    return [pair.module for pair in plan.pairs if _is_never_quantized(pair.module)]


def _is_never_quantized(module: str) -> bool:
    return any(kind.search(_PREFIX.sub("", module)) for kind in (_ABSORBED, _ROUTER, _EMBEDDING))


def _modules(plan: Plan, dequantized: Collection[str]) -> tuple[list[_Module], list[_Module]]:
    """(FP8 modules, modules that are not) of the decoder."""
    weights = [*(pair.weight for pair in plan.pairs), *plan.other_formats, *plan.unscaled]
    plain_too = {*dequantized, *(name for name in weights if _is_never_quantized(module_of(name)))}
    fp8 = [module_of(name) for name in weights if name not in plain_too]
    plain = [*plan.unquantized, *(module_of(name) for name in weights if name in plain_too)]
    plain += [
        name
        for name, info in plan.tensors.items()
        if len(info.shape) == 3 and info.dtype in _PLAIN and _EXPERT.search("." + name)  # fused experts: no `.weight`
    ]
    plain += [name for name in plan.tensors if _VECTORS.search(name)]
    tied = any(_EMBEDDING.search(name) for name in plain) and not any(
        _PREFIX.sub("", name) == "lm_head" for name in (*plain, *fp8)
    )
    if tied:
        plain.append("lm_head")
    latent = {name.rpartition(".")[0] for name in (*fp8, *plain) if name.endswith(_LATENT)}
    return (
        [_module(name, latent) for name in fp8],
        [_module(name, latent) for name in plain if _can_be_quantized(name)],
    )


def _can_be_quantized(name: str) -> bool:
    """Might NxD Inference make a quantized layer of it, in this model? Not of embeddings, routers, other towers."""
    short = _PREFIX.sub("", name)
    if _OTHER_TOWER.match(short) or _EMBEDDING.search(short) or _ROUTER.search(short):
        return False
    return _BLOCK.match(short) is not None or _LAYER.search(short) is None


def _module(name: str, latent: Collection[str] = ()) -> _Module:
    """``latent``: what holds the projections of latent attention, which has its q_proj as the checkpoint has it."""
    short = _PREFIX.sub("", name)
    if short.startswith("blocks."):
        return _of_block(name, short)
    renamed = _SHARED.sub(".shared_experts", short.replace(".block_sparse_moe.", ".mlp."))
    qkv, expert = _QKV.search(renamed), _EXPERT.search(renamed)
    if qkv:
        head = renamed[: qkv.start("part")] + "qkv_proj."
        if name.rpartition(".")[0] in latent:
            return _Module(name, renamed, (renamed,))
        return _Module(name, head + qkv["part"], (head + qkv["part"], head + "Wqkv"))
    if expert:
        # w1, w3: gate and up; w2: down (Mixtral, MiniMax). NxD keeps all experts in one tensor a projection.
        proj = "down_proj" if expert["proj"] in ("down_proj", "w2") else "gate_up_proj"
        block = renamed[: expert.start(1)]
        if block.endswith(".feed_forward."):  # Llama 4
            block += "moe."
        entry = f"{block}expert_mlps.mlp_op.{proj}"
        own = ".block_sparse_moe." if ".block_sparse_moe." in short else ".mlp."  # MiniMax keeps the block's name
        return _Module(name, entry, (entry, entry.replace(".mlp.", own)))
    if renamed.endswith(".o_proj"):
        return _Module(name, renamed, (short, renamed, renamed + ".o_proj"))
    if ".shared_experts." in renamed:
        paths = [short, renamed, _SHARED_OF_LAYER.sub(r"\1.shared_expert", renamed)]
        if renamed.endswith((".gate_proj", ".up_proj")):
            paths.append(renamed.rpartition(".")[0] + ".gate_up_proj")
        return _Module(name, renamed, tuple(paths))
    return _Module(name, renamed, (short, renamed))


def _of_block(name: str, short: str) -> _Module:
    """As ``_module``, in the names of DBRX."""
    renamed = _ATTENTION_OF_BLOCK.sub(r"layers.\1.self_attn.", short).removesuffix("_weight")
    if renamed.endswith(".self_attn.out_proj"):
        renamed = renamed.removesuffix("out_proj") + "o_proj"
        return _Module(name, renamed, (renamed, renamed + ".o_proj"))
    if renamed.endswith(".self_attn.Wqkv"):
        renamed = renamed.removesuffix("Wqkv") + "qkv_proj.Wqkv"
    expert = _FFN_OF_BLOCK.match(renamed)
    if expert and expert[2]:
        proj = "down_proj" if renamed.endswith(".w2") else "gate_up_proj"
        renamed = f"layers.{expert[1]}.ffn.expert_mlps.mlp_op.{proj}"
    return _Module(name, renamed, (renamed,))


def _from_wide_to_narrow(module: _Module) -> Iterator[str]:
    """Entries that cover the module: its block, what lies between, itself."""
    block = _BLOCK.match(module.entry)
    depth = module.entry[: block.end()].count(".") + 1 if block else len(module.entry.split("."))
    parts = module.entry.split(".")
    for end in range(depth, len(parts) + 1):
        yield ".".join(parts[:end])


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in name.split(".")]
