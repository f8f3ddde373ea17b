"""Static activation, attention and KV cache scales: the published names, as data.

Their meaning is x / scale -> FP8, calibrated so that the largest x lands on 448; on a device that ends at 240 they
saturate unless they grow with the weights' scales. No FP8 bytes on disk belong to them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ActivationRule:
    """Names of static scales calibrated for +-448.

    Attributes:
        kind: ``"kv"`` (attention and KV cache) or ``"input"`` (a module's input).
        pattern: regular expression, searched in the tensor's name; group ``module``, where it has one, names the
            module that the scale belongs to (it counts only if that module's weight is FP8).
        producers: who writes it.
        reciprocal: the tensor holds 1/scale.
        partner: a scale with more than one value counts only if the name with this replacement (pattern, text) is
            there too. Models with QK norm have learned vectors called ``q_scale`` and ``k_scale``, but no ``v_scale``.
    """

    kind: str
    pattern: re.Pattern[str]
    producers: str
    reciprocal: bool = False
    partner: tuple[str, str] | None = None


def _rule(
    kind: str, pattern: str, producers: str, reciprocal: bool = False, partner: tuple[str, str] | None = None
) -> ActivationRule:
    return ActivationRule(kind, re.compile(pattern), producers, reciprocal, partner)


ACTIVATION_RULES: tuple[ActivationRule, ...] = (
    # attention and KV first: qkv fake quantizers end in qscale_act too
    _rule(
        "kv", r"(^|\.)[qkv]_scale$", "vLLM, compressed-tensors, ModelOpt", partner=(r"\b[qkv](?=_(proj|scale))", "v")
    ),
    _rule("kv", r"(^|\.)(kv|prob)_scale$", "AutoFP8, vLLM"),
    _rule("kv", r"(^|\.)[qkv]_proj\.output_scale$", "Quark, compressed-tensors"),
    _rule("kv", r"(^|\.)prob_output_scale$", "Quark"),
    _rule("kv", r"(^|\.)[qkv]_cache\.scale$", "Hunyuan, AngelSlim"),
    _rule("kv", r"^(?P<module>(.+\.)?q)\.scale$", "Hunyuan", partner=(r"\bq\.scale$", "k_cache.scale")),
    _rule("kv", r"(^|\.)[kv]_cache_scale$", "Gemma quantizer of transformers"),
    _rule("kv", r"(^|\.)\w+_fake_quantizer\.qscale_act$", "Mistral (params.json)"),
    _rule("kv", r"(^|\.)kv_cache_scaling_factor$", "TensorRT-LLM"),
    _rule("kv", r"(^|\.)kv_cache_rcp_scaling_factor$", "TensorRT-LLM", reciprocal=True),
    _rule("kv", r"(^|\.)[kv]_cache\.quant_(in|out)put\.scale_inv$", "Intel Neural Compressor", reciprocal=True),
    _rule("input", r"(^|\.)quant_input\.scale_inv$", "Intel Neural Compressor", reciprocal=True),
    _rule("input", r"^(?P<module>.+)[._](input|activation)_scale$", "compressed-tensors, ModelOpt, transformers"),
    _rule("input", r"^(?P<module>.+)\.act_scale$", "auto-round"),
    _rule("input", r"^(?P<module>.+)\.qscale_act$", "Mistral (params.json)"),
    _rule("input", r"^(?P<module>.+)\.scale_input$", "ComfyUI"),
    _rule("input", r"^(?P<module>.+)\.activation_scaling_factor$", "TensorRT-LLM"),
    _rule("input", r"^(?P<module>.+)\.activation_rcp_scaling_factor$", "TensorRT-LLM", reciprocal=True),
)

_ENDINGS = ("scale", "scale_input", "qscale_act", "scale_inv", "scaling_factor")
_WEIGHTS = ("weight_scale", "weight_scale_inv")  # the most frequent names, and never one of these scales


def activation_rule(name: str) -> tuple[ActivationRule, str | None] | None:
    """The rule that ``name`` falls under and the module it names, or None: not an activation or KV scale."""
    if not name.endswith(_ENDINGS) or name.endswith(_WEIGHTS):
        return None
    for rule in ACTIVATION_RULES:
        found = rule.pattern.search(name)
        if found:
            return rule, found.groupdict().get("module")
    return None


def partner_of(rule: ActivationRule, name: str) -> str | None:
    """The tensor that must be there too for a scale of several values to count; None: no condition."""
    return re.sub(*rule.partner, name) if rule.partner else None
