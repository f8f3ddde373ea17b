"""Against the real NxD Inference, on the CPU. Run by test_real_sources.py, in a process of its own: the stand-ins for
Neuron's closed packages that this needs must not be met by any other test."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import neuron_fp8_loader
from neuron_fp8_loader import OptionError
from neuron_fp8_loader.integrations.loading import READERS
from neuron_fp8_loader.tools.export import prepare_export
from neuron_fp8_loader.tools.heads import Heads
from neuron_fp8_loader.tools.settings import settings_for
from tests.integrations.checkpoints import same_for_the_device
from tests.integrations.fused_app import ON, fused
from tests.support import ROOT, SHARED, TINY, ieee_e4m3

sys.path.insert(0, str(SHARED.parent / "nxdi_cpu"))
neuron_fp8_loader.enable()
import harness as H  # noqa: E402

H.install_stubs()
H.quiet()
sys.path.insert(0, str(ROOT / "examples"))

PACKAGE = "neuronx_distributed_inference"
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    neuron_fp8_loader.enable()
    yield
    neuron_fp8_loader.enable()


def finite(state_dict: dict[str, torch.Tensor]) -> bool:
    weights = [t for t in state_dict.values() if t.dtype == FP8]
    assert weights
    return all(bool(torch.isfinite(torch.from_numpy(ieee_e4m3(t))).all()) for t in weights)


def logits(path: Path, *, ieee: bool, **over: Any) -> torch.Tensor:
    result: torch.Tensor = H.run_logits(H.load_on_cpu(H.build_app(path, **over)), ieee=ieee)
    return result


def to_bin(path: Path, *, sharded: bool) -> None:
    """Rewrite a checkpoint as .bin, in one file or in the shards that it has."""
    index = path / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    whole: dict[str, torch.Tensor] = {}
    for file in sorted(set(where.values())):
        part = load_file(path / file)
        whole |= part
        if sharded:
            torch.save(part, path / file.replace("model-", "pytorch_model-").replace(".safetensors", ".bin"))
        (path / file).unlink()
    index.unlink()
    if sharded:
        names = {n: f.replace("model-", "pytorch_model-").replace(".safetensors", ".bin") for n, f in where.items()}
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    else:
        torch.save(whole, path / "pytorch_model.bin")


@pytest.mark.parametrize("flavour", ["channel", "tensor", "static"])
def test_logits(tmp_path: Path, flavour: str) -> None:
    H.make_tiny_checkpoint(tmp_path, flavour=flavour)
    over = H.flavour_overrides(flavour)
    reference = logits(tmp_path, ieee=False, **over)
    off = logits(tmp_path, ieee=True, **over)
    on = logits(tmp_path, ieee=True, **over, **ON)
    assert torch.isfinite(reference).all()
    assert not torch.isfinite(off).any()
    assert torch.equal(on, reference)


@pytest.mark.parametrize("flavour", ["channel_1d", "tensor_scalar", "block"])
def test_scales_that_nxdi_itself_refuses(tmp_path: Path, flavour: str) -> None:
    H.make_tiny_checkpoint(tmp_path, flavour=flavour)
    quantization_type = "per_channel_symmetric" if flavour == "block" else H.QUANT_TYPE[flavour]
    with pytest.raises((RuntimeError, KeyError)):
        logits(tmp_path, ieee=True, quantization_type=quantization_type)
    on = logits(tmp_path, ieee=True, quantization_type=quantization_type, **ON)
    assert torch.isfinite(on).all()


@pytest.mark.parametrize("sharded", [False, True])
def test_bin(tmp_path: Path, sharded: bool) -> None:
    H.make_tiny_checkpoint(tmp_path)
    reference = logits(tmp_path, ieee=False)
    to_bin(tmp_path, sharded=sharded)
    assert not torch.isfinite(logits(tmp_path, ieee=True)).any()
    assert torch.equal(logits(tmp_path, ieee=True, **ON), reference)


@pytest.mark.parametrize("fused", [False, True])
def test_a_filled_in_list_is_what_nxdi_matches(tmp_path: Path, fused: bool) -> None:
    H.make_tiny_checkpoint(tmp_path, bf16_linears=("self_attn",))
    app = H.build_app(tmp_path, fused_qkv=fused, **ON)
    assert app.neuron_config.modules_to_not_convert == ["layers.0.self_attn", "layers.1.self_attn", "lm_head"]
    on = H.run_logits(H.load_on_cpu(app), ieee=True)
    assert sorted(H.quantized_layers(app)) == sorted(
        f"layers.{n}.mlp.{p}" for n in range(2) for p in ("gate_proj", "up_proj", "down_proj")
    )
    given = ["lm_head", "layers.0.self_attn", "layers.1.self_attn"]
    assert torch.equal(on, logits(tmp_path, ieee=False, fused_qkv=fused, modules_to_not_convert=given))


@pytest.mark.parametrize("plain", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "layers.1."])
def test_single_modules_are_left_unquantized(tmp_path: Path, plain: str) -> None:
    # flavours of the harness name linears; a whole layer is all of its linears
    if plain == "layers.1.":
        original = H.make_tiny_checkpoint(tmp_path, layers=2, shards=1)
        from safetensors.torch import save_file

        changed = {}
        for name, t in original.items():
            if "layers.1." in name and name.endswith("_scale"):
                continue
            scale = original.get(name + "_scale")
            convert = "layers.1." in name and scale is not None
            changed[name] = (t.float() * scale).bfloat16() if convert and scale is not None else t
        save_file(changed, tmp_path / "model.safetensors")
        for file in tmp_path.glob("model-*"):
            file.unlink()
        (tmp_path / "model.safetensors.index.json").unlink()
    else:
        H.make_tiny_checkpoint(tmp_path, bf16_linears=(plain,))
    app = H.load_on_cpu(H.build_app(tmp_path, **ON))
    assert torch.isfinite(H.run_logits(app, ieee=True)).all()
    quantized = set(H.quantized_layers(app))
    part = plain.split(".")[-1]
    assert quantized
    if plain == "layers.1.":
        assert all(name.startswith("layers.0.") for name in quantized)
    else:
        assert not any(name.endswith(part) for name in quantized)
        assert len(quantized) == 12


def test_tied_lm_head(tmp_path: Path) -> None:
    H.make_tiny_checkpoint(tmp_path, shards=1)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors")
    file.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    app = H.build_app(tmp_path, **ON)
    assert app.neuron_config.modules_to_not_convert == ["lm_head"]
    assert torch.isfinite(H.run_logits(H.load_on_cpu(app), ieee=True)).all()


@pytest.mark.parametrize("flavour", ["channel", "tensor", "static"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shard_checkpoint(tmp_path: Path, flavour: str, tp: int) -> None:
    H.make_tiny_checkpoint(tmp_path / "model", flavour=flavour)
    over = {
        "tp_degree": tp,
        "on_cpu": False,
        "torch_dtype": "bfloat16",
        "save_sharded_checkpoint": True,
        **H.flavour_overrides(flavour),
    }
    off = H.shard_on_cpu(H.build_app(tmp_path / "model", **over), tmp_path / "off")
    on = H.shard_on_cpu(H.build_app(tmp_path / "model", **over, **ON), tmp_path / "on")
    assert len(on) == tp
    for before, after in zip(off, on, strict=True):
        names = [name for name, t in before.items() if t.dtype == FP8]
        assert len(names) == 14
        assert not finite(before)
        for name in names:
            assert int((after[name].view(torch.uint8) & 0x7F).max()) <= 0x77
            scale = name.removesuffix("weight") + "scale"
            assert torch.equal(before[name].float() * before[scale], after[name].float() * after[scale])


def test_draft_and_target(tmp_path: Path) -> None:
    app, originals = fused(tmp_path)
    loaded = app.checkpoint_loader_fn()
    assert finite(loaded)
    for prefix, original in originals.items():
        mine = {name.replace(prefix, ""): t for name, t in loaded.items() if name.startswith(prefix)}
        assert same_for_the_device(mine, original, exact=True)


def test_draft_and_target_have_lists_of_their_own(tmp_path: Path) -> None:
    app, _ = fused(tmp_path)
    assert app.neuron_config.modules_to_not_convert == ["lm_head"]
    draft = app.config.fused_spec_config.draft_config.neuron_config
    assert draft.modules_to_not_convert == ["layers.0.mlp", "layers.1.mlp", "lm_head"]
    app.config.save(tmp_path / "compiled")
    back = type(app.config).load(str(tmp_path / "compiled"))
    assert back.neuron_config.fp8_rescale is True
    assert back.fused_spec_config.draft_config.neuron_config.fp8_rescale is True
    assert back.fused_spec_config.draft_config.neuron_config.modules_to_not_convert == draft.modules_to_not_convert


def test_draft_and_target_sharded(tmp_path: Path) -> None:
    app, _ = fused(tmp_path, on_cpu=False, torch_dtype="bfloat16", tp_degree=2, save_sharded_checkpoint=True)
    app.enable_fused_spec()
    ranks = H.shard_on_cpu(app, tmp_path / "out")
    for rank in ranks:
        for prefix, count in (("draft_model.", 8), ("target_model.", 14)):
            mine = {name: t for name, t in rank.items() if name.startswith(prefix) and t.dtype == FP8}
            assert len(mine) == count
            assert finite(mine)


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    original = H.make_tiny_checkpoint(tmp_path)
    torch.save(original, tmp_path / "quantized.pt")
    app = H.build_app(tmp_path, **ON)
    loaded = type(app).get_state_dict(str(tmp_path / "quantized.pt"), app.config)
    assert finite(loaded)
    assert same_for_the_device(loaded, original, exact=True)


def test_inside_init_on_device_meta(tmp_path: Path) -> None:
    from neuronx_distributed.utils.model_utils import init_on_device

    original = H.make_tiny_checkpoint(tmp_path)
    app = H.build_app(tmp_path, **ON)
    with init_on_device(torch.device("meta"), force_custom_init_on_device=True):
        loaded = app.checkpoint_loader_fn()
    assert same_for_the_device(loaded, original, exact=True)


def moe(**flag: Any) -> tuple[Path, dict[str, Any]]:
    path = SHARED / "ct_fp8_dynamic_moe"
    if not path.is_dir():
        pytest.skip("no shared checkpoint ct_fp8_dynamic_moe")
    return path, {"fp8_rescale": flag or True, "config_kwargs": {"num_experts": 4}}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_moe_experts_as_bfloat16(tp: int) -> None:
    import families

    path, given = moe(dequantize=["*.experts.*"])
    ranks = families.shards("qwen3_moe", path, tp, **given)
    original = load_file(path / "model.safetensors")

    def exact(name: str) -> torch.Tensor:
        return (original[f"{name}.weight"].float() * original[f"{name}.weight_scale"].float()).bfloat16()

    for layer in range(2):
        place = f"layers.{layer}.mlp.expert_mlps.mlp_op"
        gates = [r[f"{place}.gate_up_proj.weight"].chunk(2, 2) for r in ranks]
        gate, up = (torch.cat([g[k] for g in gates], 2) for k in (0, 1))
        down = torch.cat([r[f"{place}.down_proj.weight"] for r in ranks], 1)
        for e in range(4):
            for got, projection in ((gate, "gate_proj"), (up, "up_proj"), (down, "down_proj")):
                assert torch.equal(got[e].T, exact(f"model.layers.{layer}.mlp.experts.{e}.{projection}"))
        assert ranks[0][f"layers.{layer}.self_attn.o_proj.o_proj.weight"].dtype == FP8


@pytest.mark.parametrize("built", [False, True])
def test_a_layer_that_nxd_does_not_quantize_gets_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: bool
) -> None:
    """Its class decides, which no list and no name tells."""
    from neuronx_distributed.parallel_layers.layers import RowParallelLinear
    from neuronx_distributed_inference.models.llama import modeling_llama

    class Plain(RowParallelLinear):  # type: ignore[misc]
        """Not in NxD's table of quantized layers."""

    monkeypatch.setattr(modeling_llama, "RowParallelLinear", Plain)
    original = H.make_tiny_checkpoint(tmp_path / "m", flavour="block")
    over: dict[str, Any] = {
        "on_cpu": False,
        "torch_dtype": "bfloat16",
        "save_sharded_checkpoint": True,
        "tp_degree": 2,
    }
    app = H.build_app(tmp_path / "m", **over, **ON)
    if built:
        ranks = H.shard_on_cpu(app, tmp_path / "out")
        got = torch.cat([r["layers.0.mlp.down_proj.weight"] for r in ranks], 1)
        assert ranks[0]["layers.0.mlp.gate_proj.weight"].dtype == FP8
    else:
        monkeypatch.setenv("NXD_CPU_MODE", "0")  # as where there is a device; else NxD wants real process groups
        got = app.checkpoint_loader_fn()["layers.0.mlp.down_proj.weight"]
    name = "model.layers.0.mlp.down_proj.weight"
    scale = original[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(got, (original[name].float() * scale).bfloat16())


def test_every_neuron_config_takes_the_flag() -> None:
    from neuronx_distributed_inference import models
    from neuronx_distributed_inference.models.config import NeuronConfig

    for info in pkgutil.walk_packages(models.__path__, models.__name__ + "."):
        if "modeling" in info.name and "experimental" not in info.name:
            try:
                importlib.import_module(info.name)
            except Exception:  # some want packages that are not stubbed
                continue

    def below(kind: type) -> list[type]:
        return [kind, *(sub for direct in kind.__subclasses__() for sub in below(direct))]

    kinds = set(below(NeuronConfig))
    assert len(kinds) >= 8
    for kind in kinds:
        assert kind(fp8_rescale="ratio").fp8_rescale == "ratio", kind  # type: ignore[call-arg,attr-defined]
        with pytest.raises(OptionError, match="fp8_rescale"):
            kind(fp8_rescale="treble")  # type: ignore[call-arg]


def test_config_round_trip_and_errors(tmp_path: Path) -> None:
    H.make_tiny_checkpoint(tmp_path / "model", bf16_linears=("self_attn",))
    options = {"method": "ratio", "threads": 1}
    config = H.build_config(tmp_path / "model", fp8_rescale=options, modules_to_not_convert=None)
    config.save(tmp_path / "compiled")
    back = type(config).load(str(tmp_path / "compiled"))
    assert back.neuron_config.fp8_rescale == options
    assert back.neuron_config.modules_to_not_convert == config.neuron_config.modules_to_not_convert
    with pytest.raises(OptionError, match='write quantization_dtype="f8e4m3"'):
        H.build_config(tmp_path / "model", **{**ON, "quantization_dtype": "f8e4m3fn"})
    with pytest.raises(OptionError, match=r"not listed: model\.layers\.0\.self_attn\.q_proj"):
        H.build_config(tmp_path / "model", fp8_rescale=True)  # the harness gives ["lm_head"]


def test_the_compiler_flag_is_there(tmp_path: Path) -> None:
    H.make_tiny_checkpoint(tmp_path)
    app = H.build_app(tmp_path, **ON)
    assert app.models
    assert all("fp8e4m3fn-as-fp8e4m3" in wrapper.compiler_args for wrapper in app.models)


def test_save_quantized_state_dict_writes_nothing(tmp_path: Path) -> None:
    H.make_tiny_checkpoint(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    app = H.build_app(tmp_path, **ON)
    type(app).save_quantized_state_dict(str(tmp_path), app.config)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_names_and_files_that_are_left_alone() -> None:
    base = importlib.import_module(f"{PACKAGE}.models.application_base")
    checkpoint = importlib.import_module(f"{PACKAGE}.modules.checkpoint")
    assert base.load_file is load_file
    assert checkpoint.load_file is load_file
    for name in ("load_state_dict", "_torch_load", "_load_from_files"):
        assert not hasattr(getattr(checkpoint, name), "__wrapped__")


def test_disable_restores_every_name(tmp_path: Path) -> None:
    base = importlib.import_module(f"{PACKAGE}.models.application_base").NeuronApplicationBase
    config = importlib.import_module(f"{PACKAGE}.models.config")
    checkpoint = importlib.import_module(f"{PACKAGE}.modules.checkpoint")

    def wrapped() -> list[bool]:
        functions = [vars(checkpoint)[name] for name in READERS]
        functions += [vars(base)[n] for n in ("get_state_dict", "checkpoint_loader_fn", "save_quantized_state_dict")]
        functions += [vars(config.NeuronConfig)["__init__"], vars(config.FusedSpecNeuronConfig)["__init__"]]
        return [hasattr(getattr(f, "__func__", f), "__wrapped__") for f in functions]

    assert all(wrapped())
    neuron_fp8_loader.disable()
    assert not any(wrapped())
    H.make_tiny_checkpoint(tmp_path)
    app = H.build_app(tmp_path, fp8_rescale=True)
    assert not hasattr(app.neuron_config, "fp8_rescale")
    assert not finite(app.checkpoint_loader_fn())
    neuron_fp8_loader.enable()  # now after the import
    assert all(wrapped())
    assert finite(H.build_app(tmp_path, **ON).checkpoint_loader_fn())


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("tp", ["1", "2"])
def test_model_builder_examples(tmp_path: Path, version: str, tp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from neuronx_distributed.parallel_layers import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    monkeypatch.setenv("NXD_CPU_MODE", "0")
    importlib.import_module(f"model_builder_{version}").main(str(TINY), str(tmp_path), tp)
    original = load_file(TINY / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    shards = [load_file(tmp_path / f"tp{rank}_sharded_checkpoint.safetensors") for rank in range(int(tp))]
    whole = {f"layers.0.mlp.{part}": torch.cat([s[part].float() for s in shards]) for part in ("gate_proj.scale",)}
    whole["layers.0.mlp.gate_proj.weight"] = torch.cat([s["gate_proj.weight"].view(torch.uint8) for s in shards]).view(
        FP8
    )
    assert finite(whole)
    mine = {key: original[key] for key in (name, name + "_scale")}
    assert same_for_the_device(whole, mine)


def test_nxd_inference_example(tmp_path: Path) -> None:
    original = H.make_tiny_checkpoint(tmp_path)
    app = importlib.import_module("nxd_inference").build(str(tmp_path), on_cpu=True)
    assert app.neuron_config.modules_to_not_convert == ["lm_head"]
    assert same_for_the_device(app.checkpoint_loader_fn(), original, exact=True)


@pytest.mark.parametrize(
    "name", ["hf_fp8_block", "ct_fp8_dynamic", "modelopt_fp8", "torchao_fp8_wo", "derived_split_shards"]
)
def test_a_copy_needs_neither_flag_nor_hook(tmp_path: Path, name: str) -> None:
    """``export --for nxd``: bit for bit the logits that the original gives under the flag."""
    path, out = SHARED / name, tmp_path / "out"
    wanted = logits(path, ieee=True, **settings_for(path).neuron_config)
    prepare_export(path, out, stack="nxd").run()
    keywords = settings_for(out).neuron_config
    del keywords["fp8_rescale"]
    neuron_fp8_loader.disable()
    assert torch.equal(logits(out, ieee=True, **keywords), wanted)
    assert bool(wanted.isfinite().all())


@pytest.mark.parametrize(
    ("flavour", "heads", "tp"),
    [("channel", (4, 2), 3), ("channel", (6, 2), 4), ("channel", (4, 2), 8), ("channel", (8, 4), 6),
     ("tensor", (4, 4), 3), ("tensor", (4, 4), 8), ("tensor", (4, 2), 3), ("block", (4, 4), 3)],
)  # fmt: skip
def test_which_degrees_are_sharded(tmp_path: Path, flavour: str, heads: tuple[int, int], tp: int) -> None:
    path, out = tmp_path / "c", tmp_path / "out"
    H.make_tiny_checkpoint(path, 0, flavour, layers=1, heads=heads[0], kv_heads=heads[1])
    config = settings_for(path).neuron_config
    if not Heads(*heads).is_sharded(tp):
        with pytest.raises(OptionError, match="neither divide"):
            settings_for(path, tp_degree=tp)
        with pytest.raises(RuntimeError):  # what NxD says of it
            H.shard_on_cpu(H.build_app(path, **config, tp_degree=tp), out)
        return
    if Heads(*heads).pads_scales(tp) and flavour == "tensor":
        with pytest.raises(RuntimeError):
            H.shard_on_cpu(H.build_app(path, **config, tp_degree=tp), out)
    H.shard_on_cpu(H.build_app(path, **settings_for(path, tp_degree=tp).neuron_config), out)
