"""Static FP8 Llamas stay FP8: half instead of 240/448, and scales that grow with the range of the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch

from neuron_fp8_loader import OptionError, WeightError, neuron_view
from neuron_fp8_loader.integrations.vllm_neuron.flag import ENV
from tests.integrations.vllm_neuron_standin import SHAPES, Hub, Plugin, static_llama, vocabulary
from tests.support import blob, e4m3fn, halved, ieee_e4m3, random_codes, same_bytes, shared

STATIC = ["modelopt_fp8", "modelopt_fp8_kv", "ct_fp8_static", "ct_fp8_static_kv", "quark_fp8_tensor_kv"]
Q = "model.layers.0.self_attn.q_proj"
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8",
            "exclude_modules": ["lm_head"]}  # fmt: skip


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def shard(weight: torch.Tensor, dim: int, rank: int, tp: int) -> torch.Tensor:
    return weight.view(torch.uint8).chunk(tp, dim)[rank].contiguous().view(weight.dtype)


def column(scale: torch.Tensor, factor: float = 1) -> torch.Tensor:
    return (scale.reshape(1, -1) * factor).float().expand(128, scale.numel())


def check_layer(layer: Any, before: dict[str, torch.Tensor], at: str, rank: int, tp: int, kv_heads: int) -> None:
    """A layer on the device's side of the loader, against the checkpoint's bytes."""

    def there(module: str, what: str) -> torch.Tensor:
        return before[f"{at}.{module}.{what}"]

    kv_tp = min(tp, kv_heads)
    kv_rank = rank // (tp // kv_tp)
    parts = [
        shard(there(f"self_attn.{m}_proj", "weight"), 0, *((rank, tp) if m == "q" else (kv_rank, kv_tp)))
        for m in "qkv"
    ]
    qkv = torch.cat([part.view(torch.uint8) for part in parts]).T.contiguous().view(torch.float8_e4m3fn)
    expected = {
        (layer.self_attn, "qkv_proj_weight"): qkv,
        (layer.self_attn, "o_proj_weight"): shard(there("self_attn.o_proj", "weight"), 1, rank, tp).T.contiguous(),
        (layer.mlp, "down_proj_weight"): shard(there("mlp.down_proj", "weight"), 1, rank, tp).T.contiguous(),
        **{
            (layer.mlp, f"{m}_proj_weight"): shard(there(f"mlp.{m}_proj", "weight"), 0, rank, tp).T.contiguous()
            for m in ("gate", "up")
        },
    }
    for (owner, name), codes in expected.items():
        got = getattr(owner, name).data
        assert same_bytes(got, halved(codes)), f"{at} {name}"
        assert np.isfinite(ieee_e4m3(got)).all()
    qkv_scales = torch.stack([there(f"self_attn.{m}_proj", "weight_scale").float().reshape(()) for m in "qkv"])
    assert torch.equal(layer.self_attn.qkv_weight_scale, column(qkv_scales, 2))
    one_each = {"o": ("self_attn.o_proj", layer.self_attn)} | {
        m: (f"mlp.{m}_proj", layer.mlp) for m in ("gate", "up", "down")
    }
    for name, (module, owner) in one_each.items():
        assert torch.equal(getattr(owner, f"{name}_weight_scale"), column(there(module, "weight_scale"), 2))
    inputs = [there(f"self_attn.{m}_proj", "input_scale").float() for m in "qkv"]
    assert torch.equal(layer.self_attn.qkv_input_scale, column(torch.stack(inputs).max(), 2))
    assert torch.equal(layer.self_attn.o_input_scale, column(there("self_attn.o_proj", "input_scale"), 2))
    both = torch.stack([there(f"mlp.{m}_proj", "input_scale").float() for m in ("gate", "up")])
    assert torch.equal(layer.mlp.gate_up_input_scale, column(both.max(), 2))
    assert torch.equal(layer.mlp.down_input_scale, column(there("mlp.down_proj", "input_scale"), 2))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", STATIC)
def test_real_checkpoints(plugin: Plugin, name: str, tp: int) -> None:
    path = shared(name)
    config = json.loads((path / "config.json").read_text())
    before, heads = tensors_of(path), config["num_key_value_heads"]
    if config["num_attention_heads"] % tp:
        pytest.skip(f"this one, cut, has {config['num_attention_heads']} heads")
    for rank in range(tp):
        model = plugin.load(path, quantization="neuron_fp8", rank=rank, tp=tp, cache_dtype="fp8")
        for number, layer in enumerate(model.model.layers):
            check_layer(layer, before, f"model.layers.{number}", rank, tp, heads)
            for which in "kv":
                names = (f"{which}_scale", f"{which}_proj.{which}_scale", f"{which}_proj.output_scale")
                there = [before[n] for s in names if (n := f"model.layers.{number}.self_attn.{s}") in before]
                value = 1.0 / (2 * there[0]).bfloat16() if there else torch.ones(())
                assert torch.equal(getattr(layer.self_attn, f"{which}_scale"), value.reshape(1, 1).bfloat16())
        assert not [key for key in model.result.unexpected_keys if "scale" in key]
        assert blob(model.lm_head.weight.data) == blob(before["lm_head.weight"])


def projections(seed: int = 0, *, scale: str = "weight_scale", **more: str) -> dict[str, torch.Tensor]:
    """Random codes up to 448, and scales under names of one's own: ``input="activation_scale"``."""
    rng = np.random.default_rng(seed)
    found: dict[str, torch.Tensor] = {}
    for number, (module, shape) in enumerate(SHAPES.items()):
        at = f"model.layers.0.{module}"
        found[f"{at}.weight"] = random_codes(shape, seed + number)
        found[f"{at}.{scale}"] = torch.tensor(rng.uniform(1e-3, 1e-2), dtype=torch.float32)
        if more.get("input", "input_scale"):
            found[f"{at}.{more.get('input', 'input_scale')}"] = torch.tensor(rng.uniform(1e-2, 1e-1)).float()
    return found | vocabulary()


CONFIGS = {
    "modelopt": MODELOPT,
    "modelopt, nested, no FP8 cache": {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}},
    "AutoFP8": {"quant_method": "fp8", "activation_scheme": "static"},
    "nothing": None,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_other_producers(plugin: Plugin, tmp_path: Path, config: dict[str, Any] | None) -> None:
    """Unequal input scales of q, k and v become the largest of them, which the plugin's own check wants equal."""
    before = projections()
    path = static_llama(tmp_path, before, {"quantization_config": config} if config else {})
    model = plugin.load(path, quantization="neuron_fp8")
    check_layer(model.model.layers[0], before, "model.layers.0", 0, 1, 1)


def test_scales_of_other_names(plugin: Plugin, tmp_path: Path) -> None:
    before = projections(scale="weight_scale_inv", input="activation_scale")
    path = static_llama(tmp_path, before, {"quantization_config": CONFIGS["AutoFP8"]})
    model = plugin.load(path, quantization="neuron_fp8")
    names = {"weight_scale_inv": "weight_scale", "activation_scale": "input_scale"}
    usual = {n.replace(part, names[part]) if (part := n.split(".")[-1]) in names else n: t for n, t in before.items()}
    check_layer(model.model.layers[0], usual, "model.layers.0", 0, 1, 1)


@pytest.mark.parametrize("spelling", ["k_scale", "k_proj.k_scale", "k_proj.output_scale", "kv_scale", "k_cache.scale"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_spellings_of_kv_scales(plugin: Plugin, tmp_path: Path, spelling: str, shape: tuple[int, ...]) -> None:
    before = projections()
    for which, value in (("k", 0.125), ("v", 0.25)):
        name = (
            f"model.layers.0.self_attn.{spelling.replace('k_', f'{which}_') if spelling != 'kv_scale' else spelling}"
        )
        before[name] = torch.full(shape, value)
    path = static_llama(tmp_path, before, {"quantization_config": MODELOPT})
    model = plugin.load(path, quantization="neuron_fp8", cache_dtype="fp8")
    attention = model.model.layers[0].self_attn
    values = (0.25, 0.25) if spelling == "kv_scale" else (0.125, 0.25)
    assert [attention.k_scale.item(), attention.v_scale.item()] == [1 / (2 * v) for v in values]


@pytest.mark.parametrize(("how", "reason"), [
    ("mixed", "self_attn.o_proj is not float8_e4m3fn"), ("rows", "mlp.up_proj has one scale per row"),
    ("dynamic", "self_attn.q_proj has no input scale"), ("asked", "the flag asks for it"),
])  # fmt: skip
def test_what_the_static_layers_cannot_take_becomes_bfloat16(
    plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    how: str, reason: str,
) -> None:  # fmt: skip
    before = projections(input="" if how == "dynamic" else "input_scale")
    if how == "mixed":
        before["model.layers.0.self_attn.o_proj.weight"] = torch.zeros(SHAPES["self_attn.o_proj"]).bfloat16()
    if how == "rows":
        before["model.layers.0.mlp.up_proj.weight_scale"] = torch.full((256, 1), 0.01)
    if how == "asked":
        monkeypatch.setenv(ENV, '{"dequantize": ["*"]}')
    path = static_llama(tmp_path, before, {"quantization_config": MODELOPT})
    caplog.set_level("INFO")
    model = plugin.load(path, quantization="neuron_fp8")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [r.message for r in caplog.records if "bfloat16" in r.message and reason in r.message]
    up, scale = (before[f"model.layers.0.mlp.up_proj.{what}"] for what in ("weight", "weight_scale"))
    assert torch.equal(model.model.layers[0].mlp.up_proj_weight, (up.double() * scale.double()).float().bfloat16().T)


def test_on_trn3_the_bytes_stay(plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn3")
    before = projections()
    for m in "kv":
        before[f"model.layers.0.self_attn.{m}_proj.input_scale"] = before[
            "model.layers.0.self_attn.q_proj.input_scale"
        ]
        before[f"model.layers.0.self_attn.{m}_scale"] = torch.tensor(0.5)
    before = {name: tensor.clone() for name, tensor in before.items()}
    path = static_llama(tmp_path, before, {"quantization_config": CONFIGS["AutoFP8"]})
    config = plugin.configure(path, quantization="neuron_fp8", cache_dtype="fp8")
    runner = plugin.worker(config).load_model()
    layer = runner.model.model.layers[0]
    assert runner.compiler_args == []
    o = before["model.layers.0.self_attn.o_proj.weight"]
    assert same_bytes(layer.self_attn.o_proj_weight.data, o.T.contiguous())
    assert torch.equal(layer.self_attn.o_weight_scale, column(before["model.layers.0.self_attn.o_proj.weight_scale"]))
    assert torch.equal(layer.self_attn.o_input_scale, column(before["model.layers.0.self_attn.o_proj.input_scale"]))
    assert layer.self_attn.k_scale.item() == 2


def test_without_the_flag_the_plugin_does_as_it_does(plugin: Plugin, tmp_path: Path) -> None:
    """Its own 240/448, which re-rounds nearly every weight; and the compiler's flag in either case."""
    before = projections()
    for m in "kv":
        before[f"model.layers.0.self_attn.{m}_proj.input_scale"] = before[f"{Q}.input_scale"].clone()
    path = static_llama(tmp_path, before, {"quantization_config": MODELOPT})
    args = []
    for quantization in (None, "neuron_fp8"):
        runner = plugin.worker(plugin.configure(path, quantization=quantization)).load_model()
        got = runner.model.model.layers[0].mlp.down_proj_weight.data
        down = before["model.layers.0.mlp.down_proj.weight"].T.contiguous()
        ratio = (down.float() * (240 / 448)).clamp(-240, 240).to(torch.float8_e4m3fn)
        assert same_bytes(got, ratio if quantization is None else halved(down))
        args.append(runner.compiler_args)
    assert args[0] == args[1] != []


def test_a_checkpoint_that_is_not_what_it_declares_is_an_error(plugin: Plugin, tmp_path: Path) -> None:
    """One from a hub goes by its config: what the static layers then cannot take is refused when it is read."""
    before = projections()
    before["model.layers.0.self_attn.o_proj.weight_scale"] = torch.full((128, 1), 0.01)
    path = static_llama(tmp_path / "model", before, {"quantization_config": MODELOPT})
    Hub(path, tmp_path / "cache", plugin)
    with pytest.raises(OptionError, match=r"o_proj\.weight: one scale per row.*dequantize"):
        plugin.load("org/model", config_from=str(path), quantization="neuron_fp8")


# -- a forward through the static layers, in a reference of our own ------------------------------------------------


def static_linear(
    x: np.ndarray, weight: np.ndarray, weight_scale: float, input_scale: float, top: float
) -> np.ndarray:
    """What the static kernels compute: inputs to FP8 by a scale, cut at ``top``, times FP8 weights, times both."""
    grid = ml_dtypes.float8_e4m3 if top == 240 else ml_dtypes.float8_e4m3fn
    codes = np.clip(x / input_scale, -top, top).astype(grid).astype(np.float64)
    return codes @ weight * (weight_scale * input_scale)


@pytest.mark.parametrize("name", ["modelopt_fp8_kv", "ct_fp8_static", "quark_fp8_tensor_kv"])
def test_a_forward_on_the_device(plugin: Plugin, name: str) -> None:
    """An MLP and an output projection, bytes read as IEEE e4m3: with the flag what a GPU computes, without it nan.

    Both quantize inputs to the same values, but for those below the smallest normal one.
    """
    path = shared(name)
    before = tensors_of(path)
    layer = plugin.load(path, quantization="neuron_fp8").model.layers[0]
    rng = np.random.default_rng(0)
    at = "model.layers.0"

    def gpu(x: np.ndarray, module: str) -> np.ndarray:
        scales = [before[f"{at}.{module}.{s}"].double().item() for s in ("weight_scale", "input_scale")]
        return static_linear(x, e4m3fn(before[f"{at}.{module}.weight"]).T, *scales, 448)

    def device(x: np.ndarray, module: str, read: Any = ieee_e4m3) -> np.ndarray:
        owner, short = (layer.self_attn, "o") if "o_proj" in module else (layer.mlp, module[4:-5])
        shared_input = "gate_up" if short in ("gate", "up") else short
        scales = [getattr(owner, f"{n}_scale")[0, 0].item() for n in (f"{short}_weight", f"{shared_input}_input")]
        return static_linear(x, read(getattr(owner, f"{short}_proj_weight").data), *scales, 240)

    def mlp(linear: Any, x: np.ndarray) -> np.ndarray:
        gate, up = linear(x, "mlp.gate_proj"), linear(x, "mlp.up_proj")
        return linear(gate / (1 + np.exp(-gate)) * up, "mlp.down_proj")

    for run, width in (
        (mlp, before[f"{at}.mlp.gate_proj.weight"].shape[1]),
        (lambda linear, x: linear(x, "self_attn.o_proj"), before[f"{at}.self_attn.o_proj.weight"].shape[1]),
    ):
        x = rng.standard_normal((8, width))
        want, got = run(gpu, x), run(device, x)
        assert np.isfinite(got).all()
        assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()
    codes = before[f"{at}.mlp.gate_proj.weight"]
    assert torch.isnan(neuron_view(codes)).any()  # as they are on disk
    with np.errstate(invalid="ignore"):
        raw = static_linear(rng.standard_normal((8, codes.shape[1])), ieee_e4m3(codes).T, 1.0, 1.0, 240)
    assert not np.isfinite(raw).all()


def test_a_forward_against_transformers(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits from what the plugin's parameters hold, FP8 bytes read as IEEE e4m3, against transformers' own Llama on
    the dequantized weights; and nan from the checkpoint's bytes."""
    transformers = pytest.importorskip("transformers")
    from tests.support import ROOT

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import tiny_llama

    path = shared("modelopt_fp8_kv")
    config = json.loads((path / "config.json").read_text())
    before, ids = tensors_of(path), torch.arange(24) * 7 % config["vocab_size"]
    dequantized = {
        n: t.float() * before[f"{n}_scale"].float() if t.dtype == torch.float8_e4m3fn else t.float()
        for n, t in before.items()
        if not n.endswith("_scale")
    }
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype", "dtype")}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**plain)).eval()
    llama.load_state_dict(dequantized)
    with torch.no_grad():
        want = llama(ids[None]).logits[0]
    model = plugin.load(path, quantization="neuron_fp8")
    got = tiny_llama.logits(_hf_names(model, config), config, ids, neuron_view)
    assert (got - want).abs().max() < 1e-3 * want.abs().max()
    assert tiny_llama.logits(before, config, ids, neuron_view).isnan().any()


def _hf_names(model: Any, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict that the plugin's parameters stand for."""
    found = {n: p.data for n, p in model.named_parameters() if n.endswith(".weight")}
    heads, size = config["num_attention_heads"], config.get("head_dim") or 64
    for number, layer in enumerate(model.model.layers):
        at = f"model.layers.{number}"
        sizes = [heads * size, *[config["num_key_value_heads"] * size] * 2]
        for m, part, scale in zip(
            "qkv",
            layer.self_attn.qkv_proj_weight.data.view(torch.uint8).split(sizes, 1),
            layer.self_attn.qkv_weight_scale[0],
            strict=True,
        ):
            found[f"{at}.self_attn.{m}_proj.weight"] = part.T.contiguous().view(torch.float8_e4m3fn)
            found[f"{at}.self_attn.{m}_proj.weight_scale"] = scale
        for owner, at_module, names in (
            (layer.self_attn, "self_attn", "o"),
            (layer.mlp, "mlp", ("gate", "up", "down")),
        ):
            for m in names:
                weight = getattr(owner, f"{m}_proj_weight").data
                found[f"{at}.{at_module}.{m}_proj.weight"] = weight.view(torch.uint8).T.contiguous().view(weight.dtype)
                found[f"{at}.{at_module}.{m}_proj.weight_scale"] = getattr(owner, f"{m}_weight_scale")[0]
    return found


def test_nan_codes_stop_the_load(plugin: Plugin, tmp_path: Path) -> None:
    before = projections()
    before["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[5, 5] = 0xFF
    path = static_llama(tmp_path, before, {"quantization_config": MODELOPT})
    with pytest.raises(WeightError, match=r"up_proj\.weight: 1 NaN codes"):
        plugin.load(path, quantization="neuron_fp8")
