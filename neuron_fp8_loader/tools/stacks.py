"""The load that ``neuron-fp8 config`` tells people to use: what becomes of a checkpoint for the layers of a stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import OptionError, PlanError
from ..integrations.flag import LAYOUTS
from ..integrations.modules import experts_of, one_each, patterns, with_bias
from ..integrations.names import never_quantized
from ..integrations.vllm_neuron.design import Design, design_for
from ..options import Options
from ..plan import Plan, Recipe, recipe_for
from .expert_types import DEQUANTIZE, ExpertType, expert_type, one_for_inputs
from .settings import config_in, nxd_layout

NXD, PLUGIN = "nxd", "vllm-neuron"
STACKS = {NXD: "NxD Inference", PLUGIN: "the vLLM Neuron plugin"}
"""The names that ``--for`` takes, and what they stand for."""


@dataclass(frozen=True)
class Aim:
    """A load, and what it is for.

    Attributes:
        stack: one of ``STACKS``; ``""`` for a load with the options alone.
        options: those of the load.
        recipe: what it does with each tensor. Where it would be refused, what it would do with scales as on disk.
        refusals: why it would stop, as far as headers tell.
        design: of the vLLM Neuron plugin.
        experts: of NxD Inference: what those of a mixture are loaded with; None where there are none.
    """

    stack: str
    options: Options
    recipe: Recipe
    refusals: tuple[str, ...] = ()
    design: Design | None = field(default=None, compare=False)
    experts: ExpertType | None = None

    @property
    def label(self) -> str:
        """What the load is for, in words."""
        return STACKS.get(self.stack, "your options")


def aim_for(checkpoint: Checkpoint, stack: str | None, given: Mapping[str, Any], experts_as: str | None = None) -> Aim:
    """The load of a checkpoint for a stack, as ``settings_for`` and ``plugin_settings_for`` have people ask for it.

    Args:
        checkpoint: opened.
        stack: ``"nxd"``: NxD Inference with the ``quantization_type`` of ``settings_for``; ``"vllm-neuron"``: the
            plugin without it; None: the options alone.
        given: options of one's own. A ``layout`` takes the place of the stack's; ``"keep"`` is as on disk.
        experts_as: for NxD Inference, as ``experts`` of ``settings_for``.

    Raises:
        PlanError: the checkpoint cannot be planned, or not with the options that were given.
        OptionError: an option that the stack does not take; no such stack; experts that cannot be had so.
    """
    if experts_as is not None and stack != NXD:
        raise OptionError(f"experts={experts_as!r}: is for NxD Inference; leave it out")
    given = {name: value for name, value in given.items() if name != "layout" or value is not None}
    own = Options.of(given)
    if stack is None:
        return Aim("", own, recipe_for(checkpoint, own))
    if stack not in STACKS:
        raise OptionError(f"stack={stack!r}: expected {' or '.join(map(repr, STACKS))}")
    recipe = recipe_for(checkpoint, own)
    if stack == PLUGIN:
        return _plugin(checkpoint, own, recipe, "layout" in given)
    experts = expert_type(recipe.plan, experts_as)
    options = own if "layout" in given else replace(own, layout=_layout(recipe.plan, experts))
    options = _under_the_flag(recipe.plan, experts, options)
    try:
        return Aim(stack, options, recipe_for(checkpoint, options), experts=experts)
    except PlanError as error:
        if "layout" in given:
            raise
        return Aim(stack, own, recipe, error.problems, experts=experts)


def _layout(plan: Plan, experts: ExpertType | None) -> str:
    return LAYOUTS.get(nxd_layout(plan, experts)[0], "per_channel") if plan.fp8_weights else "keep"


def _under_the_flag(plan: Plan, experts: ExpertType | None, options: Options) -> Options:
    """What the flag adds to the options of a load, as far as headers tell."""
    if options.layout == "keep":
        return options
    # NxD's quantized layers take no bias there
    floats = patterns(plan, dict.fromkeys([*with_bias(plan), *never_quantized(plan)]))
    floats += [DEQUANTIZE] if experts and experts.floats else []
    kept = experts_of(plan) if experts and experts.blocks else [*one_each(plan), *one_for_inputs(plan)]
    kept = kept if options.layout == "per_channel" else []
    return replace(options, dequantize=[*options.dequantize, *floats], keep=[*options.keep, *patterns(plan, kept)])


def _plugin(checkpoint: Checkpoint, own: Options, recipe: Recipe, with_layout: bool) -> Aim:
    plan = recipe.plan
    if with_layout:
        raise OptionError(f'layout="{own.layout}": means nothing to the vLLM Neuron plugin; leave it out')
    if own.dequantize not in ((), ("*",)):
        raise OptionError(
            f"dequantize={list(own.dequantize)}: the vLLM Neuron plugin takes all of a model as bfloat16 or nothing; "
            'expected "*"'
        )
    config = config_in(checkpoint.directory)
    design = design_for(architecture(config), plan, config.get("quantization_config"), own, None)
    if design is None:
        return Aim(PLUGIN, own, recipe)
    if design.kept:  # each rank reads slices, which cannot tell whether the whole weight fits
        options = replace(own, always=True)
        return Aim(PLUGIN, options, recipe_for(checkpoint, options), design=design)
    bare = [*plan.other_formats, *(plan.unscaled if own.unscaled == "error" else ())]
    refusals = [
        f"{name}: {'is ' + plan.tensors[name].dtype if name in plan.other_formats else 'has no scale'}, and is to be "
        "read as bfloat16"
        for name in bare
    ]
    own = replace(own, unscaled="keep") if bare and own.unscaled == "error" else own  # told already
    options = replace(own, dequantize=("*",)) if plan.pairs else own
    try:
        recipe = recipe_for(checkpoint, options)
    except PlanError as error:
        refusals += error.problems
        options = own
    return Aim(PLUGIN, options, recipe, tuple(refusals), design)


def architecture(config: Mapping[str, Any]) -> str:
    """The first of ``architectures``; "" where there is none."""
    found = config.get("architectures")
    return str(found[0]) if isinstance(found, list) and found else ""
