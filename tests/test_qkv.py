"""MiMo-V2.5's fused qkv: each row of q, k and v as the device reads it, against the heads it was made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuron_fp8_loader import (
    OptionError,
    PlanError,
    load_file,
    load_state_dict,
    plan_checkpoint,
    rescale_state_dict,
    safe_open,
)
from neuron_fp8_loader.tools.verify import verify_checkpoint
from tests.mimo import Made, checkpoint
from tests.oracle import bf16_bits, to_bf16
from tests.support import e4m3fn, ieee_e4m3, same_bytes, sqnr

L0, L1, MTP = "model.layers.0.self_attn", "model.layers.1.self_attn", "model.mtp.layers.0.self_attn"


@pytest.fixture(scope="module")
def made() -> Made:
    return checkpoint()


@pytest.fixture(scope="module")
def path(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write(tmp_path_factory.mktemp("mimo") / "ckpt")


def interleave(made: Made, prefix: str) -> np.ndarray:
    """The values of the fused weight, from those of q, k and v, two ranks."""
    parts = [np.split(made.values[f"{prefix}.{part}_proj.weight"], 2) for part in "qkv"]
    return np.concatenate([part[rank] for rank in range(2) for part in parts])


def worst(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return min(sqnr(w, g) for w, g in zip(want, got, strict=True))


def test_split_with_a_scale_a_row(made: Made, path: Path) -> None:
    out = load_state_dict(path, layout="per_channel", qkv="split")
    assert not [name for name in out if "qkv_proj" in name]
    assert len(made.values) == 9
    for name, want in made.values.items():
        scale = out[name.replace(".weight", ".weight_scale_inv")]
        assert scale.dtype == torch.float32
        assert scale.shape == (len(want), 1)
        assert worst(ieee_e4m3(out[name]) * scale.double().numpy(), want) > 25
    assert same_bytes(out[f"{L0}.o_proj.weight"], made.tensors[f"{L0}.o_proj.weight"])


def test_split_as_bfloat16_is_rounded_once(made: Made, path: Path) -> None:
    out = load_state_dict(path, qkv="split", dequantize=["*.qkv_proj"])
    for name, want in made.values.items():
        assert np.array_equal(bf16_bits(out[name]), to_bf16(want))
    assert len(out) == 9 + 3


def test_kept_whole(made: Made, path: Path) -> None:
    """Each row's own scale, also where blocks begin anew, though nothing is split."""
    rows = load_state_dict(path, layout="per_channel")
    floats = load_state_dict(path, dequantize=["*"])
    for prefix in (L0, L1, MTP):
        want, name = interleave(made, prefix), f"{prefix}.qkv_proj.weight"
        assert worst(ieee_e4m3(rows[name]) * rows[f"{name}_scale_inv"].double().numpy(), want) > 25
        assert np.array_equal(bf16_bits(floats[name]), to_bf16(want))
    plan = plan_checkpoint(path)
    assert [str(pair.granularity) for pair in plan.pairs] == [
        "block 128x128 within 544 rows",
        "block 128x128 within 704 rows",
        "block 128x128 within 704 rows",
    ]
    assert not plan.warnings


@pytest.mark.parametrize("cut", [(0, 10, 30), (0, 500, 600), (0, 0, 544), (0, 544, 1088), (0, 127, 1000), (1, 5, 150)])
@pytest.mark.parametrize("options", [{"layout": "per_channel"}, {"dequantize": ["*"]}])
def test_slices_are_parts_of_the_whole(path: Path, cut: tuple[int, int, int], options: dict[str, Any]) -> None:
    name = f"{L0}.qkv_proj.weight"
    whole = load_state_dict(path, always=True, **options)
    part = load_state_dict(path, slices={name: cut}, **options)
    dim, start, stop = cut
    assert same_bytes(part[name], whole[name].narrow(dim, start, stop - start))
    if "layout" in options:
        scale = whole[f"{name}_scale_inv"]
        wanted = scale[start:stop] if dim == 0 else scale
        assert same_bytes(part[f"{name}_scale_inv"], wanted)


def test_slices_with_their_blocks(path: Path) -> None:
    """A rank of the producer's, or a run of blocks within one; nothing else can be said in blocks."""
    name = f"{L0}.qkv_proj.weight"
    whole = load_state_dict(path, always=True)[f"{name}_scale_inv"]
    for bounds, blocks in (((544, 1088), (5, 10)), ((544 + 128, 544 + 300), (6, 8)), ((0, 1088), (0, 10))):
        part = load_state_dict(path, slices={name: (0, *bounds)})
        assert same_bytes(part[f"{name}_scale_inv"], whole[slice(*blocks)])
    for bounds in ((0, 600), (128, 1088), (544 + 96, 1088)):
        with pytest.raises(OptionError, match=r"chunks of 544|blocks of 128"):
            load_state_dict(path, slices={name: (0, *bounds)})


def test_a_copy_is_verified_row_by_row(made: Made, path: Path) -> None:
    """The tools know the blocks, too: requantized rows are as far off as rounding allows and no farther."""
    result = verify_checkpoint(path, layout="per_channel")
    assert result.ok
    assert min(w.sqnr_db for w in result.weights) > 25


def broken(change: Callable[[Made], object]) -> Made:
    made = checkpoint()
    change(made)
    return made


def rename(made: Made, **more: Any) -> None:
    made.config.update(more)


def aligned(made: Made) -> None:
    """Rows of whole blocks in every chunk: any split has these shapes."""
    made.tensors = {
        f"{L0}.qkv_proj.weight": torch.zeros(1024, 128, dtype=torch.uint8).view(torch.float8_e4m3fn),
        f"{L0}.qkv_proj.weight_scale_inv": torch.ones(8, 1),
    }
    made.config.update(head_dim=64, num_attention_heads=12, num_key_value_heads=2, v_head_dim=64)


def plain(made: Made) -> None:
    """Not interleaved, and quantized as one matrix."""
    for name in [n for n in made.tensors if n.endswith("scale_inv")]:
        rows = len(made.tensors[name.removesuffix("_scale_inv")])
        made.tensors[name] = torch.ones(-(-rows // 128), 2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: rename(m, architectures=["Phi3ForCausalLM"]), "no model whose fused qkv is known"),
        (lambda m: rename(m, attention_projection_layout="split"), "no model whose fused qkv is known"),
        (lambda m: rename(m, num_key_value_heads=4), "has 1088 rows; expected 1408"),
        (lambda m: rename(m, head_dim=64), "has 1088 rows; expected 768, 2 chunks of 256 \\+ 64 \\+ 64"),
        (lambda m: rename(m, swa_head_dim=None), "swa_head_dim in config.json is None"),
        (lambda m: rename(m, v_head_dim=-64), "v_head_dim in config.json is -64"),
        (lambda m: rename(m, num_key_value_heads=3), "num_attention_heads=8 is no multiple"),
        (lambda m: rename(m, hybrid_layer_pattern=[0]), "says nothing of the layer"),
        (lambda m: rename(m, hybrid_layer_pattern=[0, 2]), "expected 0 or 1"),
        (lambda m: rename(m, hybrid_layer_pattern=[0, 0]), "layers.1.self_attn.qkv_proj.weight has 1408 rows"),
        (plain, r"has shape \[9, 2\]; expected \[10, 2\], for 2 chunks of 544 rows"),
        (aligned, "no weight has a scale whose shape would tell"),
    ],
)
def test_what_is_not_known_for_sure_is_refused(change: Callable[[Made], object], reason: str, tmp_path: Path) -> None:
    path = broken(change).write(tmp_path / "ckpt")
    with pytest.raises(PlanError, match=reason):
        load_state_dict(path, layout="per_channel", qkv="split")
    assert f"{L0}.qkv_proj.weight" in load_state_dict(path, nan="keep")  # as on disk, which needs no knowledge
    warned = plan_checkpoint(path).warnings
    assert bool(warned) == ("no model" not in reason)


def test_what_cannot_be_split_is_refused(made: Made, path: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="blocks run across q, k and v"):
        load_state_dict(path, qkv="split")
    with pytest.raises(PlanError, match="no model whose fused qkv is known"):
        rescale_state_dict(made.tensors, layout="per_channel", qkv="split")
    with pytest.raises(OptionError, match="cut the tensor as it lies on disk"):
        load_state_dict(path, slices={}, layout="per_channel", qkv="split")
    with pytest.raises(OptionError, match="does not split any"):
        safe_open(path / "model.safetensors", qkv="split")
    for name, tensor in (("qkv_proj.bias", torch.zeros(1088)), ("q_proj.weight", torch.zeros(1, 1))):
        other = Made({**made.tensors, f"{L0}.{name}": tensor}, made.config).write(tmp_path / name)
        with pytest.raises(PlanError, match=r"bias|would both get this name"):
            load_state_dict(other, layout="per_channel", qkv="split")


def test_the_real_shapes() -> None:
    """Rows and scale rows of the published models, from their model cards' numbers."""
    from neuron_fp8_loader.conventions.qkv import family

    def of(**more: Any) -> dict[str, Any]:
        names = {"architectures": ("MiMoV2ForCausalLM",), "attention_projection_layout": "fused_qkv"}
        swa = {"swa_head_dim": 192, "swa_v_head_dim": 128, "hybrid_layer_pattern": (0, 1)}
        return {**names, **swa, "head_dim": 192, "v_head_dim": 128, **more}

    base = of(
        num_attention_heads=64, num_key_value_heads=4, swa_num_attention_heads=64, swa_num_key_value_heads=8
    )  # fmt: skip
    pro = of(
        num_attention_heads=128, num_key_value_heads=8, swa_num_attention_heads=128, swa_num_key_value_heads=8
    )  # fmt: skip
    known = family(base)
    assert known is not None
    found = [known.of(numbers, f"{at}.qkv_proj.weight") for numbers in (base, pro) for at in (L0, L1)]
    assert [(each.chunks, each.chunk, each.rows) for each in found] == [
        (4, 3392, 13568), (4, 3712, 14848), (8, 3392, 27136), (8, 3392, 27136)
    ]  # fmt: skip


def test_one_file_of_several_and_unquantized_weights(made: Made, tmp_path: Path) -> None:
    """A weight that is not FP8 lies as the others do."""
    name, other = f"{L1}.qkv_proj.weight", dict(made.tensors)
    whole = torch.from_numpy(interleave(made, L1)).bfloat16()
    other[name] = whole
    del other[f"{name}_scale_inv"]
    path = Made(other, made.config).write(tmp_path / "ckpt")
    out = load_file(path / "model.safetensors", layout="per_channel", qkv="split")
    for part in "qkv":
        want = torch.from_numpy(made.values[f"{L1}.{part}_proj.weight"]).bfloat16()
        assert same_bytes(out[f"{L1}.{part}_proj.weight"], want)
    assert e4m3fn(out[f"{L0}.q_proj.weight"]).shape == (768, 192)
