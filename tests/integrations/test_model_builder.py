"""wrap_checkpoint_loader, called as NxD's ModelBuilder calls it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from neuron_fp8_loader import Fp8LoaderError, OptionError, WeightError, wrap_checkpoint_loader
from tests.integrations.checkpoints import same_for_the_device, state_dict
from tests.support import raw


def neuron_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix("model.").replace(".weight_scale", ".scale"): t.clone() for n, t in tensors.items()}


def test_the_result_is_ready_and_the_source_as_it_was() -> None:
    original = state_dict()
    cached = neuron_names(original)
    before = {name: raw(t).copy() for name, t in cached.items()}
    load = wrap_checkpoint_loader(lambda: cached)
    for _ in range(2):
        ready = load()
        assert same_for_the_device(ready, original)
    assert all((raw(t) == before[name]).all() for name, t in cached.items())


def test_inplace_takes_no_more_memory() -> None:
    original = state_dict()
    fresh = neuron_names(original)
    ready = wrap_checkpoint_loader(lambda: fresh, inplace=True)()
    assert same_for_the_device(ready, original)
    assert all(t.data_ptr() == fresh[name].data_ptr() for name, t in ready.items())


def test_same_signature_same_arguments() -> None:
    def load(path: Path, *, layers: int = 1) -> dict[str, torch.Tensor]:
        """Reads it."""
        assert (path, layers) == (Path("x"), 2)
        return neuron_names(state_dict())

    wrapped = wrap_checkpoint_loader(load, method="ratio")
    assert inspect.signature(wrapped) == inspect.signature(load)
    assert wrapped.__doc__ == "Reads it."
    assert "lm_head.weight" in wrapped(Path("x"), layers=2)


def test_inside_meta_it_gives_plain_tensors_on_the_cpu() -> None:
    original = state_dict()
    fresh = neuron_names(original)
    with torch.device("meta"):
        ready = wrap_checkpoint_loader(lambda: fresh)()
    assert {type(t) for t in ready.values()} == {torch.Tensor}
    assert same_for_the_device(ready, original)


def test_parameters_come_out_as_tensors_or_as_they_were() -> None:
    original = state_dict()
    fresh = {n: torch.nn.Parameter(t, requires_grad=False) for n, t in neuron_names(original).items()}
    assert same_for_the_device(wrap_checkpoint_loader(lambda: fresh)(), original)


def test_wrong_options_are_refused_at_once() -> None:
    with pytest.raises(OptionError, match="methd"):
        wrap_checkpoint_loader(dict, methd="half")


def test_what_cannot_be_made_ready_stops_the_load() -> None:
    large = torch.full((4, 4), 448.0).to(torch.float8_e4m3fn)
    with pytest.raises(Fp8LoaderError, match=r"x\.weight"):
        wrap_checkpoint_loader(lambda: {"x.weight": large})()
    with pytest.raises(WeightError, match=r"x\.weight: 16 codes above 240"):
        wrap_checkpoint_loader(lambda: {"x.weight": large}, unscaled="keep")()
