"""All the ways by which NxD Inference reads a checkpoint, with the flag and without."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import neuron_fp8_loader
from neuron_fp8_loader import Fp8LoaderError, OptionError, WeightError
from neuron_fp8_loader.codes.device import PLATFORM_ENV
from tests.integrations.apps import app_for, config_for
from tests.integrations.checkpoints import FORMS, product, same_for_the_device, state_dict, write
from tests.integrations.conftest import Standin
from tests.support import e4m3fn, ieee_e4m3, raw, sqnr

FP8 = torch.float8_e4m3fn


def finite(loaded: dict[str, torch.Tensor]) -> bool:
    return all(np.isfinite(ieee_e4m3(t)).all() for t in loaded.values() if t.dtype == FP8)


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(t.dtype == b[n].dtype and (raw(t) == raw(b[n])).all() for n, t in a.items())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_with_the_flag_and_without(enabled: Standin, tmp_path: Path, form: str) -> None:
    original = state_dict()
    path = write(tmp_path, original, form)
    loaded = app_for(enabled, path).checkpoint_loader_fn()
    assert finite(loaded)
    assert same_for_the_device(loaded, original)
    off = app_for(enabled, path, fp8_rescale=False).checkpoint_loader_fn()
    assert not finite(off)
    names = {n: n.removeprefix("model.").replace(".weight_scale", ".scale") for n in original}
    assert same_bytes(off, {names[n]: t for n, t in original.items()})


@pytest.mark.parametrize("form", FORMS)
def test_ratio(enabled: Standin, tmp_path: Path, form: str) -> None:
    original = state_dict()
    loaded = app_for(enabled, write(tmp_path, original, form), fp8_rescale="ratio").checkpoint_loader_fn()
    assert finite(loaded)
    name = "layers.0.mlp.down_proj"
    new, old = loaded[f"{name}.scale"], original[f"model.{name}.weight_scale"]
    np.testing.assert_allclose(new.numpy(), old.numpy() * 448 / 240, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_enable_alone_alters_no_load(nxdi: Standin, tmp_path: Path, form: str) -> None:
    path = write(tmp_path, state_dict(), form)
    before = app_for(nxdi, path, fp8_rescale=False).checkpoint_loader_fn()
    neuron_fp8_loader.enable()
    config = config_for(nxdi, path)
    del config.neuron_config.fp8_rescale
    assert same_bytes(nxdi.application.NeuronApplicationBase.get_state_dict(path, config), before)


def test_names_bound_before_enable(nxdi: Standin, tmp_path: Path) -> None:
    bound = nxdi.checkpoint.load_state_dict, nxdi.application.load_state_dict
    neuron_fp8_loader.enable()
    assert (nxdi.checkpoint.load_state_dict, nxdi.application.load_state_dict) == bound
    original = state_dict()
    assert same_for_the_device(app_for(nxdi, write(tmp_path, original)).checkpoint_loader_fn(), original)


def test_load_state_dict_by_itself_is_as_ever(enabled: Standin, tmp_path: Path) -> None:
    # create_n_layer_checkpoint, a vision tower that wants one tensor: no flag there to go by
    original = state_dict()
    assert same_bytes(enabled.checkpoint.load_state_dict(write(tmp_path, original)), original)


@pytest.mark.parametrize("flags", [(True, True), (True, False), (False, True)], ids=str)
def test_draft_and_target_each_by_its_own_flag(enabled: Standin, tmp_path: Path, flags: tuple[bool, bool]) -> None:
    originals = {"draft_model.": state_dict(1), "target_model.": state_dict(2)}
    draft, target = (write(tmp_path / prefix, tensors) for prefix, tensors in originals.items())
    config = config_for(enabled, target, enable_fused_speculation=True, fp8_rescale=flags[1])
    draft_config = copy.deepcopy(config)
    draft_config.neuron_config.fp8_rescale = flags[0]
    config.fused_spec_config = enabled.config.FusedSpecNeuronConfig(
        enabled.application.NeuronApplicationBase, draft_config, draft
    )

    class App(enabled.application.NeuronApplicationBase):  # type: ignore[name-defined,misc]
        pass

    loaded = App(target, config).checkpoint_loader_fn()
    for (prefix, original), flag in zip(originals.items(), flags, strict=True):
        mine = {name: t for name, t in loaded.items() if name.startswith(prefix)}
        assert finite(mine) is flag
        if flag:
            assert same_for_the_device(mine, original, prefix)


def test_a_path_that_is_a_file(enabled: Standin, tmp_path: Path) -> None:
    original = state_dict()
    torch.save(original, tmp_path / "quantized.pt")
    loaded = app_for(enabled, str(tmp_path / "quantized.pt")).checkpoint_loader_fn()
    assert finite(loaded)
    assert same_for_the_device(loaded, original)


def test_a_hf_model(enabled: Standin, tmp_path: Path) -> None:
    original = state_dict()

    class App(enabled.application.NeuronApplicationBase):  # type: ignore[name-defined,misc]
        @staticmethod
        def load_hf_model(model_path: str) -> Any:
            return type("Model", (), {"state_dict": lambda self: {n: t.clone() for n, t in original.items()}})()

    loaded = App.get_state_dict("somebody/a-model", config_for(enabled, "somebody/a-model"))
    assert same_for_the_device(loaded, original)


def test_conversion_sees_weights_that_are_ready(enabled: Standin, tmp_path: Path) -> None:
    seen: list[bool] = []

    class App(enabled.application.NeuronApplicationBase):  # type: ignore[name-defined,misc]
        @staticmethod
        def convert_hf_to_neuron_state_dict(state_dict: dict[str, Any], config: Any) -> dict[str, Any]:
            seen.append(finite(state_dict))
            return state_dict

    directory = write(tmp_path, state_dict())
    torch.save(state_dict(), tmp_path / "file.pt")
    for path in (directory, str(tmp_path / "file.pt")):
        App.get_state_dict(path, config_for(enabled, path))
    assert seen == [True, True]


def test_an_own_get_state_dict_is_covered_too(enabled: Standin, tmp_path: Path) -> None:
    original = state_dict()
    path = write(tmp_path, original)
    Base = enabled.application.NeuronApplicationBase
    load_state_dict = enabled.checkpoint.load_state_dict

    class Polite(Base):  # type: ignore[misc,valid-type]
        @classmethod
        def get_state_dict(cls, model_name_or_path: str, config: Any) -> Any:
            return {**super().get_state_dict(model_name_or_path, config), "more": torch.ones(1)}

    class Direct(Base):  # type: ignore[misc,valid-type]
        @classmethod
        def get_state_dict(cls, model_name_or_path: str, config: Any) -> Any:
            return load_state_dict(model_name_or_path)

    class Stubborn(Base):  # type: ignore[misc,valid-type]
        @classmethod
        def get_state_dict(cls, model_name_or_path: str, config: Any) -> Any:
            return load_file(f"{model_name_or_path}/model.safetensors")

    assert same_for_the_device(Polite(path, config_for(enabled, path)).checkpoint_loader_fn(), original)
    assert finite(Direct(path, config_for(enabled, path)).checkpoint_loader_fn())
    with pytest.raises(WeightError, match=r"model\.layers\.0\.mlp\.down_proj\.weight: \d+ codes above 240"):
        Stubborn(path, config_for(enabled, path)).checkpoint_loader_fn()
    assert not finite(Stubborn(path, config_for(enabled, path, fp8_rescale=False)).checkpoint_loader_fn())


def test_a_weight_that_comes_by_another_way_stops_the_load(enabled: Standin, tmp_path: Path) -> None:
    class App(enabled.application.NeuronApplicationBase):  # type: ignore[name-defined,misc]
        @staticmethod
        def convert_hf_to_neuron_state_dict(state_dict: dict[str, Any], config: Any) -> dict[str, Any]:
            state_dict["adapter.weight"] = torch.full((4, 4), 448.0).to(FP8)
            return state_dict

    path = write(tmp_path, state_dict())
    with pytest.raises(WeightError, match=r"1 float8_e4m3fn weight:\n  - adapter\.weight: 16 codes above 240"):
        App.get_state_dict(path, config_for(enabled, path))


def test_unscaled_keep_does_not_reach_the_device(enabled: Standin, tmp_path: Path) -> None:
    tensors = state_dict()
    del tensors["model.layers.0.mlp.down_proj.weight_scale"]
    path = write(tmp_path, tensors)
    with pytest.raises(WeightError, match="no scale"):
        app_for(enabled, path).checkpoint_loader_fn()
    with pytest.raises(WeightError, match=r"layers\.0\.mlp\.down_proj\.weight"):
        app_for(enabled, path, fp8_rescale={"unscaled": "keep"}).checkpoint_loader_fn()
    loaded = app_for(enabled, path, fp8_rescale={"unscaled": "dequantize"})
    assert "layers.0.mlp.down_proj" in loaded.neuron_config.modules_to_not_convert
    assert loaded.checkpoint_loader_fn()["layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16


def test_scales_of_packed_weights_are_not_weights(enabled: Standin, tmp_path: Path) -> None:
    packed = {
        "model.layers.0.mlp.up_proj.weight_packed": torch.zeros(16, 8, dtype=torch.uint8),
        "model.layers.0.mlp.up_proj.weight_scale": torch.full((16, 1), 448.0).to(FP8),
    }
    loaded = app_for(enabled, write(tmp_path, {**state_dict(), **packed})).checkpoint_loader_fn()
    assert raw(loaded["layers.0.mlp.up_proj.scale"]).tolist() == [[0x7E]] * 16


def scaled_as(original: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The same weights [16, 32] with scales of another name and shape."""
    shapes = {"weight_scale_inv": (1, 2), "row": (16,), "tensor": ()}
    name = "weight_scale_inv" if kind == "weight_scale_inv" else "weight_scale"
    return {
        n.replace("weight_scale", name): torch.full(shapes[kind], 0.01) if n.endswith("_scale") else t
        for n, t in original.items()
    }


@pytest.mark.parametrize("way", ["directory", "file"])
@pytest.mark.parametrize("kind", ["weight_scale_inv", "row", "tensor"])
def test_scales_come_as_the_layers_look_for_them(enabled: Standin, tmp_path: Path, kind: str, way: str) -> None:
    path = write(tmp_path, scaled_as(state_dict(), kind))
    if way == "file":
        torch.save(scaled_as(state_dict(), kind), tmp_path / "file.pt")
        path = str(tmp_path / "file.pt")
    loaded = app_for(enabled, path).checkpoint_loader_fn()
    assert finite(loaded)
    weights = [name for name, t in loaded.items() if t.dtype == FP8]
    assert len(weights) == 6
    for name in weights:
        scale = loaded[name.removesuffix("weight") + "scale"]
        assert scale.shape == (16, 1)
        got, want = ieee_e4m3(loaded[name]) * scale.double().numpy(), e4m3fn(state_dict()[f"model.{name}"]) * 0.01
        assert sqnr(want, got) > 30  # block scales are requantized


def test_scales_of_a_model_that_does_without_quantized_layers_keep_name_and_shape(
    enabled: Standin, tmp_path: Path
) -> None:
    path = write(tmp_path, scaled_as(state_dict(), "weight_scale_inv"))
    seen: dict[str, torch.Tensor] = {}

    class App(enabled.application.NeuronApplicationBase):  # type: ignore[name-defined,misc]
        """Dequantizes for itself."""

        @staticmethod
        def convert_hf_to_neuron_state_dict(state_dict: dict[str, torch.Tensor], config: Any) -> dict[str, Any]:
            seen.update(state_dict)
            floats = {n: t.float() * 0.02 if t.dtype == torch.float8_e4m3fn else t for n, t in state_dict.items()}
            return {n: t.bfloat16() for n, t in floats.items() if not n.endswith("_scale_inv")}

    app = app_for(enabled, path, quantized=False)
    App(app.model_path, app.config).checkpoint_loader_fn()
    assert finite(seen)
    assert torch.equal(seen["layers.0.mlp.down_proj.weight_scale_inv"], torch.full((1, 2), 0.02))


@pytest.mark.parametrize("form", ["sharded", "bin"])
def test_inside_a_meta_device(enabled: Standin, tmp_path: Path, form: str) -> None:
    original = state_dict()
    path = write(tmp_path, original, form)
    with torch.device("meta"):
        loaded = app_for(enabled, path).checkpoint_loader_fn()
    assert all(t.device.type == "cpu" for t in loaded.values())
    assert same_for_the_device(loaded, original)


def test_pre_sharded_weights_and_lora_files_pass(enabled: Standin, tmp_path: Path) -> None:
    original = state_dict()
    path = write(tmp_path, original)
    (tmp_path / "weights").mkdir()
    save_file(original, tmp_path / "weights" / "tp0_sharded_checkpoint.safetensors")
    app = app_for(enabled, path)
    assert same_bytes(app.load_weights(str(tmp_path))[0], original)
    assert same_bytes(enabled.checkpoint.load_file(f"{path}/model.safetensors"), original)
    torch.save(original, tmp_path / "adapter_model.bin")
    assert same_bytes(enabled.checkpoint._torch_load(str(tmp_path / "adapter_model.bin")), original)


def test_trn3_reads_the_bytes_as_they_are(
    enabled: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(PLATFORM_ENV, "trn3")
    original = state_dict()
    loaded = app_for(enabled, write(tmp_path, original)).checkpoint_loader_fn()
    name = "layers.0.mlp.down_proj.weight"
    assert (raw(loaded[name]) == raw(original[f"model.{name}"])).all()
    assert "does nothing on trn3" in caplog.text


def test_a_flag_set_wrongly_after_construction(enabled: Standin, tmp_path: Path) -> None:
    app = app_for(enabled, write(tmp_path, state_dict()))
    app.neuron_config.fp8_rescale = "treble"
    with pytest.raises(OptionError, match="treble"):
        app.checkpoint_loader_fn()


def test_weights_without_quantized_are_an_error(enabled: Standin, tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="quantized=False, but 6 FP8 weights"):
        app_for(enabled, write(tmp_path, state_dict()), quantized=False).checkpoint_loader_fn()


def test_modules_listed_come_as_weight_times_scale(enabled: Standin, tmp_path: Path) -> None:
    original = state_dict()
    app = app_for(enabled, write(tmp_path, original), modules_to_not_convert=["lm_head", "layers.0.mlp"])
    loaded = app.checkpoint_loader_fn()
    for name, weight in original.items():
        if "layers.0.mlp" in name and name.endswith(".weight"):
            exact = e4m3fn(weight) * original[name + "_scale"].double().numpy()
            got = loaded[name.removeprefix("model.")]
            assert torch.equal(got, torch.from_numpy(exact.astype("float32")).bfloat16())
            assert name.removeprefix("model.").replace("weight", "scale") not in loaded
    assert loaded["layers.1.mlp.gate_proj.weight"].dtype == torch.float8_e4m3fn


def test_scales_that_a_conversion_leaves_behind_are_an_error(enabled: Standin, tmp_path: Path) -> None:
    class App(enabled.application.NeuronApplicationBase):  # type: ignore[name-defined,misc]
        """Transposes a weight, as Llama 4 does with its shared experts, under another name."""

        @staticmethod
        def convert_hf_to_neuron_state_dict(state_dict: dict[str, Any], config: Any) -> dict[str, Any]:
            weight = state_dict.pop("layers.0.mlp.gate_proj.weight")
            state_dict["layers.0.mlp.fused.weight"] = weight.T.contiguous()
            return state_dict

    app = app_for(enabled, write(tmp_path, state_dict()))
    with pytest.raises(WeightError) as error:
        App(app.model_path, app.config).checkpoint_loader_fn()
    assert "layers.0.mlp.fused.weight" in str(error.value)
    assert "layers.0.mlp.gate_proj.scale" in str(error.value)
    assert "dequantize" in str(error.value)


def test_a_failed_load_leaves_no_flag_behind(enabled: Standin, tmp_path: Path) -> None:
    broken = write(tmp_path / "broken", {"x.weight": torch.full((4, 4), 448.0).to(FP8)})
    with pytest.raises(Fp8LoaderError):
        app_for(enabled, broken).checkpoint_loader_fn()
    original = state_dict()
    assert same_bytes(enabled.checkpoint.load_state_dict(write(tmp_path / "whole", original)), original)


class TestSaveQuantized:
    def save(self, nxdi: Standin, path: str, **more: Any) -> None:
        nxdi.application.NeuronApplicationBase.save_quantized_state_dict("model", config_for(nxdi, path, **more))

    @pytest.mark.parametrize("platform", ["trn2", "trn3"])
    def test_never_over_an_fp8_checkpoint(
        self,
        enabled: Standin,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        platform: str,
    ) -> None:
        monkeypatch.setenv(PLATFORM_ENV, platform)
        original = state_dict()
        path = write(tmp_path, original)
        before = {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in tmp_path.iterdir()}
        with caplog.at_level(logging.INFO, logger="neuron_fp8_loader"):
            self.save(enabled, path)
        assert {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in tmp_path.iterdir()} == before
        assert "nothing written" in caplog.text

    def test_nor_over_a_file(self, enabled: Standin, tmp_path: Path) -> None:
        torch.save(state_dict(), tmp_path / "quantized.pt")
        before = (tmp_path / "quantized.pt").read_bytes()
        self.save(enabled, str(tmp_path / "quantized.pt"))
        assert (tmp_path / "quantized.pt").read_bytes() == before

    def test_nor_over_one_that_cannot_be_read(self, enabled: Standin, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"half a download")
        with pytest.raises(Fp8LoaderError, match="not a complete safetensors file"):
            self.save(enabled, str(tmp_path))
        assert (tmp_path / "model.safetensors").read_bytes() == b"half a download"

    def test_elsewhere_as_ever(self, enabled: Standin, tmp_path: Path) -> None:
        self.save(enabled, str(tmp_path))
        assert "overwritten" in load_file(tmp_path / "model.safetensors")

    def test_without_the_flag_as_ever(self, enabled: Standin, tmp_path: Path) -> None:
        path = write(tmp_path, state_dict())
        self.save(enabled, path, fp8_rescale=False)
        assert "overwritten" in load_file(tmp_path / "model.safetensors")


def test_the_check_can_tell_a_wrong_scale_apart(tmp_path: Path) -> None:
    original = state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    ready = neuron_fp8_loader.rescale_state_dict(original)
    want = product(original, name, name + "_scale", device=False)
    assert not np.isfinite(product(original, name, name + "_scale", device=True)).all()
    half_done = {**ready, name + "_scale": original[name + "_scale"]}
    assert not np.allclose(product(half_done, name, name + "_scale", device=True), want, atol=1e-3)
