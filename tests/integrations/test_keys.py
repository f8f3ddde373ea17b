"""The names that NxD's layers look for."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from neuron_fp8_loader import PlanError
from neuron_fp8_loader.checkpoint import describe
from neuron_fp8_loader.integrations.keys import nxd_names, reads_scale_inv, renamed
from neuron_fp8_loader.plan import Plan, make_plan


def plan_of(weight: str, scale: str) -> Plan:
    sd = {weight: torch.zeros(4, 4).to(torch.float8_e4m3fn), scale: torch.ones(4, 1)}
    return make_plan({name: describe(name, t) for name, t in sd.items()}, "test")


@pytest.mark.parametrize(
    ("weight", "scale", "names"),
    [
        ("a.weight", "a.weight_scale", {}),  # NxD Inference renames it
        ("a.weight", "a.scale", {}),
        ("a.weight", "a.weight_scale_inv", {"a.weight_scale_inv": "a.scale"}),
        ("a.weight", "a.qscale_weight", {"a.qscale_weight": "a.scale"}),
        ("a._weight_qdata", "a._weight_scale", {"a._weight_qdata": "a.weight", "a._weight_scale": "a.scale"}),
        ("a.weight._data", "a.weight._scale", {"a.weight._data": "a.weight", "a.weight._scale": "a.scale"}),
        ("e.gate_up_proj", "e.gate_up_proj_weight_scale", {"e.gate_up_proj_weight_scale": "e.gate_up_proj.scale"}),
        ("e.gate_up_proj", "e.gate_up_proj.scale", {}),
    ],
)
def test_names(weight: str, scale: str, names: dict[str, str]) -> None:
    assert nxd_names(plan_of(weight, scale)) == names


def test_renaming_keeps_the_order_and_refuses_taken_names() -> None:
    names = {"a.weight_scale_inv": "a.scale"}
    assert list(renamed({"x": 1, "a.weight_scale_inv": 2, "y": 3}, names, "test")) == ["x", "a.scale", "y"]
    assert renamed({"x": 1}, names, "test") == {"x": 1}
    with pytest.raises(PlanError, match=r"a\.weight_scale_inv: NxD Inference looks for it under a\.scale"):
        renamed({"a.scale": 1, "a.weight_scale_inv": 2}, names, "test")


def test_classes_that_read_the_name_themselves(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "reads_it.py"  # type: ignore[operator]
    path.write_text("class Model:\n    '''Dequantizes X.weight_scale_inv.'''\n\n\nclass Plain:\n    pass\n")
    module = types.ModuleType("reads_it")
    module.__file__ = str(path)
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "reads_it", module)
    assert reads_scale_inv(module.Model)
    assert not reads_scale_inv(type("Made", (), {"__module__": "nowhere"}))
    assert not reads_scale_inv(dict)
