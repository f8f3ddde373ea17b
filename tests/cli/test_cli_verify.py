"""``neuron-fp8 verify``: it passes what is right, and finds what is wrong."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_fp8_loader import load_checkpoint, load_state_dict
from neuron_fp8_loader.codes import formats
from neuron_fp8_loader.tools.against import compare_checkpoints
from neuron_fp8_loader.tools.arithmetic import GPU, HALF_STEP, NEURON, expected
from neuron_fp8_loader.tools.compare import Side, compare
from neuron_fp8_loader.tools.verify import verify_checkpoint
from tests.cli.helpers import KEEP, codes, layer, one_line, run, run_json, sharded, single
from tests.support import CONTROLS, REAL, TINY, e4m3fn, shared, sqnr


@pytest.mark.parametrize("name", ["tiny", *REAL])
def test_real_checkpoints_pass(name: str) -> None:
    data = run_json("verify", TINY if name == "tiny" else shared(name), *KEEP, code=int(name in CONTROLS))
    assert data["ok"] == (name not in CONTROLS)
    assert data["problems"] == []
    assert data["sqnr_db"] is None or data["sqnr_db"] > 100
    assert not any(w["above"] or w["off"] for w in data["weights"])


def test_the_bytes_of_half_and_ratio() -> None:
    """Two derivations of the tables, neither from the other."""
    for method in ("half", "ratio"):
        magnitudes = [c for c in range(256) if c & 0x7F != 0x7F]
        assert expected(method)[magnitudes].tolist() == [formats.METHODS[method].out[c] for c in magnitudes]
    finite = GPU[:0x7F]
    assert np.array_equal(HALF_STEP[: finite.size - 1], np.diff(finite) / 2)
    assert np.array_equal(NEURON[:0x78], GPU[:0x78])


def test_sqnr_is_that_of_the_dequantized_weight() -> None:
    before, after = load_file(TINY / "model.safetensors"), load_state_dict(TINY)
    result = verify_checkpoint(TINY)
    for weight in result.weights:
        pair = next(p for p in load_checkpoint(TINY).plan.pairs if p.weight == weight.name)
        assert before[pair.scale].numel() == 1 or before[pair.scale].ndim == 2
        scale, new_scale = (d[pair.scale].double().numpy() for d in (before, after))
        was, now = e4m3fn(before[weight.name]) * scale, e4m3fn(after[weight.name]) * new_scale
        assert weight.sqnr_db == pytest.approx(sqnr(was, now))
        assert weight.changed == np.count_nonzero(was != now)


@pytest.mark.parametrize("method", ["half", "ratio"])
def test_a_loader_that_converts_wrongly_is_found(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Break the tables that the loader uses; verify has its own."""
    table = formats.METHODS[method]
    out, symmetric = bytearray(table.out), bytearray(table.symmetric)
    for code in (0x60, 0xE0):
        out[code] += 1
    symmetric[0x60] += 1
    broken = formats.Table(method, table.scale_factor, bytes(out), table.lossy, bytes(symmetric))
    monkeypatch.setitem(formats.METHODS, method, broken)
    result = run("verify", TINY, "--method", method)
    assert result.exit_code == 1
    assert "not fine" in result.stdout


def test_nan_codes_are_a_finding_unless_kept(tmp_path: Path) -> None:
    path = single(tmp_path / "c", layer(0) | {"y.weight": codes(0x7F, 0x7E, shape=(4, 4)), "y.scale": torch.ones(1)})
    assert any("NaN codes" in problem for problem in run_json("verify", path, code=1)["problems"])
    kept = run_json("verify", path, "--nan", "keep", code=0)
    assert sum(w["nan"] for w in kept["weights"]) == 8


def test_unscaled_weights_dequantize_exactly(tmp_path: Path) -> None:
    path = single(tmp_path / "c", {"x.weight": codes(*range(0x7F), shape=(8, 16))})
    assert run("verify", path).exit_code == 1
    data = run_json("verify", path, "--unscaled", "dequantize", code=0)
    assert data["changed"] == 0


@pytest.mark.parametrize("kind", ["column", "block", "expert", "bin", "e8m0", "fnuz"])
def test_other_layouts(tmp_path: Path, kind: str) -> None:
    codes_ = torch.randint(0, 0x7F, (3, 40, 24), dtype=torch.uint8)
    weight = codes_.view(torch.float8_e4m3fn)
    tensors = {
        "column": {"m.weight": weight[0].clone(), "m.weight_scale": torch.rand(1, 24) + 0.1},
        "block": {"m.weight": weight[0].clone(), "m.weight_scale_inv": torch.rand(3, 2) + 0.1},
        "expert": {"experts.up": weight, "experts.up_scale": torch.rand(3, 1, 24) + 0.1},
        "bin": {"m.weight": weight[0].clone(), "m.weight_scale": torch.rand(40, 1) + 0.1},
        "e8m0": {"m.weight": weight[0].clone(), "m.weight_scale": torch.randint(100, 140, (40, 2), dtype=torch.uint8)},
        "fnuz": {"m.weight": codes_[0].view(torch.float8_e4m3fnuz), "m.weight_scale": torch.rand(40, 1) + 0.1},
    }[kind]
    path = tmp_path / "c"
    if kind == "bin":
        path.mkdir()
        torch.save(tensors, path / "pytorch_model.bin")
    else:
        single(path, tensors)
    if kind == "block":
        (path / "config.json").write_text(
            '{"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}'
        )
    data = run_json("verify", path, *KEEP, code=0)
    assert data["values"] == tensors[next(iter(tensors))].numel()


# -- against -----------------------------------------------------------------------------------------------------


def recipe(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights and ``weight_scale`` as Neuron's README converts them, worked out by ml_dtypes."""
    out = dict(tensors)
    for name, weight in tensors.items():
        scale = name.replace("weight", "weight_scale")
        if weight.dtype == torch.float8_e4m3fn and scale in tensors:
            values = e4m3fn(weight).astype(np.float32) / np.float32(448 / 240)
            made = values.astype(ml_dtypes.bfloat16).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            out[name] = torch.from_numpy(made).view(torch.float8_e4m3fn)
            out[scale] = tensors[scale] * (448 / 240)
    return out


@pytest.fixture
def original(tmp_path: Path) -> Path:
    tensors = load_file(TINY / "model.safetensors")
    if not any(name.endswith(".weight_scale") for name in tensors):
        pytest.skip("the recipe knows weight_scale only")
    return single(tmp_path / "original", tensors)


def test_a_copy_by_the_readme_script(tmp_path: Path, original: Path) -> None:
    copy = single(tmp_path / "copy", recipe(load_file(original / "model.safetensors")))
    data = run_json("verify", copy, "--against", original, code=0)
    assert {f["factor"] for f in data["factors"]} == {448 / 240}
    assert 31 < data["sqnr_db"] < 32
    assert "448/240" in run("verify", copy, "--against", original).stdout


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("scale forgotten", "off by more than rounding"),
        ("weight forgotten", "codes above 240"),
        ("one byte", "off by more than rounding"),
        ("other tensor", "differs from the original"),
        ("missing", "is missing from"),
        ("scale lost", "has lost its scale"),
        ("shape", "was ["),
    ],
)
def test_damage_is_found(tmp_path: Path, original: Path, damage: str, said: str) -> None:
    before = load_file(original / "model.safetensors")
    after = load_state_dict(original)
    name = next(n for n, t in before.items() if t.dtype == torch.float8_e4m3fn)
    scale = f"{name}_scale"
    if damage == "scale forgotten":
        after[scale] = before[scale]
    elif damage == "weight forgotten":
        after[name] = before[name]
    elif damage == "one byte":
        raw = after[name].view(torch.uint8).clone()
        raw.view(-1)[5] ^= 0x08
        after[name] = raw.view(torch.float8_e4m3fn)
    elif damage == "other tensor":
        other = next(n for n, t in before.items() if t.dtype == torch.bfloat16 and n != scale)
        after[other] = after[other] + 1
    elif damage == "missing":
        after.pop(next(n for n, t in before.items() if t.dtype == torch.bfloat16 and not n.endswith("_scale")))
    elif damage == "scale lost":
        after.pop(scale)
    else:
        after[name] = after[name][:1].clone()
        after[scale] = after[scale].reshape(-1)[:1].clone()
    copy = single(tmp_path / "copy", after)
    result = run("verify", copy, "--against", original)
    assert result.exit_code == 1
    assert said in result.stdout


def test_rows_for_blocks_are_compared_by_value(tmp_path: Path) -> None:
    """A copy with scales of another layout and name: only its values count."""
    rng = np.random.default_rng(0)
    weight = codes(*rng.integers(0, 0x7F, 256).tolist(), shape=(32, 64))
    blocks = np.array([[0.5, 2.0], [0.25, 1.0]], np.float32)
    old = single(tmp_path / "old", {"m.weight": weight, "m.weight_scale_inv": torch.from_numpy(blocks)})
    (old / "config.json").write_text('{"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]}}')
    values = e4m3fn(weight) * np.repeat(np.repeat(blocks, 16, 0), 32, 1)
    rows = (np.abs(values).max(1, keepdims=True) / 240).astype(np.float32)
    made = (values / rows).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    tensors = {"m.weight": torch.from_numpy(made).view(torch.float8_e4m3fn), "m.scale": torch.from_numpy(rows)}
    data = run_json("verify", single(tmp_path / "new", tensors), "--against", old, code=0)
    assert data["factors"] == [{"factor": None, "weights": 1}]
    now = e4m3fn(tensors["m.weight"]) * rows
    assert data["sqnr_db"] == pytest.approx(sqnr(values, now))


def test_the_wrong_way_round_is_noticed(tmp_path: Path, original: Path) -> None:
    copy = single(tmp_path / "copy", load_state_dict(original))
    assert compare_checkpoints(copy, original).ok
    assert "wrong way round" in run("verify", original, "--against", copy).stdout


def test_forgotten_activation_scales_are_noted(tmp_path: Path) -> None:
    old = layer(0) | {"model.layers.0.mlp.up_proj.input_scale": torch.tensor([0.1])}
    new = load_state_dict(single(tmp_path / "old", old)) | {n: t for n, t in old.items() if "input" in n}
    data = run_json("verify", single(tmp_path / "new", new), "--against", tmp_path / "old", code=0)
    assert data["activation_factors"] == [1.0, 1.0]
    assert "saturates at 240" in data["notes"][0]


def test_a_copy_over_shards_of_another_cut(tmp_path: Path) -> None:
    old = sharded(tmp_path / "old", layer(0), layer(1))
    save_file(load_state_dict(old), tmp_path / "new.safetensors")
    assert run("verify", tmp_path / "new.safetensors", "--against", old).exit_code == 0


def test_compare_by_hand() -> None:
    old = Side(codes(0x7E, 0x01, shape=(1, 2)), torch.tensor([3.0]))
    new = Side(codes(0x76, 0x00, shape=(1, 2)), torch.tensor([6.0]))
    check = compare("w", old, new, 1)
    assert (check.changed, check.off, check.above, check.factor) == (1, 0, 0, 2.0)
    assert check.signal == pytest.approx((448 * 3) ** 2)
    assert check.noise == pytest.approx((3 * 2**-9) ** 2)


def test_broken_input(tmp_path: Path) -> None:
    assert "no such file" in one_line(run("verify", TINY, "--against", tmp_path / "nothing"))


def test_a_copy_of_fused_experts_with_scales_across_the_rows(tmp_path: Path) -> None:
    """FBGEMM's Llama 4: [experts, in, out] with one scale an output column, which shapes alone do not tell."""
    shape, scales = (2, 64, 128), (2, 1, 128)
    name = "language_model.model.layers.0.feed_forward.experts.gate_up_proj"
    weight = torch.randint(0, 0x7F, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    before = single(tmp_path / "a", {name: weight, f"{name}_scale": torch.rand(scales) + 0.1})
    assert run("export", before, tmp_path / "b").exit_code == 0
    assert run_json("verify", tmp_path / "b", "--against", before, code=0)["changed"] > 0


@pytest.mark.parametrize("method", ["half", "ratio"])
def test_one_code_a_step_off_is_found(tmp_path: Path, original: Path, method: str) -> None:
    """Where the factor is known, the exact bytes are: a step is no rounding."""
    tensors = load_file(original / "model.safetensors")
    name = next(n for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn)
    copy = tmp_path / "copy"
    assert run("export", original, copy, "--method", method).exit_code == 0
    assert run("verify", copy, "--against", original).exit_code == 0
    made = load_file(copy / "model.safetensors")
    flat = made[name].view(torch.uint8).view(-1)
    place = int(torch.nonzero((flat & 0x7F) == 0x40)[0])  # well inside: neither zero nor the largest
    flat[place] += 1
    save_file(made, copy / "model.safetensors", {"format": "pt"})
    result = run("verify", copy, "--against", original)
    assert result.exit_code == 1
    assert f"1 of {tensors[name].numel()} values are off" in result.stdout
    assert "not fine: 1 of 14 weights" in result.stdout
