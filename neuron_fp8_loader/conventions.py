"""Which tensor is the scale of which weight: the published conventions, as data.

A template holds one ``{}``, the module's prefix. The dtype of the weight decides that it *is* an FP8 weight;
these names only say where its scale lies. All of them dequantise by multiplying, ``weight_scale_inv`` too:
"inv" is a name there, not a reciprocal. One's own convention: ``register(Convention(...))``.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import lru_cache

from .errors import OptionError


@dataclass(frozen=True)
class Convention:
    """One rule ``weight name -> scale name``.

    Attributes:
        name: what plans and reports call it.
        weight, scale: templates with one ``{}``, e.g. ``"{}.weight"`` and ``"{}.weight_scale"``.
        producers: who writes checkpoints like this.
        beats: names of conventions that do not count where this one matches too.
    """

    name: str
    weight: str
    scale: str
    producers: str
    beats: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for template in (self.weight, self.scale):
            if template.count("{}") != 1:
                raise OptionError(f"convention {self.name!r}: {template!r} must hold exactly one {{}}")

    def scale_of(self, weight: str) -> str | None:
        """The name that the scale of ``weight`` would have, or None where the rule is not about it."""
        return _rename(self.weight, self.scale, weight)

    def weight_of(self, scale: str) -> str | None:
        """The name of the weight that ``scale`` would belong to."""
        return _rename(self.scale, self.weight, scale)


@lru_cache(maxsize=256)
def _parts(template: str) -> tuple[str, str]:
    head, tail = template.split("{}")
    return head, tail


def _rename(source: str, target: str, name: str) -> str | None:
    head, tail = _parts(source)
    if not name.endswith(tail) or not name.startswith(head) or len(name) <= len(head) + len(tail):
        return None
    before, after = _parts(target)
    return before + name[len(head) : len(name) - len(tail)] + after


_REGISTRY: list[Convention] = [
    Convention("weight_scale", "{}.weight", "{}.weight_scale",
               "compressed-tensors, llm-compressor, ModelOpt, Quark, FBGEMM, AutoFP8, vLLM, auto-round, ComfyUI"),
    Convention("weight_scale_inv", "{}.weight", "{}.weight_scale_inv",
               "DeepSeek, Qwen, Kimi, MiniMax, GLM, transformers fine-grained FP8, Ministral, auto-round"),
    Convention("scale", "{}.weight", "{}.scale",
               "DeepSeek inference code, DeepSeek V4, NxD Inference"),
    Convention("qscale_weight", "{}.weight", "{}.qscale_weight", "Mistral (params.json)"),
    Convention("scale_weight", "{}.weight", "{}.scale_weight", "ComfyUI scaled fp8"),
    Convention("weights_scaling_factor", "{}.weight", "{}.weights_scaling_factor", "TensorRT-LLM"),
    Convention("torchao", "{}._weight_qdata", "{}._weight_scale", "torchao Float8Tensor"),
    Convention("quanto", "{}.weight._data", "{}.weight._scale", "optimum-quanto qfloat8"),
    Convention("quanto_weight", "{}.weight", "{}.weight._scale", "optimum-quanto qfloat8"),
    # fused experts: parameters without a module of their own
    Convention("fused_scale_inv", "{}", "{}_scale_inv", "transformers fine-grained FP8 (fused experts)"),
    Convention("fused_weight_scale", "{}", "{}_weight_scale", "ModelOpt Llama 4, DBRX (fused experts)"),
    Convention("fused_scale", "{}", "{}_scale", "FBGEMM Llama 4 (fused experts)"),
    Convention("fused_scales", "{}", "{}_scales", "fused experts"),
    Convention("fused_dot_weight_scale", "{}", "{}.weight_scale", "fused experts"),
    Convention("fused_dot_scale", "{}", "{}.scale", "NxD Inference (fused experts)"),
]  # fmt: skip


def conventions() -> tuple[Convention, ...]:
    """All known conventions, in the order in which they are tried."""
    return tuple(_REGISTRY)


def register(convention: Convention) -> None:
    """Add a convention of one's own; it is tried before the built-in ones.

    Raises:
        OptionError: the name is taken by another rule.
    """
    for known in _REGISTRY:
        if known.name == convention.name and known != convention:
            raise OptionError(f"a convention called {convention.name!r} is registered already: {known}")
    if convention not in _REGISTRY:
        _REGISTRY.insert(0, convention)


def unregister(name: str) -> None:
    """Take a convention out again. Raises OptionError, listing the known ones, for an unknown name."""
    for known in _REGISTRY:
        if known.name == name:
            _REGISTRY.remove(known)
            return
    raise OptionError(f"no convention {name!r}; there are {', '.join(c.name for c in _REGISTRY)}")


def candidates(weight: str, names: Container[str]) -> list[tuple[Convention, str]]:
    """The rules whose scale for ``weight`` is among ``names``, one a scale, beaten ones left out."""
    found: dict[str, Convention] = {}
    for rule in _REGISTRY:
        scale = rule.scale_of(weight)
        if scale is not None and scale in names and scale != weight:
            found.setdefault(scale, rule)
    beaten = {name for rule in found.values() for name in rule.beats}
    return [(rule, scale) for scale, rule in found.items() if rule.name not in beaten]


# -- tensors that look like FP8 weights and are not ---------------------------------------------------------

_PACKED = ("{}.weight", "{}.weight_packed", "{}")
_PACKED_SCALES = (
    "{}.weight_scale",
    "{}_weight_scale",
    "{}_scale",
    "{}_scales",
    "{}.scale",
    "{}.weight_scale_inv",
)


def packed_owners(scale: str) -> Iterator[str]:
    """Names of the tensors whose (NVFP4, MXFP4, ...) scale ``scale`` would be; NVFP4 scales are e4m3fn too."""
    for template in _PACKED_SCALES:
        for owner in _PACKED:
            name = _rename(template, owner, scale)
            if name is not None:
                yield name


_MARKER = re.compile(r"(^|\.)scaled_fp8$")


def is_marker(name: str, shape: tuple[int, ...]) -> bool:
    """ComfyUI's ``scaled_fp8``: an empty or two-element tensor whose dtype is the message, not its values."""
    return _MARKER.search(name) is not None and shape in ((0,), (2,))


# -- static activation and KV cache scales ------------------------------------------------------------------


@dataclass(frozen=True)
class ActivationRule:
    """Names of static scales calibrated for +-448.

    Attributes:
        name: what plans call the kind.
        pattern: regular expression, searched in the tensor's name; group ``module``, where it has one, names the
            module whose input is scaled (it counts only if that module's weight is FP8).
        producers: who writes it.
        reciprocal: the tensor holds 1/scale.
    """

    name: str
    pattern: re.Pattern[str]
    producers: str
    reciprocal: bool = False


def _rule(name: str, pattern: str, producers: str, reciprocal: bool = False) -> ActivationRule:
    return ActivationRule(name, re.compile(pattern), producers, reciprocal)


ACTIVATION_RULES: tuple[ActivationRule, ...] = (
    # attention and KV first: qkv fake quantisers end in qscale_act too
    _rule("kv", r"(^|\.)[qkv]_scale$", "vLLM, compressed-tensors, ModelOpt"),
    _rule("kv", r"(^|\.)(kv|prob)_scale$", "AutoFP8, Quark"),
    _rule("kv", r"(^|\.)[qkv]_proj\.output_scale$", "Quark, compressed-tensors"),
    _rule("kv", r"(^|\.)prob_output_scale$", "Quark"),
    _rule("kv", r"(^|\.)([kv]_cache|q)\.scale$", "HY-V3"),
    _rule("kv", r"(^|\.)[kv]_cache_scale$", "Gemma quantiser"),
    _rule("kv", r"(^|\.)\w+_fake_quantizer\.qscale_act$", "Mistral (params.json)"),
    _rule("kv", r"(^|\.)kv_cache_scaling_factor$", "TensorRT-LLM"),
    _rule("kv", r"(^|\.)kv_cache_rcp_scaling_factor$", "TensorRT-LLM", reciprocal=True),
    _rule(
        "kv",
        r"(^|\.)[kv]_cache\.quant_(input|output)\.scale_inv$",
        "Intel Neural Compressor",
        reciprocal=True,
    ),
    _rule("input", r"(^|\.)quant_input\.scale_inv$", "Intel Neural Compressor", reciprocal=True),
    _rule("input", r"^(?P<module>.+)[._](input|activation)_scale$", "compressed-tensors, ModelOpt, transformers"),
    _rule("input", r"^(?P<module>.+)\.(act_scale|qscale_act|scale_input)$", "auto-round, Mistral, ComfyUI"),
    _rule("input", r"^(?P<module>.+)\.activation_scaling_factor$", "TensorRT-LLM"),
    _rule("input", r"^(?P<module>.+)\.activation_rcp_scaling_factor$", "TensorRT-LLM", reciprocal=True),
)


def activation_rule(name: str) -> tuple[ActivationRule, str | None] | None:
    """The rule that ``name`` falls under and the module it names, or None: not an activation or KV scale."""
    if "sc" not in name:  # 'scale', 'qscale_act', 'scaling_factor': spares most names the search
        return None
    for rule in ACTIVATION_RULES:
        found = rule.pattern.search(name)
        if found:
            return rule, found.groupdict().get("module")
    return None
