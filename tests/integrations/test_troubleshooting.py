"""docs/troubleshooting.md: each of our errors is provoked, says what the page quotes, and goes away by its remedy."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as plain_load_file

from neuron_fp8_loader import conventions, load_file, load_state_dict, rescale_state_dict
from neuron_fp8_loader.errors import Fp8LoaderError
from neuron_fp8_loader.tools.export import prepare_export
from tests.integrations.apps import app_for
from tests.integrations.checkpoints import state_dict, write
from tests.integrations.conftest import Standin
from tests.support import ROOT, TINY, codes, random_codes, save

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split("## With the flag: our errors")[1]
QUOTED = [
    phrase
    for line in PAGE.splitlines()
    if line.startswith("| `")
    for phrase in re.findall(r"`([^`]+)`", line.split(" | ")[0])
]
ELSEWHERE = {
    "no AWS credentials were found": "tests/test_store.py",
    "access is denied": "tests/test_store.py",
    "lies in another region": "tests/test_store.py",
    "was replaced while it was read": "tests/test_store.py",
    "was forked from one that had read from a store": "tests/test_store.py",
    "... lacks ...": "tests/integrations/test_neuron_config.py",
    "is not quantized and has none": "tests/integrations/test_generation.py",
    "would misread": "tests/integrations/test_generation.py",
}
"""Those that need a server, a missing package or a model of a kind: where they are provoked."""

CASES: dict[tuple[str, ...], Callable[..., None]] = {}


def shows(*phrases: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(case: Callable[..., None]) -> Callable[..., None]:
        CASES[phrases] = case
        return case

    return register


def says(phrase: str) -> AbstractContextManager[Any]:
    """An error of ours in whose text the page's phrase stands, ... being anything."""
    pattern = ".*".join(map(re.escape, phrase.split("...")))
    return pytest.raises(Fp8LoaderError, match=re.compile(pattern, re.S))


def pair(value: float = 0.5, top: int = 0x7E, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    weight = codes([[top, 0x10, 0x11, 0x12]] * 4)
    return {"m.weight": weight, "m.weight_scale": torch.full((4, 1), value, dtype=dtype)}


@shows("no such file or directory")
def no_such_file(tmp_path: Path) -> None:
    with says("no such file or directory"):
        load_state_dict(tmp_path / "nowhere")


@shows("is neither a path nor a repository in the Hub cache", "is neither a path nor, without the extra 'hub', ...")
def not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with says("is neither a path nor a repository in the Hub cache"):
        load_state_dict("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with says("is neither a path nor, without the extra 'hub', ..."):
        load_state_dict("org/name")


@shows("no scale to make up for a rescale of")
def unscaled() -> None:
    alone = {"m.weight": pair()["m.weight"]}
    with says("no scale to make up for a rescale of"):
        rescale_state_dict(alone)
    assert rescale_state_dict(alone, unscaled="dequantize")["m.weight"].dtype == torch.bfloat16
    named = {**alone, "m.my_own_multiplier": pair()["m.weight_scale"]}
    with says("no scale to make up for a rescale of"):
        rescale_state_dict(named)
    conventions.register(conventions.Convention("walked", "{}.weight", "{}.my_own_multiplier"))
    try:
        assert rescale_state_dict(named)["m.my_own_multiplier"].unique().tolist() == [1.0]
    finally:
        conventions.unregister("walked")


@shows("has 2 candidates for its scale")
def two_scales() -> None:
    both = {**pair(), "m.weight_scale_inv": torch.ones(1, 1)}
    with says("has 2 candidates for its scale"):
        rescale_state_dict(both)
    del both["m.weight_scale_inv"]
    assert rescale_state_dict(both)["m.weight_scale"].unique().tolist() == [1.0]


@shows("its scale ... is ...; expected one of")
def not_a_scale() -> None:
    with says("its scale ... is ...; expected one of"):
        rescale_state_dict(pair(dtype=torch.int32, value=1))


@shows("NaN codes in")
def nan_codes() -> None:
    with says("NaN codes in"):
        rescale_state_dict(pair(top=0x7F))
    assert rescale_state_dict(pair(top=0x7F), nan="keep")["m.weight"].float().isnan().sum() == 4


@shows("cannot rescale", "not finite", "overflow")
def bad_scales() -> None:
    for phrase, damaged in (
        ("not finite", pair(float("nan"))),
        ("overflow", pair(40000.0, dtype=torch.float16)),
    ):
        with says(f"cannot rescale...{phrase}"):
            rescale_state_dict(damaged)
    large = rescale_state_dict(pair(40000.0, dtype=torch.float16), dequantize=["m"])
    assert large["m.weight"].max() == torch.tensor(448 * 40000.0).bfloat16()


@shows("layout and dequantize need a weight and its scale together")
def torn(tmp_path: Path) -> None:
    blocks = {"m.weight": random_codes((256, 384)), "m.weight_scale": torch.full((2, 3), 0.5)}
    write(tmp_path, blocks, "sharded")
    first = tmp_path / "model-00001-of-00002.safetensors"
    with says("layout and dequantize need a weight and its scale together"):
        load_file(first, layout="per_channel")
    assert load_state_dict(tmp_path, layout="per_channel")["m.weight_scale"].shape == (256, 1)


@shows('has one scale per ...; layout="per_tensor" would lose it')
def too_coarse(tmp_path: Path, enabled: Standin) -> None:
    path = write(tmp_path, state_dict())
    with says('has one scale per ...; layout="per_tensor" would lose it'):
        app_for(enabled, path, quantization_type="per_tensor_symmetric").checkpoint_loader_fn()
    assert app_for(enabled, path).checkpoint_loader_fn()


@shows("cannot be laid out per row")
def columns(tmp_path: Path, enabled: Standin) -> None:
    tensors = state_dict()
    tensors["model.layers.0.self_attn.q_proj.weight_scale"] = torch.full((1, 32), 0.5)
    path = write(tmp_path, tensors)
    with says("cannot be laid out per row"):
        app_for(enabled, path).checkpoint_loader_fn()
    loaded = app_for(enabled, path, fp8_rescale={"dequantize": ["*.q_proj"]}).checkpoint_loader_fn()
    assert loaded["layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16


@shows("quantized=False, but ...")
def not_quantized(tmp_path: Path, enabled: Standin) -> None:
    path = write(tmp_path, state_dict())
    with says("quantized=False, but ..."):
        app_for(enabled, path, quantized=False).checkpoint_loader_fn()
    assert app_for(enabled, path).checkpoint_loader_fn()
    loaded = app_for(enabled, path, quantized=False, fp8_rescale={"dequantize": ["*"]}).checkpoint_loader_fn()
    assert torch.float8_e4m3fn not in {t.dtype for t in loaded.values()}


@shows("the model's conversion keeps FP8 weights and their scales apart")
def torn_by_a_model(tmp_path: Path, enabled: Standin) -> None:
    def convert(state_dict: dict[str, Any], config: Any) -> dict[str, Any]:
        """Transposes what it renames, so that no row can be followed."""
        for name in [name for name in state_dict if name.endswith("q_proj.weight")]:
            state_dict[name.replace("q_proj", "qkv")] = state_dict.pop(name).T.contiguous()
        return state_dict

    enabled.application.NeuronApplicationBase.convert_hf_to_neuron_state_dict = staticmethod(convert)
    path = write(tmp_path, state_dict())
    with says("the model's conversion keeps FP8 weights and their scales apart") as raised:
        app_for(enabled, path).checkpoint_loader_fn()
    printed = re.search(r"fp8_rescale=(\{.*?\})", str(raised.value))
    assert printed is not None
    loaded = app_for(enabled, path, fp8_rescale=eval(printed[1])).checkpoint_loader_fn()
    assert loaded["layers.0.self_attn.qkv.weight"].dtype == torch.bfloat16


@shows("the model's conversion cast FP8 weights")
def cast_by_a_model(tmp_path: Path, enabled: Standin) -> None:
    def convert(state_dict: dict[str, Any], config: Any) -> dict[str, Any]:
        return {name: t.to(torch.bfloat16) for name, t in state_dict.items()}

    enabled.application.NeuronApplicationBase.convert_hf_to_neuron_state_dict = staticmethod(convert)
    path = write(tmp_path, state_dict())
    with says("the model's conversion cast FP8 weights"):
        app_for(enabled, path, quantized=False).checkpoint_loader_fn()
    loaded = app_for(enabled, path, quantized=False, fp8_rescale={"dequantize": ["*"]}).checkpoint_loader_fn()
    assert loaded["layers.0.self_attn.q_proj.weight"].abs().max() < 16


@shows("... contradicts ...")
def contradicting(tmp_path: Path, enabled: Standin) -> None:
    path = write(tmp_path, state_dict(plain=("down_proj",)))
    with says("... contradicts ..."):
        app_for(enabled, path, modules_to_not_convert=["lm_head"]).checkpoint_loader_fn()
    assert app_for(enabled, path).checkpoint_loader_fn()


@shows("expected a list of texts")
def a_text_for_a_list(tmp_path: Path, enabled: Standin) -> None:
    path = write(tmp_path, state_dict())
    with says("expected a list of texts"):
        app_for(enabled, path, modules_to_not_convert="lm_head")
    assert app_for(enabled, path, modules_to_not_convert=["lm_head"]).checkpoint_loader_fn()


@shows("a Neuron device would read inf or NaN from")
def another_way(tmp_path: Path, enabled: Standin) -> None:
    base = enabled.application.NeuronApplicationBase
    path = write(tmp_path, state_dict())
    tensors = plain_load_file(tmp_path / "model.safetensors")
    base.convert_hf_to_neuron_state_dict = staticmethod(lambda state_dict, config: dict(tensors))
    with says("a Neuron device would read inf or NaN from"):
        app_for(enabled, path).checkpoint_loader_fn()
    rescale_state_dict(tensors, inplace=True)
    assert app_for(enabled, path).checkpoint_loader_fn()


@shows("tensors that share memory with an FP8 weight")
def shared_memory() -> None:
    tensors = pair()
    tensors["also"] = tensors["m.weight"].view(torch.uint8)
    with says("tensors that share memory with an FP8 weight"):
        rescale_state_dict(tensors, inplace=True)
    tensors["also"] = tensors["also"].clone()
    rescale_state_dict(tensors, inplace=True)


@shows("is not empty and not an export of ours")
def occupied(tmp_path: Path) -> None:
    save(tmp_path / "mine.safetensors", {"x": torch.ones(1)})
    with says("is not empty and not an export of ours"):
        prepare_export(TINY, tmp_path)
    prepare_export(TINY, tmp_path / "another")


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.__name__)
def test_an_error_and_its_remedy(case: Callable[..., None], request: pytest.FixtureRequest) -> None:
    wanted = [name for name in case.__annotations__ if name != "return"]
    case(*[request.getfixturevalue(name) for name in wanted])


def test_every_error_of_the_page_is_provoked() -> None:
    provoked = [phrase for phrases in CASES for phrase in phrases]
    assert sorted(QUOTED) == sorted([*provoked, *ELSEWHERE, "modules_to_not_convert"])
    for phrase, file in ELSEWHERE.items():
        assert phrase.strip(". ") in (ROOT / file).read_text(encoding="utf-8"), file
