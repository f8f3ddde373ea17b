"""NxD's fused kernel for token generation, in the models that the real NxD Inference builds: has it its scales?"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from typing import Any
from unittest.mock import patch

import pytest
import torch

from neuron_fp8_loader import OptionError
from neuron_fp8_loader.integrations import loading
from neuron_fp8_loader.integrations.modules import _parallel
from tests.integrations import contributed
from tests.integrations.contributed import application
from tests.integrations.real_moe import TYPES, checkpoint, llama4

BF16 = {"fp8_rescale": {"dequantize": ["*.experts.*"]}, **TYPES["expert_wise"]}
ON, UNSET, OFF = ({"moe_fused_nki_kernel_enabled": flag} for flag in (True, None, False))
FORMS = {"deepseek_v3": "block", "glm_moe_dsa": "block", "minimax_m2": "block", "qwen3_5_moe": "block"}


def generating(family: str, **given: Any) -> torch.nn.Module:
    """The model that generates tokens, built and quantized as for a compilation."""
    import families

    path, _ = checkpoint(family, FORMS.get(family, "channel"))
    cls = llama4() if family == "llama4" else application(family) if family in contributed.MODELS else None
    if cls is not None and family != "llama4":
        given["config_kwargs"] = json.loads((path / "config.json").read_text())
    given = {"fp8_rescale": True, "on_cpu": False, "torch_dtype": "bfloat16", "tp_degree": 2, **given}
    on_device = importlib.import_module("neuronx_distributed.utils.model_utils").init_on_device
    with contextlib.redirect_stdout(io.StringIO()), patch.dict("os.environ", NXD_CPU_MODE="0"):
        app = families.build(family, path, cls=cls, **given)
        instance = app.models[1].get_model_instance()
        with _parallel(app.neuron_config), on_device(torch.device("meta"), force_custom_init_on_device=True):
            instance.load_module()
    assert instance.neuron_config.is_prefill_stage is False
    module: torch.nn.Module = instance.module
    return module


def kernels(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "MoEFusedTKG"]


CONCERNED = [("qwen3_moe", ON), ("llama4", ON), ("glm_moe_dsa", ON), ("glm_moe_dsa", UNSET), ("minimax_m2", ON)]


@pytest.mark.parametrize(("family", "kernel"), CONCERNED)
def test_experts_as_bfloat16_are_refused_where_the_kernel_reads_their_scales(
    family: str, kernel: dict[str, Any]
) -> None:
    if not contributed.there(family):
        pytest.skip("MINIMAX_SRC is not set")
    with pytest.raises(OptionError, match=r"is not quantized and has none.*Set moe_fused_nki_kernel_enabled=False"):
        generating(family, **BF16, **kernel)
    with patch.object(loading, "check_fused_kernel"):  # somebody who went on without the refusal
        found = kernels(generating(family, **BF16, **kernel))
    assert found
    hidden = torch.empty(1, 1, found[0].hidden_size, dtype=torch.bfloat16, device="meta")
    assert found[0]._can_use_nki_kernel("moe_fused", hidden)
    with pytest.raises(AttributeError, match="scale"):
        _ = found[0].expert_mlps.mlp_op.gate_up_proj.scale
    generating(family, **BF16, **OFF)
    assert kernels(generating(family, **TYPES["expert_wise"], **kernel))


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("qwen3_moe", UNSET),  # it has no such module then
        ("llama4", UNSET),  # shared experts are not for the kernel
        ("mixtral", ON),  # of another MoE module, without it
        ("qwen3_5_moe", ON),
        ("glm_moe_dsa", {**UNSET, "batch_size": 65}),  # the kernel takes 64
    ],
)
def test_experts_as_bfloat16_where_it_does_not_run(family: str, given: dict[str, Any]) -> None:
    generating(family, **BF16, **given)


def test_blocks_are_refused_where_nothing_is_said_of_the_kernel() -> None:
    """GLM-5.2 has it all the same; ``neuron-fp8 config --experts blockwise`` switches it off."""
    with pytest.raises(OptionError, match=r"would misread .*gate_up_proj\.scale \[4, 2, 2\].*expert_wise_per_channel"):
        generating("glm_moe_dsa", **TYPES["blockwise"])
    generating("glm_moe_dsa", **TYPES["blockwise"], **OFF)
