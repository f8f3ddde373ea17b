"""What the last look passes over: weights that were just read, as long as they are what was read."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import random_codes, save

from neuron_fp8_loader import Options, WeightError, load_state_dict
from neuron_fp8_loader.integrations import check
from neuron_fp8_loader.integrations.check import check_ready
from neuron_fp8_loader.load import known

SHAPE = (1024, 1536)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights whose bytes are looked at."""
    names: list[str] = []
    real = check.count_codes
    monkeypatch.setattr(check, "count_codes", lambda flat, *rest: (names.extend(flat), real(flat, *rest))[1])
    return names


def load(tmp_path: Path, top: int = 0x7E, **options: object) -> dict[str, torch.Tensor]:
    tensors = {"a.weight": random_codes(SHAPE, 1, top=top), "a.weight_scale": torch.rand(SHAPE[0], 1) + 1}
    tensors |= {"small.weight": random_codes((8, 8), 2, top=top), "small.weight_scale": torch.ones(8, 1)}
    return load_state_dict(save(tmp_path / "model.safetensors", tensors), **options)


@pytest.mark.parametrize("top", [0x7E, 0x77])
def test_what_was_just_read_is_passed_over(tmp_path: Path, looked: list[str], top: int) -> None:
    state = load(tmp_path, top)
    check_ready({f"renamed.{name}": t for name, t in state.items()}, "here", Options())
    check_ready({"viewed": state["a.weight"].detach()}, "here", Options())
    assert looked == ["renamed.small.weight"]


def test_requantized_weights_too(tmp_path: Path, looked: list[str]) -> None:
    tensors = {"a.weight": random_codes(SHAPE, 1), "a.weight_scale_inv": torch.rand(8, 12) + 1}
    state = load_state_dict(save(tmp_path / "model.safetensors", tensors), layout="per_channel")
    assert state["a.weight_scale_inv"].shape == (1024, 1)
    check_ready(state, "here", Options())
    assert looked == []


def in_place(state: dict[str, torch.Tensor]) -> None:
    state["a.weight"][500:501, 700:701] = torch.tensor([[448.0]]).to(torch.float8_e4m3fn)  # torch 2.5 cannot fill FP8


def in_a_view(state: dict[str, torch.Tensor]) -> None:
    state["a.weight"].view(-1)[123:124].view(torch.uint8).fill_(0x7E)


def behind_torch(state: dict[str, torch.Tensor]) -> None:
    state["a.weight"].data.copy_(random_codes(SHAPE, 9))


def by_numpy(state: dict[str, torch.Tensor]) -> None:
    state["a.weight"].view(torch.uint8).numpy()[:] = random_codes(SHAPE, 9).view(torch.uint8).numpy()


def swapped(state: dict[str, torch.Tensor]) -> None:
    state["a.weight"].data = random_codes(SHAPE, 9)


def copied(state: dict[str, torch.Tensor]) -> None:
    state["a.weight"] = state["a.weight"].clone()
    state["a.weight"].view(torch.uint8)[3, 3] = 0x7E


@pytest.mark.parametrize("change", [in_place, in_a_view, behind_torch, by_numpy, swapped, copied])
def test_what_was_changed_since_is_looked_at(
    tmp_path: Path, looked: list[str], change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    state = load(tmp_path)
    change(state)
    with pytest.raises(WeightError, match=r"a\.weight: \d+ codes above 240"):
        check_ready(state, "here", Options())
    assert "a.weight" in looked


def test_another_tensor_in_the_same_place(tmp_path: Path, looked: list[str]) -> None:
    state = load(tmp_path)
    other = state["a.weight"].T.contiguous().T
    check_ready({"t": other, "half": state["a.weight"][:900], "other": state["a.weight"].view(-1, 512)}, "", Options())
    assert sorted(looked) == ["half", "other", "t"]


def test_nothing_is_kept_alive(tmp_path: Path) -> None:
    before = len(known._known)
    state = load(tmp_path)
    assert len(known._known) == before + 1
    address = state["a.weight"].data_ptr()
    del state
    gc.collect()
    assert address not in known._known


def test_weights_that_were_let_through_are_looked_at(tmp_path: Path, looked: list[str]) -> None:
    tensors = {"a.weight": random_codes(SHAPE, 1)}
    state = load_state_dict(save(tmp_path / "model.safetensors", tensors), unscaled="keep")
    with pytest.raises(WeightError, match=r"a\.weight"):
        check_ready(state, "here", Options())
    assert looked == ["a.weight"]


def test_known_nan_codes_are_still_named(tmp_path: Path, looked: list[str]) -> None:
    weight = random_codes(SHAPE, 1)
    weight.view(torch.uint8)[0, :3] = 0x7F
    file = save(tmp_path / "model.safetensors", {"a.weight": weight, "a.weight_scale": torch.ones(1)})
    state = load_state_dict(file, nan="keep")
    check_ready(state, "here", Options(nan="keep"))
    with pytest.raises(WeightError, match=r"a\.weight: 3 NaN codes"):
        check_ready(state, "here", Options())
    assert looked == []


def test_inference_mode(tmp_path: Path, looked: list[str]) -> None:
    """There torch counts no changes: everything is looked at."""
    with torch.inference_mode():
        state = load(tmp_path)
        check_ready(state, "here", Options())
    assert "a.weight" in looked
