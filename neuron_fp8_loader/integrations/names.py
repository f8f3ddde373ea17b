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
_QKV = re.compile(r"\.(self_attn|attn|attention)\.(?P<part>[qkv]_proj)$")
# what NxD Inference builds from layers that it quantizes, in every model
_QUANTIZED = re.compile(r"(^lm_head|\.(([qkvo]|qkv|gate|up|gate_up|down)_proj|Wqkv|w1|w2|w3)|\.A_log|\.dt_bias)$")
# latent attention multiplies by this weight itself: a quantized layer there would never apply its scales
_ABSORBED = re.compile(r"\.kv_b_proj$")
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
        paths: the paths that it may have in NxD Inference, and its own without ``model.``.
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
    entries = [entry for entry in given if entry]
    fp8, plain = _modules(plan, dequantized)

    def named(module: _Module) -> bool:
        return any(entry in path for entry in entries for path in (module.name, *module.paths))

    missing = [m.name for m in plain if _QUANTIZED.search(m.paths[0]) and not named(m)]
    return [m.name for m in fp8 if named(m)], missing


def short_name(name: str) -> str:
    """A name of the checkpoint without what stands before ``layers.N`` in it."""
    return _PREFIX.sub("", name)


def paths_of(module: str) -> tuple[str, ...]:
    """The paths that a module of the checkpoint may have in NxD Inference."""
    return _module(module).paths


def checkpoint_modules(plan: Plan, dequantized: Collection[str] = ()) -> list[str]:
    """The modules of the decoder in a checkpoint that are not FP8, by their names there."""
    return [module.name for module in _modules(plan, dequantized)[1]]


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
    return [_module(name) for name in fp8], [_module(name) for name in plain if _can_be_quantized(name)]


def _can_be_quantized(name: str) -> bool:
    """Might NxD Inference make a quantized layer of it, in this model? Not of embeddings, routers, other towers."""
    short = _PREFIX.sub("", name)
    if _OTHER_TOWER.match(short) or _EMBEDDING.search(short) or _ROUTER.search(short):
        return False
    return _BLOCK.match(short) is not None or _LAYER.search(short) is None


def _module(name: str) -> _Module:
    short = _PREFIX.sub("", name)
    if short.startswith("blocks."):
        return _of_block(name, short)
    renamed = _SHARED.sub(".shared_experts", short.replace(".block_sparse_moe.", ".mlp."))
    qkv, expert = _QKV.search(renamed), _EXPERT.search(renamed)
    if qkv:
        head = renamed[: qkv.start("part")] + "qkv_proj."
        return _Module(name, head + qkv["part"], (short, head + qkv["part"], head + "Wqkv"))
    if expert:
        # w1, w3: gate and up; w2: down (Mixtral, MiniMax). NxD keeps all experts in one tensor a projection.
        proj = "down_proj" if expert["proj"] in ("down_proj", "w2") else "gate_up_proj"
        block = renamed[: expert.start(1)]
        if block.endswith(".feed_forward."):  # Llama 4
            block += "moe."
        entry = f"{block}expert_mlps.mlp_op.{proj}"
        return _Module(name, entry, (short, entry))
    if renamed.endswith(".o_proj"):
        return _Module(name, renamed, (short, renamed, renamed + ".o_proj"))
    if renamed.endswith((".shared_experts.gate_proj", ".shared_experts.up_proj")):
        return _Module(name, renamed, (short, renamed, renamed.rpartition(".")[0] + ".gate_up_proj"))
    return _Module(name, renamed, (short, renamed))


def _of_block(name: str, short: str) -> _Module:
    """As ``_module``, in the names of DBRX."""
    renamed = _ATTENTION_OF_BLOCK.sub(r"layers.\1.self_attn.", short).removesuffix("_weight")
    if renamed.endswith(".self_attn.out_proj"):
        renamed = renamed.removesuffix("out_proj") + "o_proj"
        return _Module(name, renamed, (short, renamed, renamed + ".o_proj"))
    expert = _FFN_OF_BLOCK.match(renamed)
    if expert and expert[2]:
        proj = "down_proj" if renamed.endswith(".w2") else "gate_up_proj"
        renamed = f"layers.{expert[1]}.ffn.expert_mlps.mlp_op.{proj}"
    return _Module(name, renamed, (short, renamed))


def _from_wide_to_narrow(module: _Module) -> Iterator[str]:
    """Entries that cover the module: its block, what lies between, itself."""
    block = _BLOCK.match(module.entry)
    depth = module.entry[: block.end()].count(".") + 1 if block else len(module.entry.split("."))
    parts = module.entry.split(".")
    for end in range(depth, len(parts) + 1):
        yield ".".join(parts[:end])


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in name.split(".")]
