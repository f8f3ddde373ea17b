"""experts="fused": every expert and row, as the device reads it, against the checkpoint as a GPU reads it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from experts import NAMES, Kind, apart, per_expert, read_fused, scales, values_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open as raw_open
from support import ROOT, frozen, random_codes, same_bytes, save, save_shards, shared, sqnr, unchanged

from neuron_fp8_loader import (
    CheckpointError,
    OptionError,
    WeightError,
    kernel,
    load_checkpoint,
    load_file,
    load_state_dict,
    rescale_state_dict,
    safe_open,
)
from neuron_fp8_loader.tools.export import prepare_export
from neuron_fp8_loader.tools.verify import verify_checkpoint

BLOCK = "model.layers.0.mlp"
GATE_UP, DOWN = (f"{BLOCK}.expert_mlps.mlp_op.{part}" for part in ("gate_up_proj", "down_proj"))

KINDS = {
    "per channel": Kind(),
    "per channel, bfloat16": Kind(dtype=torch.bfloat16),
    "per channel, flat (ModelOpt)": Kind(covers="flat"),
    "Mixtral": Kind(names="w"),
    "per tensor": Kind(covers="tensor"),
    "per tensor, w": Kind(covers="one", names="w", dtype=torch.bfloat16),
    "DeepSeek": Kind(scale=".weight_scale_inv", covers="block"),
    "MiniMax": Kind(scale=".weight_scale_inv", covers="block", names="w"),
    "e8m0 blocks": Kind(scale=".scale", covers="block", dtype=torch.uint8, names="w"),
    "Quark": Kind(scale=".weight_scale", covers="row"),
    "torchao": Kind(weight="._weight_qdata", scale="._weight_scale"),
    "quanto": Kind(weight=".weight._data", scale=".weight._scale"),
    "Mistral": Kind(scale=".qscale_weight", covers="tensor", names="w"),
    "ComfyUI": Kind(scale=".scale_weight", covers="one"),
    "TensorRT-LLM": Kind(scale=".weights_scaling_factor"),
}


def assert_right(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], kind: Kind, least: float) -> None:
    """Each expert's projection, of which each row, is what the checkpoint has, to ``least`` dB."""
    found = apart(after)
    for expert, projections in enumerate(found):
        for name, got in zip(NAMES[kind.names], projections, strict=True):
            want = values_of(before, kind, f"{BLOCK}.experts.{expert}.{name}")
            assert np.isfinite(got).all()
            assert got.shape == want.shape
            assert sqnr(want, got) > least, (expert, name)
            noise, signal = np.square(got - want).sum(1), np.square(want).sum(1)
            assert (noise <= signal * 10 ** (-(least - 6) / 10)).all(), (expert, name)


@pytest.mark.parametrize("layout", ["keep", "per_channel"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_expert_and_row(tmp_path, kind, layout):
    sd = per_expert(kind, 11, 128, 256)  # more than ten: "10" comes before "2" in files
    sd |= {f"{BLOCK}.gate.weight": torch.ones(11, 256), f"{BLOCK}.shared_expert.up_proj.weight": torch.ones(8, 256)}
    file = save(tmp_path / "model.safetensors", sd)
    out = load_state_dict(file, experts="fused", layout=layout)
    blocks = kind.covers == "block"
    assert set(out) - set(sd) == {f"{name}.{end}" for name in (GATE_UP, DOWN) for end in ("weight", "scale")}
    assert set(sd) & set(out) == {n for n in sd if ".experts." not in n}
    assert out[f"{GATE_UP}.weight"].shape == (11, 256, 256)
    assert out[f"{DOWN}.weight"].shape == (11, 128, 256)
    assert out[f"{GATE_UP}.scale"].shape == ((11, 2, 2) if blocks and layout == "keep" else (11, 1, 256))
    assert out[f"{DOWN}.scale"].shape == ((11, 1, 2) if blocks and layout == "keep" else (11, 1, 256))
    assert_right(sd, out, kind, 25 if blocks and layout == "per_channel" else 100)
    in_memory = rescale_state_dict(sd, experts="fused", layout=layout)
    assert set(in_memory) == set(out)
    assert all(same_bytes(out[name], in_memory[name]) for name in out)


@pytest.mark.parametrize("kind", [KINDS["per channel"], KINDS["DeepSeek"]], ids=["row", "block"])
def test_a_swap_is_seen(kind):
    """What the other tests hang on: one expert, one scale, or gate and up in each other's place do not pass."""
    sd = per_expert(kind, 4, 128, 256)
    right = rescale_state_dict(sd, experts="fused", layout="per_channel")
    assert_right(sd, right, kind, 25)
    for end in ("weight", "scale"):
        for swap in ([1, 0, 2, 3], [0, 1, 3, 2]):
            wrong = {**right, f"{DOWN}.{end}": torch.stack([right[f"{DOWN}.{end}"][i] for i in swap])}
            with pytest.raises(AssertionError):
                assert_right(sd, wrong, kind, 25)
        rolled = right[f"{GATE_UP}.{end}"].view(torch.uint8 if end == "weight" else torch.float32).roll(128, 2)
        with pytest.raises(AssertionError):
            assert_right(sd, {**right, f"{GATE_UP}.{end}": rolled.view(right[f"{GATE_UP}.{end}"].dtype)}, kind, 25)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_bytes_of_each_expert_alone(kind):
    """Some experts fit as they are and keep their bytes; some do not. Each is what it would be by itself."""
    sd = per_expert(kind, 3, 128, 256) | {
        n.replace("experts.0", "experts.3").replace("experts.1", "experts.4"): t
        for n, t in per_expert(kind, 2, 128, 256, seed=1, top=0x77).items()
    }
    fused = rescale_state_dict(sd, experts="fused", layout="per_channel")
    alone = rescale_state_dict(sd, layout="per_channel")
    for expert in range(5):
        for part, name in enumerate(NAMES[kind.names]):
            module = f"{BLOCK}.experts.{expert}.{name}"
            whole, columns = (DOWN, slice(None)) if part == 2 else (GATE_UP, slice(128 * part, 128 * (part + 1)))
            got = fused[f"{whole}.weight"].view(torch.uint8)[expert, :, columns].t()
            assert torch.equal(got, alone[module + kind.weight].view(torch.uint8))
            assert torch.equal(
                fused[f"{whole}.scale"][expert, 0, columns], alone[module + kind.scale].float().view(-1)
            )


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 130), st.integers(1, 130), st.sampled_from(["row", "flat", "tensor"]),
    st.booleans(), st.sampled_from(["half", "ratio"]),
)  # fmt: skip
def test_any_shape(experts, inner, hidden, covers, inplace, method):
    kind = Kind(covers=covers)
    sd = per_expert(kind, experts, inner, hidden)
    before = frozen(sd)
    out = rescale_state_dict(sd, experts="fused", inplace=inplace, method=method)
    assert (out is sd) == inplace
    assert len(out) == 4
    for expert, projections in enumerate(apart(out)):
        for name, got in zip(NAMES["proj"], projections, strict=True):
            module = f"{BLOCK}.experts.{expert}.{name}"
            want = values_of(before, kind, module)
            step = float(before[module + kind.scale].max()) * 2**-9  # of the smallest codes
            relative = 0 if method == "half" else 2**-4
            assert (np.abs(got - want) <= relative * np.abs(want) + 1.001 * step).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["keep", "per_channel"]))
def test_any_grid_of_blocks(experts, inner, hidden, layout):
    kind = Kind(scale=".weight_scale_inv", covers="block")
    sd = per_expert(kind, experts, 128 * inner, 128 * hidden)
    assert_right(sd, rescale_state_dict(sd, experts="fused", layout=layout), kind, 100 if layout == "keep" else 20)


def test_weights_of_many_stripes(tmp_path):
    """More than one piece each, cut at blocks, and a code that does not fit in the last piece only."""
    for kind in (Kind(), Kind(scale=".weight_scale_inv", covers="block")):
        sd = per_expert(kind, 1, 640, 2048, top=0x77)
        for name in sd:
            if name.endswith(".weight"):
                sd[name].view(torch.uint8)[-1, -1] = 0x7E
        file = save(tmp_path / "model.safetensors", sd)
        for threads in (1, 3):
            out = load_state_dict(file, experts="fused", threads=threads)
            assert_right(sd, out, kind, 100)
        assert_right(sd, load_state_dict(file, experts="fused", layout="per_channel"), kind, 20)


def test_ragged_blocks_become_rows():
    kind = Kind(scale=".weight_scale_inv", covers="block")
    sd = per_expert(kind, 3, 96, 200)
    assert_right(sd, rescale_state_dict(sd, experts="fused", layout="per_channel"), kind, 20)


# -- stacked on disk ------------------------------------------------------------------------------------------------


def stacked(ends: str, covers: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> dict[str, torch.Tensor]:
    out = {}
    for seed, (part, shape) in enumerate(zip(("gate_up_proj", "down_proj"), shapes, strict=True)):
        experts, rows, columns = shape
        name = f"{BLOCK}.experts.{part}"
        scale = {
            "tensor": (),
            "expert": (experts,),
            "row": (experts, rows, 1),
            "column": (experts, 1, columns),
            "stored transposed": (experts, columns, 1),
            "block": (experts, rows // 128, columns // 128),
        }[covers]
        out[name] = random_codes(shape, seed)
        out[name + ends] = scales(scale, torch.float32, np.random.default_rng(seed))
    return out


OUT_IN = ((5, 512, 384), (5, 384, 256))
IN_OUT = ((5, 384, 512), (5, 256, 384))
STACKED = [
    *[("_scale_inv", covers, OUT_IN) for covers in ("tensor", "row", "block")],
    *[("_weight_scale", covers, IN_OUT) for covers in ("tensor", "expert", "column", "block")],
    *[("_scale", covers, IN_OUT) for covers in ("column", "stored transposed")],
    ("_scale_inv", "column", IN_OUT),  # the shapes say how they lie, whatever the scales are called
    ("_weight_scale", "row", OUT_IN),
]


@pytest.mark.parametrize("layout", ["keep", "per_channel"])
@pytest.mark.parametrize(("ends", "covers", "shapes"), STACKED)
def test_stacks(tmp_path, ends, covers, shapes, layout):
    sd = stacked(ends, covers, shapes)
    out = load_state_dict(save(tmp_path / "model.safetensors", sd), experts="fused", layout=layout)
    assert all(same_bytes(t, out[n]) for n, t in rescale_state_dict(sd, experts="fused", layout=layout).items())
    given = frozen(sd)
    assert rescale_state_dict(given, experts="fused", layout=layout, inplace=True) is given
    assert set(given) == set(out)
    assert all(same_bytes(t, out[n]) for n, t in given.items())
    assert len(out) == 4
    for part, name in (("gate_up_proj", GATE_UP), ("down_proj", DOWN)):
        weight, scale = sd[f"{BLOCK}.experts.{part}"], sd[f"{BLOCK}.experts.{part}{ends}"].double().numpy()
        if covers == "block":
            scale = scale.repeat(128, 1).repeat(128, 2)
        elif covers == "expert":
            scale = scale[:, None, None]
        elif covers == "stored transposed":
            scale = scale.transpose(0, 2, 1)
        want = weight.double().numpy() * scale
        want = want.transpose(0, 2, 1) if shapes is OUT_IN else want
        got = read_fused(out, name)
        assert got.shape == want.shape
        for expert in range(5):
            least = 20 if covers == "block" and layout == "per_channel" else 100
            assert sqnr(want[expert], got[expert]) > least
            assert min(map(sqnr, want[expert].T, got[expert].T)) > 0.9 * least  # of any output


@pytest.mark.parametrize("options", [{"experts": "fused"}, {}])
def test_blocks_become_the_same_rows_whichever_way_they_lie(tmp_path, options):
    """Llama 4's [experts, in, out] to the very bytes that [experts, out, in] gives; with blocks cut short, too."""
    sd = stacked("_weight_scale", "block", ((3, 384, 512), (3, 256, 384)))
    ragged = random_codes((3, 200, 136), 9), scales((3, 2, 2), torch.float32, np.random.default_rng(9))
    other = {}
    if not options:
        sd[f"{BLOCK}.experts.odd"], sd[f"{BLOCK}.experts.odd_weight_scale"] = ragged
    for name, t in sd.items():
        lying = t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t
        other[name.replace("_weight_scale", "_scale_inv")] = lying.transpose(1, 2).contiguous().view(t.dtype)
    file = save(tmp_path / "model.safetensors", sd)
    out = load_state_dict(file, layout="per_channel", **options)
    turned = rescale_state_dict(other, layout="per_channel", **options)
    assert len(out) == len(sd)
    for name, t in out.items():
        there = turned[name.replace("_weight_scale", "_scale_inv")]
        there = there if options else there.view(torch.uint8 if t.element_size() == 1 else t.dtype).transpose(1, 2)
        assert same_bytes(t, there.contiguous().view(t.dtype))
    with pytest.raises(OptionError, match="only as a whole"):
        load_state_dict(file, layout="per_channel", slices={f"{BLOCK}.experts.down_proj": (0, 0, 1)})


# -- real checkpoints -----------------------------------------------------------------------------------------------


def test_a_real_per_channel_checkpoint():
    path = shared("ct_fp8_dynamic_moe")
    out = load_state_dict(path, experts="fused", layout="per_channel")
    with raw_open(str(path / "model.safetensors"), framework="pt") as file:
        sd = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    blocks = sorted({name.partition(".experts.")[0] for name in sd if ".experts." in name})
    assert blocks
    for block in blocks:
        for expert, projections in enumerate(apart(out, block)):
            for name, got in zip(NAMES["proj"], projections, strict=True):
                want = values_of(sd, Kind(), f"{block}.experts.{expert}.{name}")
                assert sqnr(want, got) > 100
    assert not [name for name in out if ".experts." in name]
    alone = load_state_dict(path, layout="per_channel")
    assert all(same_bytes(tensor, out[name]) for name, tensor in alone.items() if ".experts." not in name)


@pytest.mark.parametrize("checkpoint", ["hf_fp8_block_moe_fused", "derived_llama4_modelopt"])
def test_real_stacks(checkpoint):
    path = shared(checkpoint)
    out = load_state_dict(path, experts="fused")
    with raw_open(str(path / "model.safetensors"), framework="pt") as file:
        sd = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stacks = [name for name in sd if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert stacks
    for name in stacks:
        block, _, part = name.rpartition(".experts.")
        out_in = name + "_scale_inv" in sd
        scale = sd[name + ("_scale_inv" if out_in else "_weight_scale")].double().numpy()
        want = sd[name].double().numpy() * (scale.repeat(128, 1).repeat(128, 2) if out_in else scale)
        want = want.transpose(0, 2, 1) if out_in else want
        assert sqnr(want, read_fused(out, f"{block}.expert_mlps.mlp_op.{part}")) > 100


# -- what else is promised ------------------------------------------------------------------------------------------


def test_unquantized_experts_are_stacked_too():
    sd = {}
    for expert in range(3):
        for part, name in enumerate(NAMES["proj"]):
            shape = (130, 70) if part == 2 else (70, 130)
            sd[f"{BLOCK}.experts.{expert}.{name}.weight"] = torch.randn(shape).bfloat16()
    sd |= per_expert(Kind(), 3, 64, 64, block="model.layers.1.mlp")
    out = rescale_state_dict(sd, experts="fused")
    assert f"{GATE_UP}.scale" not in out
    for expert in range(3):
        gate, up, down = (sd[f"{BLOCK}.experts.{expert}.{name}.weight"] for name in NAMES["proj"])
        assert torch.equal(out[f"{GATE_UP}.weight"][expert], torch.cat([gate, up]).t())
        assert torch.equal(out[f"{DOWN}.weight"][expert], down.t())


def test_groups_of_mx():
    sd = per_expert(Kind(), 3, 64, 96)
    for name in [n for n in sd if n.endswith("_scale")]:
        rows, columns = sd[name.removesuffix("_scale")].shape
        sd[name] = scales((rows, columns // 32), torch.uint8, np.random.default_rng(rows))
    for layout, shape in (("keep", (3, 3, 128)), ("per_channel", (3, 1, 128))):
        out = rescale_state_dict(sd, experts="fused", layout=layout)
        assert out[f"{GATE_UP}.scale"].shape == shape
        for expert, projections in enumerate(apart(out)):
            for name, got in zip(NAMES["proj"], projections, strict=True):
                module = f"{BLOCK}.experts.{expert}.{name}"
                exponents = sd[f"{module}.weight_scale"].numpy().astype(np.float64) - 127
                want = sd[f"{module}.weight"].double().numpy() * np.exp2(exponents).repeat(32, 1)
                assert sqnr(want, got) > 80


def test_what_lies_beside_experts_is_treated_as_ever():
    """Static scales keep their names, other modules their layout, and dequantize reaches them."""
    sd = per_expert(Kind(covers="tensor"), 2, 64, 96)
    sd |= {
        name.replace(".weight_scale", ".input_scale"): t.clone() for name, t in sd.items() if name.endswith("_scale")
    }
    for name in ("self_attn.o_proj", "self_attn.q_proj"):
        sd[f"model.layers.0.{name}.weight"] = random_codes((64, 64))
        sd[f"model.layers.0.{name}.weight_scale"] = torch.tensor(0.5)
    options = {"layout": "per_channel", "dequantize": ["*.o_proj"]}
    out, alone = (rescale_state_dict(sd, experts=experts, **options) for experts in ("fused", "keep"))
    assert_right(sd, out, Kind(covers="tensor"), 100)
    others = [name for name in alone if ".experts." not in name or name.endswith("input_scale")]
    assert len(others) == 6 + 3
    assert set(others) == {name for name in out if "mlp_op" not in name}
    assert all(same_bytes(out[name], alone[name]) for name in others)


def test_counts_are_those_of_the_experts_alone(tmp_path):
    for kind in (Kind(), Kind(scale=".weight_scale_inv", covers="block")):
        file = save(tmp_path / "model.safetensors", per_expert(kind, 5, 128, 256))
        for layout in ("keep", "per_channel"):
            fused, alone = (load_checkpoint(file, layout=layout, experts=e).report for e in ("fused", "keep"))
            assert fused.weights == alone.weights
            assert (fused.tensors, fused.nbytes, fused.rounded) == (alone.tensors, alone.nbytes, alone.rounded)
            assert fused.requantized == pytest.approx(alone.requantized)
            assert list(fused.requantized) == list(alone.requantized) or set(fused.requantized) == set(
                alone.requantized
            )


def test_input_is_not_written_to():
    sd = per_expert(Kind(), 3, 64, 96)
    before = frozen(sd)
    rescale_state_dict(sd, experts="fused")
    unchanged(sd, before)
    sd["m.weight"], sd["m.weight_scale"] = random_codes((8, 8)), torch.ones(7, 7, 7)
    before = frozen(sd)
    with pytest.raises(Exception, match=r"m\.weight"):
        rescale_state_dict(sd, experts="fused", layout="per_channel", inplace=True)
    unchanged(sd, before)


def test_experts_that_are_views_of_one_tensor():
    """As a port may have cut them out of a stack: nothing is written into the memory that they share."""
    kind, gate = Kind(), random_codes((4, 96, 64), 3)
    sd = per_expert(kind, 4, 64, 96)
    for expert in range(4):
        sd[f"{BLOCK}.experts.{expert}.gate_proj.weight"] = gate[expert].t()
    before = frozen(sd)
    out = rescale_state_dict(dict(sd), experts="fused", inplace=True)
    unchanged(sd, before)
    assert_right(before, out, kind, 100)


def test_nan_is_refused_and_can_pass():
    sd = per_expert(Kind(), 2, 64, 64)
    sd[f"{BLOCK}.experts.1.up_proj.weight"].view(torch.uint8)[3, 5] = 0xFF
    with pytest.raises(WeightError, match=r"experts\.1\.up_proj\.weight: 1 NaN"):
        rescale_state_dict(sd, experts="fused")
    out = rescale_state_dict(sd, experts="fused", nan="keep")
    assert out[f"{GATE_UP}.weight"].view(torch.uint8)[1, 5, 64 + 3] == 0xFF


def test_a_shard_with_a_part_of_a_block_is_refused(tmp_path):
    whole = per_expert(Kind(), 2, 64, 64)
    other = per_expert(Kind(), 2, 64, 64, block="model.layers.1.mlp")
    apart = {n: t for n, t in whole.items() if "experts.1" in n}
    _, second = save_shards(tmp_path, {n: t for n, t in whole.items() if n not in apart}, apart | other)
    with pytest.raises(CheckpointError, match=r"all experts of a block; load the directory.*\n.*mlp_op"):
        load_file(second, experts="fused")
    assert len(load_state_dict(tmp_path, experts="fused")) == 8
    _, second = save_shards(tmp_path, whole, other)
    assert len(load_file(second, experts="fused")) == 4


def test_bin_files(tmp_path):
    sd = per_expert(Kind(), 3, 64, 96)
    torch.save(sd, tmp_path / "pytorch_model.bin")
    assert_right(sd, load_state_dict(tmp_path, experts="fused"), Kind(), 100)


@pytest.mark.parametrize("layout", ["keep", "per_channel"])
def test_a_copy_on_disk_is_taken_as_it_is(tmp_path, layout):
    sd = per_expert(KINDS["DeepSeek"], 3, 128, 256)
    out = load_state_dict(save(tmp_path / "model.safetensors", sd), experts="fused", layout=layout)
    again = load_state_dict(save(tmp_path / "copy.safetensors", out))
    assert set(again) == set(out)
    assert all(same_bytes(tensor, again[name]) for name, tensor in out.items())


def test_who_does_not_stack_says_so(tmp_path):
    file = save(tmp_path / "model.safetensors", per_expert(Kind(), 2, 64, 64))
    for refused in (
        lambda: safe_open(file, experts="fused"),
        lambda: prepare_export(file, tmp_path / "out", experts="fused"),
        lambda: verify_checkpoint(file, experts="fused"),
    ):
        with pytest.raises(OptionError, match="does not stack experts; load_state_dict"):
            refused()
    with pytest.raises(OptionError, match='layout="per_channel"'):
        load_state_dict(file, experts="fused", layout="per_tensor")
    with pytest.raises(OptionError, match="'keep' or 'fused'"):
        load_state_dict(file, experts="stacked")


PEAK = """
import json, sys, neuron_fp8_loader as n
n.load_state_dict(sys.argv[1], threads=2, **json.loads(sys.argv[2]))  # imports, thread pools
def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
before = status("VmRSS")
out = n.load_state_dict(sys.argv[3], threads=2, experts="fused", **json.loads(sys.argv[2]))
print(status("VmHWM") - before, sum(t.nbytes for t in out.values()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
@pytest.mark.skipif(kernel.active == "torch", reason="torch's temporaries are larger than a stripe")
@pytest.mark.parametrize("layout", ["keep", "per_channel"])
def test_memory_is_the_result_and_a_stripe_a_thread(tmp_path, layout):
    kind = Kind(scale=".weight_scale_inv", covers="block")
    small = save(tmp_path / "small.safetensors", per_expert(kind, 1, 128, 128))
    large = save(tmp_path / "large.safetensors", per_expert(kind, 12, 768, 1024))
    command = [sys.executable, "-c", PEAK, str(small), json.dumps({"layout": layout}), str(large)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    grown, result = map(int, text.split())
    assert result > 25 << 20
    assert grown < result + (12 << 20)  # copies of the experts would be as much again
