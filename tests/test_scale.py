"""Checkpoints of the largest models, as headers alone: twice as many tensors take about twice as long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from neuron_fp8_loader.checkpoint import TensorInfo
from neuron_fp8_loader.integrations.flag import dequantized
from neuron_fp8_loader.integrations.keys import nxd_names, renamed
from neuron_fp8_loader.integrations.modules import Modules, not_quantized, patterns
from neuron_fp8_loader.integrations.names import contradictions, modules_to_not_convert
from neuron_fp8_loader.options import Options
from neuron_fp8_loader.plan import Plan, converted, make_plan, make_recipe
from neuron_fp8_loader.plan.recipe import ALL

# of DeepSeek-V3: hidden size, and the experts of a layer
HIDDEN, EXPERTS = 7168, 256
PROJECTIONS = {"gate_proj": (2048, HIDDEN), "up_proj": (2048, HIDDEN), "down_proj": (HIDDEN, 2048)}


def modules(pairs: int) -> Iterator[tuple[str, tuple[int, int]]]:
    number = 0
    while True:
        layer, expert = divmod(number // len(PROJECTIONS), EXPERTS)
        part = list(PROJECTIONS)[number % len(PROJECTIONS)]
        yield f"model.layers.{layer}.mlp.experts.{expert}.{part}", PROJECTIONS[part]
        number += 1
        if number == pairs:
            return


def headers(pairs: int) -> dict[str, TensorInfo]:
    """Block-scaled weights, grids as large as they are for 128 x 128."""
    tensors = {}
    for module, shape in modules(pairs):
        grid = tuple(-(-n // 128) for n in shape)
        weight, scale = f"{module}.weight", f"{module}.weight_scale_inv"
        tensors[weight] = TensorInfo(weight, "float8_e4m3fn", shape, shape[0] * shape[1])
        tensors[scale] = TensorInfo(scale, "float32", grid, grid[0] * grid[1] * 4)
    name = "model.embed_tokens.weight"
    return tensors | {name: TensorInfo(name, "bfloat16", (129280, HIDDEN), 129280 * HIDDEN * 2)}


@cache
def plan(pairs: int) -> Plan:
    return make_plan(headers(pairs), "model")


def seconds(work: Callable[[], object]) -> float:
    """CPU time, of the quickest of three runs: other programs on the machine do not count."""

    def once() -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    return min(once() for _ in range(3))


def by_layout(plan: Plan) -> None:
    recipe = make_recipe(plan, Options(layout="per_channel"))
    assert sum(step.action == "requantize" for step in recipe.steps.values()) == 2 * len(plan.pairs)


def by_dequantizing(plan: Plan) -> None:
    options = Options(dequantize=("*.experts.1.*", "*.experts.2.*"), layout="per_channel")
    recipe = make_recipe(plan, options)
    assert len(dequantized(plan, {"dequantize": options.dequantize})) == sum(
        step.action == "dequantize" for step in recipe.weights
    )


def by_parts(plan: Plan) -> None:
    recipe, names = make_recipe(plan, Options()), list(plan.tensors)
    assert len(converted(recipe, ALL)) == len(plan.pairs)
    size = len(names) // 10
    parts = [recipe.within(names[i : i + size]) for i in range(0, len(names), size)]
    assert not any(recipe.torn(part.steps) for part in parts)


def by_names(plan: Plan) -> None:
    state_dict = dict.fromkeys(plan.tensors)
    assert len(renamed(state_dict, nxd_names(plan), "model")) == len(state_dict)
    assert modules_to_not_convert(plan) == ["lm_head"]
    assert contradictions(plan, ["lm_head"]) == ([], [])


def by_modules(plan: Plan) -> None:
    built = Modules({f"layers.{name.split('.', 2)[2]}": True for name in (pair.module for pair in plan.pairs)})
    assert not_quantized(plan, (), built) == []
    assert len(patterns(plan, [pair.module for pair in plan.pairs if ".experts.7." in pair.module])) > 0


@pytest.mark.parametrize("work", [by_layout, by_dequantizing, by_parts, by_names, by_modules])
def test_twice_as_many_pairs_take_twice_as_long(work: Callable[[Plan], None]) -> None:
    one, two = plan(10_000), plan(20_000)
    assert seconds(lambda: work(two)) < 2.5 * seconds(lambda: work(one)) + 0.02


def test_planning_twice_as_many_pairs_takes_twice_as_long() -> None:
    one, two = headers(10_000), headers(20_000)
    assert len(make_plan(one, "model").pairs) == 10_000
    # all pairs with all would be 4
    assert seconds(lambda: make_plan(two, "model")) < 3 * seconds(lambda: make_plan(one, "model"))
