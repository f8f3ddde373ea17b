"""The flag on NeuronConfig: what it takes, what it sets right, and what it refuses."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest

from neuron_fp8_loader import OptionError
from neuron_fp8_loader.codes.device import PLATFORM_ENV
from neuron_fp8_loader.integrations import flag
from neuron_fp8_loader.integrations.neuron_config import ENVIRONMENT
from tests.integrations.apps import settings
from tests.integrations.checkpoints import state_dict, write
from tests.integrations.conftest import Standin

GOOD = [True, False, None, "half", "ratio", {}, {"method": "ratio", "threads": 2}, {"activation_scales": "keep"}]
BAD = [
    "true",
    "double",
    1,
    0,
    0.5,
    [],
    ["half"],
    {"methd": "half"},
    {"method": "third"},
    {"threads": 0},
    {"experts": "fused"},
]


@pytest.mark.parametrize("cls", ["NeuronConfig", "MoENeuronConfig", "MultimodalVisionNeuronConfig"])
@pytest.mark.parametrize("value", GOOD, ids=str)
def test_every_config_class_takes_it_and_a_saved_config_keeps_it(
    enabled: Standin, tmp_path: Path, cls: str, value: Any
) -> None:
    kind = getattr(enabled.config, cls)

    class Config(enabled.config.InferenceConfig):  # type: ignore[name-defined,misc]
        @classmethod
        def get_neuron_config_cls(cls) -> Any:
            return kind

    config = Config(kind(fp8_rescale=value, tp_degree=2))
    config.save(tmp_path)
    back = Config.load(tmp_path)
    assert type(back.neuron_config) is kind
    assert back.neuron_config.fp8_rescale == value
    assert type(back.neuron_config.fp8_rescale) is type(value)
    assert copy.deepcopy(back).neuron_config.fp8_rescale == value


@pytest.mark.parametrize("value", BAD, ids=str)
def test_a_wrong_value_is_an_error_at_construction(enabled: Standin, value: Any) -> None:
    with pytest.raises(OptionError, match="fp8_rescale"):
        enabled.config.MoENeuronConfig(fp8_rescale=value)


def test_an_unknown_option_lists_the_known(enabled: Standin) -> None:
    with pytest.raises(OptionError, match=r"fp8_rescale.*methd.*method, always"):
        enabled.config.NeuronConfig(fp8_rescale={"methd": "half"})


def test_without_the_flag_a_config_is_what_it_was(enabled: Standin, tmp_path: Path) -> None:
    path = write(tmp_path, state_dict(plain=("self_attn",)))
    config = enabled.config.NeuronConfig(**{k: v for k, v in settings(path).items() if k != "fp8_rescale"})
    assert "fp8_rescale" not in vars(config)
    assert config.modules_to_not_convert is None
    assert not set(ENVIRONMENT) & set(os.environ)
    enabled.config.NeuronConfig(quantization_dtype="f8e4m3fn", fp8_rescale=False)


def test_without_enable_the_flag_is_dropped_as_ever(nxdi: Standin) -> None:
    assert not hasattr(nxdi.config.NeuronConfig(fp8_rescale=True), "fp8_rescale")


def test_hybrid_sharding_of_fp8_experts_is_refused(enabled: Standin, tmp_path: Path) -> None:
    """NxD copies their weights for it, and not their scales."""
    experts = [f"model.layers.0.mlp.experts.{n}.{p}_proj" for n in range(2) for p in ("gate", "up", "down")]
    path = write(tmp_path / "fp8", state_dict(layers=experts))
    hybrid = {"hybrid_sharding_config": {"moe_cte_tp_degree": 4, "moe_tkg_ep_degree": 4}}
    with pytest.raises(OptionError, match=r"copies the weights of experts.* 6 of .*moe_ep_degree"):
        enabled.config.MoENeuronConfig(**settings(path, **hybrid))
    floats = {"fp8_rescale": {"dequantize": ["*.experts.*"]}}
    enabled.config.MoENeuronConfig(**settings(path, **hybrid, **floats))
    enabled.config.MoENeuronConfig(**settings(write(tmp_path / "dense", state_dict()), **hybrid))
    enabled.config.MoENeuronConfig(**settings(path, **hybrid, fp8_rescale=False))


@pytest.mark.parametrize("kind", ["blockwise_symmetric", "per_channel_symmetric", "expert_wise_per_channel_symmetric"])
def test_scales_that_the_fused_kernel_would_misread_are_refused(enabled: Standin, tmp_path: Path, kind: str) -> None:
    """It views any scales as [experts, 2, inner]."""
    experts = [f"model.layers.0.mlp.experts.{n}.{p}_proj" for n in range(2) for p in ("gate", "up", "down")]
    path = write(tmp_path / "fp8", state_dict(layers=experts))
    given = {"quantization_type": kind, "quantization_block_axis": [1, 2], "quantization_block_size": [128, 128]}
    given["moe_fused_nki_kernel_enabled"] = True
    if kind.startswith("expert_wise"):
        enabled.config.MoENeuronConfig(**settings(path, **given))
        return
    with pytest.raises(OptionError, match=rf'{kind}".*6 matrices.*expert_wise_per_channel_symmetric'):
        enabled.config.MoENeuronConfig(**settings(path, **given))
    enabled.config.MoENeuronConfig(**settings(write(tmp_path / "dense", state_dict()), **given))
    enabled.config.MoENeuronConfig(**settings(path, **given | {"moe_fused_nki_kernel_enabled": None}))


def test_a_list_may_name_experts_where_the_model_has_them(enabled: Standin, tmp_path: Path) -> None:
    """As the load's error gives it: GLM's and Qwen3.5's MoE module is within ``feed_forward`` or ``mlp``."""
    experts = [f"model.layers.0.mlp.experts.{n}.{p}_proj" for n in range(2) for p in ("gate", "up", "down")]
    path = write(tmp_path / "fp8", state_dict(layers=[*experts, "model.layers.0.self_attn.q_proj"]))
    floats = {"fp8_rescale": {"dequantize": ["*.experts.*"]}}
    stack = "expert_mlps.mlp_op"
    for named in (
        ["layers.0.feed_forward.moe"],
        ["layers.0.mlp.moe.expert_mlps"],
        [f"layers.0.mlp.moe.{stack}.{p}_proj" for p in ("gate_up", "down")],
    ):
        enabled.config.MoENeuronConfig(**settings(path, **floats, modules_to_not_convert=["lm_head", *named]))
    for named in (
        ["layers.1.feed_forward.moe"],
        ["layers.0.feed_forward.moe.router"],
        [f"layers.0.mlp.moe.{stack}.down_proj"],
    ):
        with pytest.raises(OptionError, match="contradicts"):
            enabled.config.MoENeuronConfig(**settings(path, **floats, modules_to_not_convert=["lm_head", *named]))


class TestModulesToNotConvert:
    def test_filled_in_where_it_was_left_out(self, enabled: Standin, tmp_path: Path) -> None:
        path = write(tmp_path, state_dict(plain=("self_attn",)))
        for given in (None, []):
            config = enabled.config.NeuronConfig(**settings(path, modules_to_not_convert=given))
            assert config.modules_to_not_convert == ["layers.0.self_attn", "layers.1.self_attn", "lm_head"]

    def test_filled_in_early_enough_for_what_demands_it(self, enabled: Standin, tmp_path: Path) -> None:
        enabled.config.NeuronConfig(**settings(write(tmp_path, state_dict()), qkv_kernel_enabled=True))

    def test_a_list_that_agrees_is_left_as_it_is(self, enabled: Standin, tmp_path: Path) -> None:
        path, given = write(tmp_path, state_dict(plain=("self_attn",))), ["self_attn", "lm_head"]
        config = enabled.config.NeuronConfig(**settings(path, modules_to_not_convert=given))
        assert config.modules_to_not_convert is given

    def test_a_contradiction_lists_what_is_missing(
        self, enabled: Standin, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = write(tmp_path, state_dict(plain=("self_attn",)))
        with pytest.raises(OptionError) as error:
            enabled.config.NeuronConfig(**settings(path, modules_to_not_convert=["lm_head", "layers.0.mlp.gate_proj"]))
        text = str(error.value)
        assert path in text
        assert "loaded as bfloat16, 1 FP8 module:\n  - model.layers.0.mlp.gate_proj" in caplog.text
        assert "not listed: model.layers.0.self_attn.q_proj" in text
        assert "not listed: model.layers.1.self_attn.q_proj" in text
        assert "['layers.0.self_attn', 'layers.1.self_attn', 'lm_head']" in text  # what to write

    @pytest.mark.parametrize("given", ["lm_head", ["lm_head", None], [3], [b"lm_head"]], ids=str)
    def test_what_is_no_list_of_texts_is_refused(self, enabled: Standin, tmp_path: Path, given: Any) -> None:
        """Of a text NxD takes each letter for an entry: no module is without an ``e``."""
        path = write(tmp_path, state_dict())
        for where in (path, str(tmp_path / "nowhere")):
            with pytest.raises(OptionError, match="expected a list of texts"):
                enabled.config.NeuronConfig(**settings(where, modules_to_not_convert=given))

    @pytest.mark.parametrize("entry", ["", ".", "l"])
    def test_an_entry_that_is_part_of_every_path(
        self, enabled: Standin, tmp_path: Path, caplog: pytest.LogCaptureFixture, entry: str
    ) -> None:
        path = write(tmp_path, state_dict())
        enabled.config.NeuronConfig(**settings(path, modules_to_not_convert=["lm_head", entry]))
        assert "so that they are loaded as bfloat16, 6 FP8 modules" in caplog.text

    def test_names_of_the_checkpoint_are_said_to_do_nothing(
        self, enabled: Standin, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        name, path = "model.layers.0.self_attn.q_proj", "layers.0.self_attn.qkv_proj.q_proj"
        given = {"modules_to_not_convert": ["lm_head", name]}
        enabled.config.NeuronConfig(**settings(write(tmp_path / "fp8", state_dict()), **given))
        assert "loaded as bfloat16" not in caplog.text
        assert (
            f"holds what does nothing: NxD Inference has no path with 1 name:\n  - {name}: write {path}" in caplog.text
        )
        floats = write(tmp_path / "floats", state_dict(plain=("layers.0.self_attn",)))
        with pytest.raises(
            OptionError, match=rf"not listed: {name}\nNxD Inference has no path.*\n  - {name}: write {path}"
        ):
            enabled.config.NeuronConfig(**settings(floats, **given))
        enabled.config.NeuronConfig(**settings(floats, modules_to_not_convert=["lm_head", path]))

    def test_a_saved_config_agrees_with_itself(self, enabled: Standin, tmp_path: Path) -> None:
        path = write(tmp_path / "model", state_dict(plain=("self_attn",)))
        config = enabled.config.InferenceConfig(enabled.config.NeuronConfig(**settings(path)))
        config.save(tmp_path / "compiled")
        back = enabled.config.InferenceConfig.load(tmp_path / "compiled")
        assert back.neuron_config.modules_to_not_convert == config.neuron_config.modules_to_not_convert

    @pytest.mark.parametrize("patterns", ["*.self_attn.*", ["*.0.self_attn.q_proj", "*.1.self_attn.*"]], ids=str)
    def test_dequantized_modules_are_in_it(self, enabled: Standin, tmp_path: Path, patterns: Any) -> None:
        flag = {"dequantize": patterns}
        config = enabled.config.NeuronConfig(**settings(write(tmp_path, state_dict()), fp8_rescale=flag))
        assert config.modules_to_not_convert == ["layers.0.self_attn", "layers.1.self_attn", "lm_head"]

    @pytest.mark.parametrize("path", ["nowhere", "empty"])
    def test_no_checkpoint_yet(self, enabled: Standin, tmp_path: Path, path: str) -> None:
        (tmp_path / "empty").mkdir()
        config = enabled.config.NeuronConfig(**settings(str(tmp_path / path), modules_to_not_convert=["mlp"]))
        assert config.modules_to_not_convert == ["mlp"]

    def test_a_broken_checkpoint_is_for_the_load_to_refuse(
        self, enabled: Standin, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"no such thing")
        config = enabled.config.NeuronConfig(**settings(str(tmp_path)))
        assert config.modules_to_not_convert is None
        assert "not a complete safetensors file" in caplog.text

    def test_a_checkpoint_without_fp8_is_only_remarked_on(
        self, enabled: Standin, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = write(tmp_path, state_dict(plain=("proj",)))
        assert enabled.config.NeuronConfig(**settings(path)).modules_to_not_convert is None
        assert "no float8_e4m3fn weights" in caplog.text

    def test_a_rewritten_checkpoint_is_looked_at_again(self, enabled: Standin, tmp_path: Path) -> None:
        path = write(tmp_path, state_dict())
        assert enabled.config.NeuronConfig(**settings(path)).modules_to_not_convert == ["lm_head"]
        write(tmp_path, state_dict(plain=("mlp",)))
        assert "layers.0.mlp" in enabled.config.NeuronConfig(**settings(path)).modules_to_not_convert

    def test_the_vision_tower_is_not_held_against_the_decoders_list(self, enabled: Standin, tmp_path: Path) -> None:
        path = write(tmp_path, state_dict())
        kind = enabled.config.MultimodalVisionNeuronConfig
        config = kind(**settings(path, modules_to_not_convert=["patch_embed"]))
        assert config.modules_to_not_convert == ["patch_embed"]


class TestDraft:
    def fused(self, enabled: Standin, draft: str, target: Any) -> Any:
        config = enabled.config
        return config.FusedSpecNeuronConfig(
            worker_cls=object, draft_config=config.InferenceConfig(target), draft_model_path=draft
        ).draft_config.neuron_config

    def test_a_list_inherited_from_the_target_is_filled_in_anew(self, enabled: Standin, tmp_path: Path) -> None:
        target = enabled.config.NeuronConfig(**settings(write(tmp_path / "t", state_dict(plain=("self_attn",)))))
        draft = write(tmp_path / "d", state_dict(plain=("mlp",)))
        found = self.fused(enabled, draft, copy.deepcopy(target))
        assert found.modules_to_not_convert == ["layers.0.mlp", "layers.1.mlp", "lm_head"]
        assert target.modules_to_not_convert == ["layers.0.self_attn", "layers.1.self_attn", "lm_head"]

    def test_a_draft_that_is_not_fp8_is_left_out_whole(self, enabled: Standin, tmp_path: Path) -> None:
        target = enabled.config.NeuronConfig(**settings(write(tmp_path / "t", state_dict())))
        found = self.fused(enabled, write(tmp_path / "d", state_dict(plain=("proj",))), target)
        assert set(found.modules_to_not_convert) >= {"layers.0.self_attn", "layers.1.mlp", "lm_head"}

    def test_a_saved_config_agrees_with_itself(self, enabled: Standin, tmp_path: Path) -> None:
        config = enabled.config
        target = write(tmp_path / "t", state_dict(plain=("self_attn",)))
        draft = write(tmp_path / "d", state_dict(plain=("mlp",)))
        neuron_config = config.NeuronConfig(**settings(target, enable_fused_speculation=True))
        draft_neuron_config = copy.deepcopy(neuron_config)
        draft_neuron_config.enable_fused_speculation = False
        fused = config.FusedSpecNeuronConfig(object, config.InferenceConfig(draft_neuron_config), draft)
        config.InferenceConfig(neuron_config, fused).save(tmp_path / "compiled")
        back = config.InferenceConfig.load(tmp_path / "compiled")
        found = back.fused_spec_config.draft_config.neuron_config
        assert found.modules_to_not_convert == ["layers.0.mlp", "layers.1.mlp", "lm_head"]
        assert (found.quantized_checkpoints_path, back.neuron_config.quantized_checkpoints_path) == (draft, target)

    def test_the_targets_own_config_is_not_touched(self, enabled: Standin, tmp_path: Path) -> None:
        path = write(tmp_path / "t", state_dict())
        target = enabled.config.NeuronConfig(**settings(path, enable_fused_speculation=True))
        assert self.fused(enabled, write(tmp_path / "d", state_dict(plain=("mlp",))), target) is target
        assert (target.modules_to_not_convert, target.quantized_checkpoints_path) == (["lm_head"], path)

    def test_a_list_of_its_own_that_contradicts_is_an_error(self, enabled: Standin, tmp_path: Path) -> None:
        target = enabled.config.NeuronConfig(**settings(write(tmp_path / "t", state_dict())))
        target.modules_to_not_convert = ["lm_head", "layers.0.mlp"]
        draft = write(tmp_path / "d", state_dict(plain=("self_attn",)))
        with pytest.raises(OptionError, match=r"and not listed: model\.layers\.0\.self_attn") as error:
            self.fused(enabled, draft, target)
        assert draft in str(error.value)

    def test_without_the_flag_nothing_is_looked_at(self, enabled: Standin, tmp_path: Path) -> None:
        target = enabled.config.NeuronConfig(**settings(str(tmp_path), fp8_rescale=False))
        assert self.fused(enabled, write(tmp_path, state_dict()), target).modules_to_not_convert is None


class TestDtype:
    def test_f8e4m3fn_is_an_error_that_says_what_to_write(self, enabled: Standin, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match='write quantization_dtype="f8e4m3"'):
            enabled.config.NeuronConfig(**settings(str(tmp_path), quantization_dtype="f8e4m3fn"))

    def test_nor_any_other_for_an_fp8_checkpoint(self, enabled: Standin, tmp_path: Path) -> None:
        values = settings(write(tmp_path / "fp8", state_dict()))
        del values["quantization_dtype"]  # NxD Inference takes int8 then, and casts the values
        with pytest.raises(OptionError, match=r'"int8": .*write quantization_dtype="f8e4m3"'):
            enabled.config.NeuronConfig(**values)
        values["quantized_checkpoints_path"] = write(tmp_path / "plain", state_dict(plain=("proj",)))
        enabled.config.NeuronConfig(**values)

    @pytest.mark.parametrize(
        "more",
        [{"quantized": False}, {"activation_quantization_type": "dynamic"}, {"quantized_mlp_kernel_enabled": True}],
        ids=str,
    )
    def test_not_where_it_means_nothing(self, enabled: Standin, tmp_path: Path, more: dict[str, Any]) -> None:
        enabled.config.NeuronConfig(**settings(str(tmp_path), quantization_dtype="f8e4m3fn", **more))


class TestEnvironment:
    def test_set_where_unset(self, enabled: Standin) -> None:
        enabled.config.NeuronConfig(fp8_rescale=True)
        assert {name: os.environ[name] for name in ENVIRONMENT} == ENVIRONMENT

    def test_a_contrary_value_stays_with_a_warning(
        self, enabled: Standin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("UNSAFE_FP8FNCAST", "0")
        enabled.config.NeuronConfig(fp8_rescale=True)
        assert os.environ["UNSAFE_FP8FNCAST"] == "0"
        assert "UNSAFE_FP8FNCAST=0" in caplog.text
        assert os.environ["XLA_HANDLE_SPECIAL_SCALAR"] == "1"
        assert "XLA_HANDLE_SPECIAL_SCALAR=" not in caplog.text


@pytest.mark.parametrize(
    ("platform", "acts"), [("trn1", True), ("inf2", True), ("trn2", True), ("trn3", False), ("", True)]
)
def test_platforms(
    enabled: Standin,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    platform: str,
    acts: bool,
) -> None:
    monkeypatch.setenv(PLATFORM_ENV, platform)
    config = enabled.config.NeuronConfig(**settings(write(tmp_path, state_dict())))
    assert config.fp8_rescale is True
    assert (config.modules_to_not_convert == ["lm_head"]) is acts
    assert ("UNSAFE_FP8FNCAST" in os.environ) is acts
    assert ("does nothing on trn3" in caplog.text) is not acts


def test_the_flag_is_plain_json(enabled: Standin, tmp_path: Path) -> None:
    config = enabled.config.InferenceConfig(enabled.config.NeuronConfig(fp8_rescale={"method": "ratio"}))
    config.save(tmp_path)
    text = (tmp_path / "neuron_config.json").read_text()
    assert json.loads(text)["neuron_config"]["fp8_rescale"] == {"method": "ratio"}


def test_layout_follows_the_quantization_type(enabled: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    def layout(**more: Any) -> Any:
        config = enabled.config.NeuronConfig(**settings("nowhere", **more))
        return (flag.options_for(config) or {}).get("layout")

    assert layout() == "per_channel"
    assert layout(quantization_type="per_tensor_symmetric") == "per_tensor"
    assert layout(quantization_type="expert_wise_per_channel_symmetric") == "per_channel"
    assert layout(quantization_type="blockwise_symmetric") == "keep"
    assert layout(quantized=False) == "keep"
    assert layout(fp8_rescale={"layout": "keep"}) == "keep"


def test_what_is_logged_goes_to_the_packages_logger(
    enabled: Standin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="neuron_fp8_loader"):
        enabled.config.NeuronConfig(**settings(write(tmp_path, state_dict())))
    assert [r.name for r in caplog.records if "modules_to_not_convert" in r.message] == ["neuron_fp8_loader"]


@pytest.mark.parametrize(("family", "block"), [("qwen35", "mlp.moe"), ("glm5", "feed_forward.moe"), ("other", None)])
def test_experts_are_listed_in_the_block_that_a_model_has_them_in(
    enabled: Standin, family: str, block: str | None
) -> None:
    kind = type("Config", (enabled.config.InferenceConfig,), {"__module__": f"contrib.modeling_{family}"})
    given = ["layers.0.mlp", "layers.1.mlp.expert_mlps", "layers.2.mlp.expert_mlps.mlp_op.down_proj", "lm_head"]
    config = kind(enabled.config.NeuronConfig(modules_to_not_convert=given, fp8_rescale=True))
    more = [] if block is None else [f"layers.{n}.{block}" for n in (0, 1)]
    more += [] if block is None else [f"layers.2.{block}.expert_mlps.mlp_op.down_proj"]
    assert config.neuron_config.modules_to_not_convert == [*given, *more]
    without = enabled.config.NeuronConfig(modules_to_not_convert=given)
    assert kind(without).neuron_config.modules_to_not_convert == given


def test_a_class_with_a_list_of_its_own_says_what_another_lacks(
    enabled: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GLM-5.2 quantizes its experts by itself, and casts all other MLPs to bfloat16, with scales or without."""
    (tmp_path / "modeling_glm5.py").write_text('"""Makes {moe}.gate_up_proj.scale" of weight_scale_inv."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("modeling_glm5")

    def listed(given: list[str] | None, **more: Any) -> Any:
        neuron_config = enabled.config.MoENeuronConfig(**settings(path, modules_to_not_convert=given, **more))
        kind = type("Config", (enabled.config.InferenceConfig,), {"__module__": "modeling_glm5"})
        return kind(neuron_config, num_hidden_layers=2).neuron_config.modules_to_not_convert

    attention = [f"model.layers.{n}.self_attn.{p}" for n in range(3) for p in ("o_proj", "kv_b_proj")]
    experts = [f"model.layers.1.mlp.experts.{n}.{p}_proj" for n in range(2) for p in ("gate", "up", "down")]
    others = [f"model.layers.{n}.{p}_proj" for n in ("0.mlp", "1.mlp.shared_experts") for p in ("gate", "up", "down")]
    path = write(tmp_path / "fp8", state_dict(layers=[*attention, *experts, *others]))
    assert listed(None) is None
    works = ["lm_head", "kv_b_proj", "layers.0.mlp", "shared_expert"]
    with pytest.raises(OptionError, match=re.escape(f"=['lm_head'] lacks {works[1:]}, which Config has")) as error:
        listed(["lm_head"])
    assert str(error.value).endswith(f"or set modules_to_not_convert={works}")
    for given in (works, ["lm_head", "layers.0.", "layers.1."], ["lm_head", "self_attn", "layers.0.mlp", "shared"]):
        assert listed(given)[: len(given)] == given
    for given in (works[:2], works[:3], ["lm_head", "layers.0.", "layers.1.mlp", "self_attn"]):
        with pytest.raises(OptionError, match=r"lacks .*shared_expert'"):
            listed(given)
    listed(["lm_head"], quantized=False)
    listed(["lm_head"], fp8_rescale=False)
    # its own list would leave these out
    found = listed(None, fp8_rescale={"dequantize": ["*.experts.*"]})
    assert {"layers.1.feed_forward.moe", "self_attn", "layers.0.mlp", "shared_expert", "lm_head"} <= {*found}
