"""A static activation or KV cache scale that is not finite is refused whether or not a weight is converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import codes, same_bytes, save

from neuron_fp8_loader import ScaleError, load_state_dict, rescale_state_dict, safe_open
from neuron_fp8_loader.tools.scan import scan_checkpoint


def given(code: int, bad: float) -> dict[str, torch.Tensor]:
    attention = "model.layers.0.self_attn"
    return {
        f"{attention}.k_proj.weight": codes([[code, 0x10]] * 2),
        f"{attention}.k_proj.weight_scale": torch.ones(1),
        f"{attention}.k_proj.input_scale": torch.full((1,), bad),
    }


def in_memory(tensors: dict[str, torch.Tensor], _: Path, **options: Any) -> dict[str, torch.Tensor]:
    return rescale_state_dict(tensors, **options)


def from_file(tensors: dict[str, torch.Tensor], place: Path, **options: Any) -> dict[str, torch.Tensor]:
    return load_state_dict(save(place / "model.safetensors", tensors), **options)


def slices(tensors: dict[str, torch.Tensor], place: Path, **options: Any) -> dict[str, torch.Tensor]:
    with safe_open(save(place / "model.safetensors", tensors), **options) as opened:
        return opened.get_tensors()


def scanned(tensors: dict[str, torch.Tensor], place: Path, **options: Any) -> dict[str, torch.Tensor]:
    refusals = scan_checkpoint(save(place / "model.safetensors", tensors), **options).refusals
    if refusals:
        raise ScaleError("\n".join(refusals))
    return tensors


WAYS = [in_memory, from_file, slices, scanned]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("activations", ["rescale", "keep"])
@pytest.mark.parametrize("code", [0x10, 0x7E], ids=["fits", "does not fit"])
def test_refused(tmp_path: Path, way: Callable[..., Any], code: int, activations: str, bad: float) -> None:
    with pytest.raises(ScaleError, match=r"k_proj\.input_scale: 1 of 1 scale values are not finite"):
        way(given(code, bad), tmp_path, activation_scales=activations)


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("code", [0x10, 0x7E], ids=["fits", "does not fit"])
def test_let_through(tmp_path: Path, way: Callable[..., Any], code: int) -> None:
    """With nan="keep" it comes out as it went in, or not finite."""
    tensors = given(code, float("nan"))
    out = way(tensors, tmp_path, nan="keep")
    assert out["model.layers.0.self_attn.k_proj.input_scale"].isnan().all()
    if way is not slices and code == 0x10:
        assert all(same_bytes(out[name], t) for name, t in tensors.items())
