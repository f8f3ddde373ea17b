"""rescale_on_load: torch's own load_state_dict, but for the values of FP8 weights and their scales."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch

from neuron_fp8_loader import OptionError, WeightError, rescale_on_load, rescale_state_dict
from tests.support import e4m3fn, fp8, ieee_e4m3, raw


class Fp8Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8, 16).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("weight_scale", torch.ones(8, 1))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = Fp8Linear(), Fp8Linear(), torch.nn.LayerNorm(4)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Block(), Block()])
        self.head = Fp8Linear()


def gpu_state_dict(module: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    made = {}
    for name, t in module.state_dict().items():
        if t.dtype == torch.float8_e4m3fn:
            values = rng.uniform(16, 448, tuple(t.shape))  # halves are exact
            values[0, 0] = 448
            made[name] = fp8(values)
        else:
            made[name] = torch.from_numpy(rng.uniform(0.5, 1, tuple(t.shape)).astype(np.float32))
    return made


def loaded_exactly(module: torch.nn.Module, original: dict[str, torch.Tensor], below: str = "") -> bool:
    """Does the device see what a GPU would, and is all else as in the state dict?"""
    now = module.state_dict()
    for name, t in original.items():
        if not name.startswith(below):
            continue
        if t.dtype == torch.float8_e4m3fn:
            scale = name + "_scale"
            got = ieee_e4m3(now[name]) * now[scale].double().numpy()
            if not np.array_equal(got, e4m3fn(t) * original[scale].double().numpy()):
                return False
        elif not name.endswith("_scale") and not torch.equal(now[name], t):
            return False
    return True


def as_it_is(module: torch.nn.Module, original: dict[str, torch.Tensor], below: str = "") -> bool:
    now = module.state_dict()
    return all((raw(now[n]) == raw(t)).all() for n, t in original.items() if n.startswith(below))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_whole_model(assign: bool, strict: bool) -> None:
    model = Model()
    original = gpu_state_dict(model)
    with rescale_on_load(model):
        result = model.load_state_dict(original, strict=strict, assign=assign)
    assert loaded_exactly(model, original)
    assert result == ([], [])
    assert (model.layers[0].norm.weight.data_ptr() == original["layers.0.norm.weight"].data_ptr()) is assign


@pytest.mark.parametrize("assign", [False, True])
def test_the_callers_dict_and_tensors_stay_as_they_were(assign: bool) -> None:
    model = Model()
    original = gpu_state_dict(model)
    objects, before = dict(original), {name: raw(t).copy() for name, t in original.items()}
    rescale_on_load(model)
    model.load_state_dict(original, assign=assign)
    assert list(original) == list(objects)
    assert all(original[name] is t and (raw(t) == before[name]).all() for name, t in objects.items())


def test_a_child_loaded_through_its_parent() -> None:
    model = Model()
    original = gpu_state_dict(model)
    with rescale_on_load(model.layers[1]):
        assert model.load_state_dict(original) == ([], [])
    assert loaded_exactly(model, original, "layers.1.")
    assert as_it_is(model, original, "layers.0.")
    assert as_it_is(model, original, "head.")


def test_a_child_loaded_by_itself() -> None:
    model = Model()
    original = gpu_state_dict(model.layers[0])
    with rescale_on_load(model.layers[0]):
        model.layers[0].load_state_dict(original)
    assert loaded_exactly(model.layers[0], original)


def test_hooks_of_parent_and_child_do_not_add_up() -> None:
    model = Model()
    original = gpu_state_dict(model)
    with rescale_on_load(model), rescale_on_load(model.layers[0]), rescale_on_load(model.layers[0].up):
        model.load_state_dict(original)
    assert loaded_exactly(model, original)


def test_remove_and_with_undo_it() -> None:
    model = Model()
    original = gpu_state_dict(model)
    handle = rescale_on_load(model)
    handle.remove()
    handle.remove()
    with rescale_on_load(model):
        pass
    model.load_state_dict(original)
    assert as_it_is(model, original)


def test_loading_twice_gives_the_same() -> None:
    model = Model()
    original = gpu_state_dict(model)
    rescale_on_load(model)
    model.load_state_dict(original)
    first = copy.deepcopy(model.state_dict())
    model.load_state_dict(original)
    assert as_it_is(model, first)
    model.load_state_dict(first)  # its own weights fit already
    assert as_it_is(model, first)


def compare_errors(change: Any, strict: bool = True) -> None:
    """torch says the same of a wrong state dict with the hook and without."""
    messages = []
    for hooked in (False, True):
        model = Model()
        state_dict = gpu_state_dict(model)
        change(state_dict)
        if hooked:
            rescale_on_load(model)
        if not strict:
            messages.append(str(model.load_state_dict(state_dict, strict=False)))
            continue
        with pytest.raises(RuntimeError) as error:
            model.load_state_dict(state_dict)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("strict", [True, False])
def test_missing_and_unexpected_keys(strict: bool) -> None:
    compare_errors(lambda sd: sd.pop("layers.0.norm.weight"), strict)
    compare_errors(lambda sd: sd.update(more=torch.ones(1)), strict)
    compare_errors(lambda sd: sd.update({"layers.0.up.more": torch.ones(1)}), strict)


def test_wrong_shapes() -> None:
    compare_errors(lambda sd: sd.update({"layers.0.norm.weight": torch.ones(5)}))


def test_what_cannot_be_rescaled_stops_the_load_before_anything_is_loaded() -> None:
    model = Model()
    original = gpu_state_dict(model)
    before = copy.deepcopy(model.state_dict())
    rescale_on_load(model)
    del original["head.weight_scale"]
    with pytest.raises(WeightError, match=r"head\.weight"):
        model.load_state_dict(original)
    assert as_it_is(model, before)


def test_options() -> None:
    model = Fp8Linear()
    original = gpu_state_dict(model)
    with pytest.raises(OptionError, match="methd"):
        rescale_on_load(model, methd="half")
    assert not model._load_state_dict_pre_hooks
    with rescale_on_load(model, method="ratio"):
        model.load_state_dict(original)
    assert as_it_is(model, rescale_state_dict(original, method="ratio"))


def test_extra_state_and_the_version_of_modules_pass() -> None:
    class Versioned(Fp8Linear):
        _version = 3
        seen: Any = None

        def get_extra_state(self) -> Any:
            return {"a": 1}

        def set_extra_state(self, state: Any) -> None:
            self.seen = state

        def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
            self.version = local_metadata.get("version")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    source, model = Versioned(), Versioned()
    with rescale_on_load(model):
        model.load_state_dict(source.state_dict())
    assert (model.seen, model.version) == ({"a": 1}, 3)


def test_a_module_with_the_hook_can_be_copied_and_saved() -> None:
    model = Fp8Linear()
    original = gpu_state_dict(model)
    rescale_on_load(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other.load_state_dict(original)
        assert loaded_exactly(other, original)


def test_inside_meta_with_assign() -> None:
    with torch.device("meta"):
        model = Model()
    original = gpu_state_dict(Model())
    with rescale_on_load(model), torch.device("meta"):
        model.load_state_dict(original, assign=True)
    assert loaded_exactly(model, original)
