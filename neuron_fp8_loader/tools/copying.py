"""What a copy on disk must be so that a stack takes it by itself: names, shapes, and what config.json declares.

The copy for NxD Inference has one scale a tensor or a row beside each weight, ``X.weight`` and ``X.weight_scale``,
which NxD renames to ``X.scale`` (``models/application_base.py``) and compressed-tensors calls ``float-quantized``. The
copy for the vLLM Neuron plugin is bfloat16 and declares nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.regular import LONGEST_CONFIG, read_json
from ..conventions import module_of
from ..errors import PlanError
from ..plan import Recipe, Step
from .expert_types import has_experts
from .stacks import NXD, Aim

_DECLARED = ("quantization_config", "compression_config")
_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
OTHER_DECLARATIONS = ("hf_quant_config.json", "quanto_qmap.json")
"""Files that declare how the original is quantized; a copy in another form goes without."""


@dataclass(frozen=True)
class Form:
    """The form of a copy.

    Attributes:
        recipe: what is written, and under which names.
        changed: is it another form than the original's? Otherwise configs are carried over as they are.
        declared: for config.json's ``quantization_config``; None: nothing is left that is quantized.
        free: does the stack take the copy without this package?
    """

    recipe: Recipe
    changed: bool = False
    declared: Mapping[str, Any] | None = field(default=None)
    free: bool = False


def form_for(aim: Aim) -> Form:
    """The form of a copy of a checkpoint.

    Raises:
        PlanError: a tensor would get a name that another one has.
    """
    recipe = aim.recipe
    if not any(step.action != "dequantize" for step in recipe.weights):
        dropped = {name for name, step in recipe.steps.items() if step.role == "activation scale"}
        steps = {n: s._replace(action="drop") if n in dropped else s for n, s in recipe.steps.items()}
        return Form(_renamed(replace(recipe, steps=steps)), changed=True, free=True)
    if aim.stack != NXD or recipe.what.layout == "keep":
        return Form(recipe)
    free = not has_experts(recipe.plan)  # NxD's conversions leave the scales of experts behind
    return Form(_renamed(recipe), True, _declared(recipe), free)


def _renamed(recipe: Recipe) -> Recipe:
    names, plan = _names(recipe), recipe.plan
    taken = [f"{new}: {old} would get this name" for old, new in names.items() if new in plan.tensors]
    if taken or len(set(names.values())) < len(names):
        raise PlanError(plan.source, taken or ["two tensors would get one name"])
    return replace(recipe, steps={n: s._replace(out=names.get(n, n)) for n, s in recipe.steps.items()})


def _names(recipe: Recipe) -> dict[str, str]:
    """Old name -> new name, of matrices alone: stacks of experts are known by the names that they have."""
    names = {}
    for step in recipe.scaled_weights:
        assert step.pair is not None
        if len(step.shape) == 2:
            names[step.name] = f"{step.pair.module}.weight"
            names[step.pair.scale] = f"{step.pair.module}.weight_scale"
    return {old: new for old, new in names.items() if old != new}


def _declared(recipe: Recipe) -> dict[str, Any]:
    """As compressed-tensors declares weights with one scale a row or a tensor, and experts that keep their blocks."""
    plain = [module_of(step.name) for step in recipe.weights if step.action == "dequantize"]
    kept = {
        step.pair.granularity.block: None
        for step in recipe.scaled_weights
        if step.action == "translate" and step.pair is not None and step.pair.granularity.block
    }
    groups = [_group("Linear", strategy="tensor" if recipe.what.layout == "per_tensor" else "channel")]
    groups += [_group(r"re:.*\.experts\..*", strategy="block", block_structure=list(block)) for block in kept]
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": [*recipe.plan.unquantized, *plain],
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
    }


def _group(target: str, **scales: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **scales}
    return {"targets": [target], "weights": weights, "input_activations": None, "output_activations": None}


def config_after(source: Path, form: Form) -> bytes:
    """config.json of the copy: as it was, but for what it declares of the quantization."""
    config = read_json(source, LONGEST_CONFIG)
    for holder in (config, *(config[part] for part in _PARTS if isinstance(config.get(part), dict))):
        for key in _DECLARED:
            holder.pop(key, None)
    if form.declared is not None:
        config["quantization_config"] = form.declared
    return (json.dumps(config, indent=2) + "\n").encode()


def metadata_after(metadata: Mapping[str, str], form: Form) -> dict[str, str]:
    """What of a shard's metadata still holds of the copy: that of torchao and ComfyUI speaks of what was."""
    return {k: text for k, text in metadata.items() if not form.changed or k == "format"}


def written(steps: Mapping[str, Step]) -> dict[str, str]:
    """Name in the original -> name in the copy, of all that is in the copy."""
    return {name: step.out for name, step in steps.items() if step.action != "drop"}
