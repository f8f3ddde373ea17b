"""The measures of the fidelity benchmark, against numpy and torch's own; and what they say of each method."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support import SHARED, e4m3fn, ieee_e4m3, sqnr

from benchmarks import fidelity, score, sources
from benchmarks.llama import LINEARS, Llama, Shape, prompt, random_llama

SMALL = Shape(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)


@pytest.mark.parametrize("name", list(sources.distributions(128)))
def test_scores_are_numpys(name: str) -> None:
    weight = sources.per_row(sources.distributions(128)[name])
    found = score.score([weight], score.METHODS)
    spread, original = weight.spread.double().numpy(), weight.original.double().numpy()
    before = e4m3fn(weight.codes) * spread
    assert found["checkpoint"]["changed"] == 0
    assert found["checkpoint"]["sqnr_db"] is None
    assert found["checkpoint"]["sqnr_original_db"] == pytest.approx(sqnr(original, before))
    for method in ("half", "ratio", "clamp to 240"):
        codes, scale = score.METHODS[method](weight)
        after = ieee_e4m3(codes) * np.broadcast_to(scale.double().numpy(), before.shape)
        entry = found[method]
        assert np.isfinite(after).all()
        assert entry["sqnr_original_db"] == pytest.approx(sqnr(original, after), abs=0.01)
        assert entry["changed"] == pytest.approx((np.abs(after - before) > 1e-6 * np.abs(before)).mean(), abs=1e-9)
        assert entry["weights"] == before.size
    assert found["half"]["sqnr_db"] is None or found["half"]["sqnr_db"] > 90
    assert 30 < found["ratio"]["sqnr_db"] < 35
    assert found["half"]["sqnr_original_db"] == pytest.approx(found["checkpoint"]["sqnr_original_db"], abs=0.001)
    assert found["ratio"]["sqnr_original_db"] < found["half"]["sqnr_original_db"] - 1
    assert found["clamp to 240"]["sqnr_original_db"] < found["ratio"]["sqnr_original_db"]


def test_flushing_takes_subnormals_only() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    kept, low = codes.float(), score.flushed(codes)
    small = kept.abs() < 2**-6
    assert (low[small] == 0).all()
    assert torch.equal(low[~small].nan_to_num(), kept[~small].nan_to_num())


def test_codes_of_each_method() -> None:
    found = fidelity.by_code()
    exact = {name: sum(error == 0 for error in errors) for name, errors in found.items()}
    assert exact == {"half": 118, "ratio": 14, "clamp to 240": 119}
    assert all(len(errors) == 126 for errors in found.values())
    assert found["clamp to 240"][-1] == pytest.approx((448 - 240) / 448)


@pytest.mark.parametrize("powers", [False, True])
def test_blocks_cover_the_weight(powers: bool) -> None:
    weight = sources.per_block(sources.distributions(200)["normal"], powers)
    assert weight.scale.shape == (2, 2)
    values = e4m3fn(weight.codes) * weight.spread.double().numpy()
    assert 28 < sqnr(weight.original.double().numpy(), values) < 36
    if powers:
        assert (torch.frexp(weight.scale)[0] == 0.5).all()


def test_divergence_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(7, 11, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    expected = torch.nn.functional.kl_div(two, one, reduction="batchmean", log_target=True)
    assert fidelity.divergence(one, two) == pytest.approx(float(expected))
    assert fidelity.divergence(one, one) == 0
    assert fidelity.agreement(one, one) == 1


def test_logits_of_every_method() -> None:
    found = fidelity.logits(SMALL, 8, 1)
    assert not found["without the loader"]["finite"]
    assert found["half"]["kl_checkpoint"] < 1e-6
    assert found["half"]["top_1_checkpoint"] == 1
    assert found["ratio"]["kl_checkpoint"] > found["half"]["kl_checkpoint"]
    assert found["clamp to 240"]["kl_original"] > found["ratio"]["kl_original"]
    assert found["blocks: block -> row, public scripts"]["kl_checkpoint"] > 0


def test_the_llama_is_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    tensors, ids = random_llama(SMALL), prompt(SMALL, 12, 2)
    config = {k: v for k, v in SMALL.config().items() if k not in ("quantization_config", "torch_dtype")}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float().eval()
    theirs.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    with torch.no_grad():
        torch.testing.assert_close(Llama(SMALL, tensors, 12)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert {f"model.layers.0.{name}.weight" for name in LINEARS} <= set(tensors)


def test_real_checkpoints() -> None:
    if not (SHARED / "_base").is_dir():
        pytest.skip("no shared checkpoints")
    base = load_file(SHARED / "_base" / "llama" / "model.safetensors")
    for name in ("ct_fp8_block", "modelopt_fp8", "torchao_fp8_wo", "ct_mxfp8"):
        weights = sources.beside(SHARED / name, base)
        assert len(weights) == 14, name
        entry = score.score(weights[:2], score.METHODS)
        assert entry["half"]["sqnr_db"] > 100, name
        assert entry["checkpoint"]["sqnr_original_db"] > 28, name
    assert sources.beside(SHARED / "ct_nvfp4", base) == []


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_FP8_SHARED", str(tmp_path / "absent"))
    options = ["--side=128", "--hidden=64", "--layers=1", "--tokens=8", f"--out={tmp_path}"]
    done = CliRunner().invoke(fidelity.main, options)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "fidelity.json").read_text())["results"]["real"] == []
    pytest.importorskip("altair")
    assert (tmp_path / "fidelity.png").stat().st_size > 10_000
