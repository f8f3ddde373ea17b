"""``--for``: inspect predicts, verify measures and export writes the load that ``config`` tells people to use."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_fp8_loader import load_state_dict, plan_checkpoint
from neuron_fp8_loader.codes.device import PLATFORM_ENV
from neuron_fp8_loader.integrations import flag
from neuron_fp8_loader.integrations.flag import BLOCKWISE, experts_apart
from neuron_fp8_loader.integrations.keys import nxd_names
from neuron_fp8_loader.integrations.loading import Session
from neuron_fp8_loader.tools.export import prepare_export
from neuron_fp8_loader.tools.scan import scan_checkpoint
from neuron_fp8_loader.tools.settings import settings_for
from neuron_fp8_loader.tools.verify import verify_checkpoint
from tests.cli.helpers import COOL, HOT, codes, layer, one_line, run, run_json, single
from tests.integrations import moe_checkpoints
from tests.support import CONTROLS, REAL, e4m3fn, fp8, same_bytes, shared

FP8 = [name for name in REAL if name not in CONTROLS]
LAYOUTS = {"per_tensor_symmetric": "per_tensor"}


def on_disk(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def names_in_nxd(state_dict: dict[str, Any]) -> dict[str, Any]:
    """NxD Inference's own renaming (application_base.py)."""
    return {name.replace(".weight_scale", ".scale"): value for name, value in state_dict.items()}


@pytest.mark.parametrize("stack", ["nxd", "vllm-neuron"])
@pytest.mark.parametrize("name", FP8)
def test_what_is_predicted_is_what_is_measured(name: str, stack: str) -> None:
    """In dB, of each weight. The model knows one distribution of codes a weight, not one a block: it can be off
    by more where a weight has a few blocks, and half of those cut, as in tests/data."""
    found, result = scan_checkpoint(shared(name), stack=stack), verify_checkpoint(shared(name), stack=stack)
    assert result.ok, result.problems
    by_name = {weight.name: weight.sqnr_db for weight in result.weights}
    assert by_name.keys() == found.predicted.keys()
    for weight, prediction in found.predicted.items():
        if result.sqnr_db < 100:
            within = 1.5 if found.plan.tensors[weight].numel >= 1 << 16 else 2.5
            assert prediction.sqnr == pytest.approx(by_name[weight], abs=within)
    assert found.sqnr_db == result.sqnr_db or found.sqnr_db == pytest.approx(result.sqnr_db, abs=1.5)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(256, 384), (200, 500)])
def test_a_prediction_of_other_weights(tmp_path: Path, spread: float, shape: tuple[int, int]) -> None:
    """Heavy tails, and blocks whose scales differ by powers of two and more."""
    random = np.random.default_rng(3)
    grid = -(-np.array(shape) // 128)
    scale = np.exp2(random.normal(-9, spread, grid)).astype(np.float32)
    weight = fp8(np.clip(random.standard_t(4, shape) * 60, -448, 448))
    tensors = {"m.weight": weight, "m.weight_scale_inv": torch.from_numpy(scale)}
    path = single(tmp_path / "c", tensors)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (path / "config.json").write_text(json.dumps(config))
    measured = verify_checkpoint(path, stack="nxd").sqnr_db
    assert scan_checkpoint(path, stack="nxd").sqnr_db == pytest.approx(measured, abs=1.5)
    # and what is measured is so: in float64, by ml_dtypes
    loaded = load_state_dict(path, layout="per_channel")
    blocks = np.kron(scale.astype(np.float64), np.ones((128, 128)))[: shape[0], : shape[1]]
    was = e4m3fn(weight) * blocks
    rest = e4m3fn(loaded["m.weight"]) * loaded["m.weight_scale_inv"].double().numpy() - was
    assert measured == pytest.approx(10 * np.log10(np.square(was).sum() / np.square(rest).sum()))


def test_half_of_one_scale_is_predicted_exactly(tmp_path: Path) -> None:
    weight = codes(*range(0x7F), shape=(16, 127))
    path = single(tmp_path / "c", {"m.weight": weight, "m.weight_scale": torch.tensor(0.37)})
    was = e4m3fn(weight)
    now = (was / 2).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * 2
    exact = 10 * np.log10(np.square(was).sum() / np.square(was - now).sum())
    assert scan_checkpoint(path, stack="nxd").sqnr_db == pytest.approx(exact)


@pytest.mark.parametrize("name", FP8)
def test_a_copy_for_nxd_is_what_the_flag_gives(tmp_path: Path, name: str) -> None:
    """Read by safetensors alone it has the tensors, and the names, of a load under the flag."""
    path, out = shared(name), tmp_path / "out"
    made = prepare_export(path, out, stack="nxd")
    made.run()
    kind = settings_for(path).neuron_config["quantization_type"]
    wanted = load_state_dict(path, layout=LAYOUTS.get(kind, "per_channel"))  # type: ignore[arg-type]
    if made.form.free:
        names = nxd_names(plan_checkpoint(path))
        wanted = {names.get(name, name): value for name, value in wanted.items()}
        assert kind == settings_for(out).neuron_config["quantization_type"]
    else:  # the flag goes on to give experts their scales, from the copy as from the original
        assert kind == "expert_wise_per_channel_symmetric"
        again = load_state_dict(out, layout="per_channel")
        assert all(same_bytes(again[name], value) for name, value in on_disk(out).items())
    copy, wanted = names_in_nxd(on_disk(out)), names_in_nxd(wanted)
    if not made.form.free:
        copy = {name.replace(".scale_inv", ".scale"): value for name, value in copy.items()}
        wanted = {name.replace(".scale_inv", ".scale").replace("_scale_inv", ".scale") if name not in copy else name: v
                  for name, v in wanted.items()}  # fmt: skip
    assert copy.keys() == wanted.keys()
    assert all(same_bytes(copy[name], value) for name, value in wanted.items())
    plan = plan_checkpoint(out)
    assert plan.warnings == plan_checkpoint(path).warnings
    assert run_json("verify", out, "--against", path)["ok"]
    assert run_json("inspect", out, code=0)["load"]["rescaled"] == 0


@pytest.mark.parametrize("name", FP8)
def test_a_copy_for_the_plugin_is_plain_bfloat16(tmp_path: Path, name: str) -> None:
    path, out = shared(name), tmp_path / "out"
    options = ()
    if "kept FP8" in run("inspect", path, "--headers-only", "--for", "vllm-neuron").stdout:
        text = one_line(run("export", path, out, "--for", "vllm-neuron"))
        assert "--quantization neuron_fp8" in text
        options = ("--dequantize", "*")
    assert run("export", path, out, "--for", "vllm-neuron", *options).exit_code == 0
    copy = on_disk(out)
    assert {t.dtype for name, t in copy.items() if name != "scaled_fp8"} == {torch.bfloat16}  # ComfyUI's marker
    if (out / "config.json").exists():
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
    original = {name.replace("._weight_qdata", ".weight"): t for name, t in on_disk(path).items()}
    weights = {name for name, t in original.items() if t.dtype != torch.uint8 and not name.endswith("comfy_quant")}
    assert copy.keys() <= weights
    assert all(copy[name].shape == original[name].shape for name in copy)
    assert run_json("verify", out, "--against", path)["ok"]
    assert run("inspect", out, "--for", "vllm-neuron").exit_code == 0


def test_a_copy_declares_what_it_is(tmp_path: Path) -> None:
    path = single(tmp_path / "c", layer(0) | {"lm_head.weight": torch.ones(8, 4)})
    old = {
        "model_type": "llama",
        "quantization_config": {"quant_method": "fp8"},
        "text_config": {"compression_config": 1},
    }
    (path / "config.json").write_text(json.dumps(old))
    (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert run("export", path, tmp_path / "out").exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["text_config"]) == ("llama", {})
    declared = config["quantization_config"]
    assert (declared["quant_method"], declared["format"], declared["ignore"]) == (
        "compressed-tensors", "float-quantized", ["lm_head"],
    )  # fmt: skip
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    kept = run_json("export", path, tmp_path / "kept", "--layout", "keep", code=0)
    assert "hf_quant_config.json" in kept["carried_over"]
    assert json.loads((tmp_path / "kept" / "config.json").read_text()) == old


def test_a_copy_in_bin_files(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.mkdir()
    tensors = {"m.weight": codes(*HOT, shape=(4, 8)), "m.weight_scale_inv": torch.ones(4, 1), "n": torch.ones(2)}
    torch.save(tensors, path / "pytorch_model.bin")
    assert run("export", path, tmp_path / "out").exit_code == 0
    made = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert list(made) == ["m.weight", "m.weight_scale", "n"]
    assert made["m.weight_scale"].tolist() == [[2.0]] * 4


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    tensors = {"m.weight": codes(*HOT, shape=(4, 8)), "m.scale": torch.ones(4, 1), "m.weight_scale": torch.ones(3)}
    path = single(tmp_path / "c", tensors)
    found = run("export", path, tmp_path / "out")
    assert found.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_shard_of_scales_alone_is_not_in_a_bfloat16_copy(tmp_path: Path) -> None:
    path, out = shared("derived_split_shards"), tmp_path / "out"
    assert run("export", path, out, "--for", "vllm-neuron").exit_code == 0
    files = {f.name for f in out.glob("*.safetensors")}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == files
    assert "finished already" in run("export", path, out, "--for", "vllm-neuron").stdout
    assert "other options" in one_line(run("export", path, out))


# -- what stops a load ---------------------------------------------------------------------------------------------


def fnuz(directory: Path) -> Path:
    weight = torch.arange(128, dtype=torch.uint8).view(8, 16).view(torch.float8_e4m3fnuz)
    return single(directory, {"m.weight": weight, "m.weight_scale": torch.ones(1)})


def test_a_layout_that_cannot_be_is_a_refusal(tmp_path: Path) -> None:
    path = fnuz(tmp_path / "c")
    for headers in ((), ("--headers-only",)):
        data = run_json("inspect", path, *headers, code=1)
        assert "whose scales are not laid out" in data["refusals"][0]
    assert "whose scales are not laid out" in run_json("verify", path, code=1)["problems"][0]
    assert "whose scales are not laid out" in one_line(run("export", path, tmp_path / "out"))
    plugin = run_json("inspect", path, "--for", "vllm-neuron", code=1)
    assert "to be read as bfloat16" in plugin["refusals"][0]
    assert run("inspect", path, "--layout", "keep").exit_code == 0


def test_an_overflow_is_no_reason_to_stop(tmp_path: Path) -> None:
    path = single(tmp_path / "c", layer(0))
    assert run_json("inspect", path, code=0)["codes"]["as_nan"] > 0
    assert (
        run_json("inspect", single(tmp_path / "d", layer(0, hot=False)), code=0)["load"]["predicted_sqnr_db"] is None
    )


def test_options_that_the_plugin_does_not_take(tmp_path: Path) -> None:
    path = single(tmp_path / "c", {"m.weight": codes(*COOL, shape=(4, 4)), "m.weight_scale": torch.ones(1)})
    assert "--layout per_channel: means nothing" in one_line(
        run("inspect", path, "--for", "vllm-neuron", "--layout", "per_channel")
    )
    assert "bfloat16 or nothing" in one_line(run("verify", path, "--for", "vllm-neuron", "--dequantize", "m"))


OTHERS: dict[str, tuple[dict[str, torch.Tensor], int]] = {
    "GPTQ": ({"m.qweight": torch.ones(2, 2, dtype=torch.int32), "m.g_idx": torch.ones(2, dtype=torch.int32)}, 1),
    "AWQ": ({"m.qweight": torch.ones(2, 2, dtype=torch.int32)}, 1),
    "bitsandbytes": ({"m.weight": torch.ones(2, 2, dtype=torch.uint8), "m.weight.absmax": torch.ones(2)}, 1),
    "MXFP4": (
        {"m_blocks": torch.ones(2, 2, dtype=torch.uint8), "m_scales": torch.ones(2, dtype=torch.uint8)}, 1
    ),
    "int8": ({"m.weight": torch.ones(2, 2, dtype=torch.int8), "m.weight_scale": torch.ones(2, 1)}, 0),
    "float8_e5m2": ({"m.weight": torch.ones(2, 2).to(torch.float8_e5m2)}, 1),
    "compressed-tensors int4": ({"m.weight_packed": torch.ones(2, 2, dtype=torch.int32)}, 1),
    "not quantized (bfloat16)": ({"m.weight": torch.ones(2, 2, dtype=torch.bfloat16)}, 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(OTHERS))
def test_what_holds_no_fp8_is_named(tmp_path: Path, kind: str) -> None:
    tensors, code = OTHERS[kind]
    path = single(tmp_path / "c", tensors)
    if kind in ("AWQ", "GPTQ"):
        (path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": kind.lower()}}))
    data = run_json("inspect", path, code=code)
    assert data["other"]["name"].startswith(kind)
    assert data["other"]["loads"] == (code == 0)
    assert kind in run("inspect", path).stdout
    checked = run("verify", path)
    assert checked.exit_code == 1
    assert "nothing to verify: no FP8 weights" in checked.stdout
    assert kind in checked.stdout
    assert not run_json("verify", path, code=1)["ok"]
    assert "no FP8 weights" in one_line(run("export", path, tmp_path / "out"))


def test_gpt_oss_loads_mxfp4_itself(tmp_path: Path) -> None:
    path = single(tmp_path / "c", OTHERS["MXFP4"][0])
    (path / "config.json").write_text('{"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}')
    assert run_json("inspect", path, code=0)["other"]["loads"]


def test_one_shard_alone(tmp_path: Path) -> None:
    """A pair in two files: inspect looks at the one that it is given, and does not stumble over the layout."""
    path = tmp_path / "c"
    path.mkdir()
    pair = layer(0)
    (weight, scale) = pair
    save_file({weight: pair[weight]}, path / "model-00001-of-00002.safetensors")
    save_file({scale: pair[scale]}, path / "model-00002-of-00002.safetensors")
    index = {"weight_map": {weight: "model-00001-of-00002.safetensors", scale: "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for number in (1, 2):
        assert run("inspect", path / f"model-0000{number}-of-00002.safetensors").exit_code == 0


def test_routers_and_embeddings_are_bfloat16_in_a_copy(tmp_path: Path) -> None:
    tensors = dict(layer(0))
    for name in ("model.embed_tokens", "model.layers.0.mlp.gate"):
        tensors |= {f"{name}.weight": codes(*HOT, shape=(32, 16)), f"{name}.weight_scale": torch.full((32, 1), 0.5)}
    path = single(tmp_path / "c", tensors)
    prepare_export(path, tmp_path / "out", stack="nxd").run()
    kinds = {name: t.dtype for name, t in on_disk(tmp_path / "out").items() if name.endswith(".weight")}
    assert kinds.pop("model.layers.0.mlp.up_proj.weight") == torch.float8_e4m3fn
    assert set(kinds.values()) == {torch.bfloat16}
    assert verify_checkpoint(path, stack="nxd").ok


# -- mixtures of experts -------------------------------------------------------------------------------------------

MIXTURES = [
    ("qwen3_moe", "block", "blockwise"),
    ("deepseek_v3", "block", "blockwise"),
    ("dbrx", "tensor", None),
    ("dbrx", "channel", None),
    ("dbrx", "block", None),
]


class Mixture(NamedTuple):
    """A checkpoint, its exact twin, the form of its scales, and what the commands are asked for."""

    path: Path
    exact: Path
    form: str
    given: tuple[str, ...]


@pytest.fixture(params=MIXTURES, ids=lambda mixture: "-".join(map(str, mixture)))
def mixture(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mixture:
    monkeypatch.setenv(PLATFORM_ENV, "trn2")
    family, form, experts = request.param
    return Mixture(*moe_checkpoints.write(tmp_path, family, form), form, ("--experts", experts) if experts else ())


def under_the_flag(path: Path, given: tuple[str, ...]) -> dict[str, Any]:
    """The options that a load under the flag has, with what ``config`` prints; the model is not looked at."""
    told = SimpleNamespace(**run_json("config", path, *given, code=0)["neuron_config"])
    blocks = experts_apart(told) and told.quantization_type == BLOCKWISE
    session = Session(flag.options_for(told) or {}, blocks=blocks, entries=tuple(told.modules_to_not_convert))
    return session.options_for(plan_checkpoint(path))


def test_experts_are_predicted_as_config_has_them_loaded(mixture: Mixture) -> None:
    """Which become bfloat16, which keep their blocks, and what that costs."""
    path, exact, form, given = mixture
    predicted = run_json("inspect", path, *given, code=0)
    loaded, twins = load_state_dict(path, **under_the_flag(path, given)), load_file(exact / "model.safetensors")
    noise = signal = 0.0
    for pair in plan_checkpoint(path).pairs:
        weight, scale = loaded[pair.weight], loaded.get(pair.scale)
        want, got = twins[pair.weight].double().numpy(), weight.double().numpy()
        if scale is not None:
            assert weight.dtype == torch.float8_e4m3fn
            got = e4m3fn(weight) * spread(scale, weight)
        noise, signal = noise + np.square(got - want).sum(), signal + np.square(want).sum()
    load = predicted["load"]
    assert load["dequantized"] == sum(pair["scale"] not in loaded for pair in predicted["pairs"])
    rows = sum(loaded[p["scale"]].shape != tuple(p["scale_shape"]) for p in predicted["pairs"] if p["scale"] in loaded)
    assert load["requantized"] == (rows if form in ("block", "mx") else 0)
    measured = 10 * np.log10(signal / noise)  # above 140 dB the twin's own rounding is heard
    within = 1.5 if measured < 100 else 5
    assert load["predicted_sqnr_db"] == pytest.approx(measured, abs=within)
    assert run_json("verify", path, *given, code=0)["sqnr_db"] == pytest.approx(measured, abs=within)


def spread(scale: torch.Tensor, weight: torch.Tensor) -> np.ndarray:
    values = scale.double().numpy() if scale.dtype != torch.uint8 else np.exp2(scale.double().numpy() - 127)
    values = values.reshape(values.shape or (1, 1))
    for axis, size in enumerate(weight.shape):
        values = values.repeat(-(-size // values.shape[axis]), axis).take(range(size), axis)
    return values


def test_a_copy_of_experts_loads_as_the_original(tmp_path: Path, mixture: Mixture) -> None:
    path, _, _, given = mixture
    assert run("export", path, tmp_path / "out", *given).exit_code == 0
    assert plan_checkpoint(tmp_path / "out").warnings == ()
    again, wanted = (
        {
            under_nxd(n, nxd_names(plan_checkpoint(p))): t
            for n, t in load_state_dict(p, **under_the_flag(p, given)).items()
        }
        for p in (tmp_path / "out", path)
    )
    assert again.keys() == wanted.keys()
    assert all(same_bytes(again[name], value) for name, value in wanted.items())


def under_nxd(name: str, names: dict[str, str]) -> str:
    """As ``Session.named``, NxD Inference and, for DBRX's experts, ``as_taken`` rename it."""
    name = names.get(name, name).replace(".weight_scale", ".scale").replace("_weight_scale", ".scale")
    return re.sub(r"(\.experts\.mlp\.[wv]\d)\.weight$", r"\1", name)


def test_a_copy_declares_the_blocks_that_experts_keep(tmp_path: Path) -> None:
    """The last block is cut, so that shapes alone do not tell how large they are."""
    head = "model.layers.0.mlp.experts"
    tensors = {}
    for name, rows, columns in (("gate_proj", 200, 320), ("up_proj", 200, 320), ("down_proj", 320, 200)):
        tensors[f"{head}.0.{name}.weight"] = codes(*HOT, shape=(rows, columns))
        tensors[f"{head}.0.{name}.weight_scale_inv"] = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
    path, out = single(tmp_path / "c", tensors), tmp_path / "out"
    declared = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps({"quantization_config": declared}))
    assert run("export", path, out, "--experts", "blockwise").exit_code == 0
    assert {pair.granularity.block for pair in plan_checkpoint(out).pairs} == {(128, 128)}
    assert run_json("verify", out, "--against", path, code=0)["ok"]
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [g["weights"]["strategy"] for g in groups.values()] == ["channel", "block"]


def test_experts_are_for_nxd_inference(tmp_path: Path) -> None:
    path = single(tmp_path / "c", layer(0))
    for args in (("inspect", path), ("verify", path), ("export", path, tmp_path / "out")):
        text = one_line(run(*args, "--experts", "blockwise"))
        assert "has no FP8 experts" in text
        text = one_line(run(*args, "--for", "vllm-neuron", "--experts", "blockwise"))
        assert "is for NxD Inference" in text
