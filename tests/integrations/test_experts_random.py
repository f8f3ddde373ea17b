"""Scales of experts under conversions drawn at random: right, or refused; and never refused where names are right."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from neuron_fp8_loader import WeightError
from neuron_fp8_loader.codes.granularity import ROW
from neuron_fp8_loader.integrations.experts import parts_of
from neuron_fp8_loader.integrations.fused_scales import Form, attach_scales
from neuron_fp8_loader.plan import Pair
from tests.support import e4m3fn

FP8 = torch.float8_e4m3fn
EXPERTS = 3
AT = "layers.0.mlp.expert_mlps.mlp_op"
Expert = dict[str, tuple[torch.Tensor, torch.Tensor]]


def made(draw: st.DrawFn) -> list[Expert]:
    """Of each expert its projections: (uint8 [out, in], float32 [out, 1]), with what makes them hard to tell apart."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    hidden, inter = draw(st.sampled_from([(8, 4), (16, 8), (64, 32)]))
    top = draw(st.sampled_from([2, 3, 0x78]))
    shapes = {"gate_proj": (inter, hidden), "up_proj": (inter, hidden), "down_proj": (hidden, inter)}
    experts: list[Expert] = []
    for _ in range(EXPERTS):
        expert: Expert = {}
        for name, (out, inner) in shapes.items():
            weight = torch.from_numpy(rng.integers(0, top, (out, inner), dtype=np.uint8))
            expert[name] = weight, torch.from_numpy(rng.choice([0.5, 3.0, 7.0], (out, 1)).astype(np.float32))
        experts.append(expert)
    for _ in range(draw(st.integers(0, 2))):  # of three, one could make two experts the same in all
        expert, name = draw(st.sampled_from(experts)), draw(st.sampled_from(sorted(shapes)))
        weight = expert[name][0]
        what = draw(st.sampled_from(["zeros", "rows of zeros", "another's", "gate is up"]))
        if what == "another's":
            weight[:] = draw(st.sampled_from(experts))[name][0]
        elif what == "gate is up":
            expert["up_proj"][0][:] = expert["gate_proj"][0]
        else:
            weight[: len(weight) // 2 if what == "rows of zeros" else None] = 0
    return experts


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_right_or_refused(data: st.DataObject) -> None:
    experts = made(data.draw)
    order = data.draw(st.permutations(range(EXPERTS)))
    sides = data.draw(st.permutations(["gate_proj", "up_proj"]))
    more = data.draw(st.sampled_from([0, 4]))
    state, pairs = {}, {}
    for n, expert in enumerate(experts):
        for name, (weight, scale) in expert.items():
            module = f"layers.0.mlp.experts.{n}.{name}"
            state |= {f"{module}.weight": weight.view(FP8), f"{module}.scale": scale}
            pairs[module] = Pair(f"{module}.weight", f"{module}.scale", "", ROW, module)
    parts = parts_of(state, pairs)
    wanted, converted = {}, {}
    for stack, names, wide in (("gate_up_proj", sides, (0, 0, 0, more)), ("down_proj", ["down_proj"], (0, more))):
        codes = [torch.cat([pad(experts[e][name][0], wide) for name in names]) for e in order]
        scales = [torch.cat([pad(experts[e][name][1], (0, 0, *wide[2:])) for name in names]) for e in order]
        converted[f"{AT}.{stack}.weight"] = torch.stack(codes).transpose(1, 2).contiguous().view(FP8)
        wanted[stack] = e4m3fn(torch.stack(codes)) * torch.stack(scales).double().numpy()
    try:
        attach_scales(converted, parts, Form("expert_wise_per_channel_symmetric"), "ckpt", 1)
    except WeightError:
        assert order != sorted(order) or sides != ["gate_proj", "up_proj"]
        return
    for stack, want in wanted.items():
        scale = converted[f"{AT}.{stack}.scale"].double().numpy()
        got = (e4m3fn(converted[f"{AT}.{stack}.weight"]) * scale).transpose(0, 2, 1)
        np.testing.assert_array_equal(got, want, stack)
