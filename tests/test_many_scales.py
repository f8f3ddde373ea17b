"""Small scales are rescaled together: to the bit as one by one, each in memory of its own, errors by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import blob, codes, save

from neuron_fp8_loader import ScaleError, load_state_dict

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def checkpoint(count: int) -> dict[str, torch.Tensor]:
    """Weights that fit and weights that do not, with scales of every float dtype and of several shapes."""
    rng = np.random.default_rng(count)
    made = {}
    for i in range(count):
        shape = ((), (1,), (4, 1))[i % 3]
        made[f"m.{i}.weight"] = codes([[0x7E if i % 5 else 0x10] * 8] * 4)
        drawn = torch.from_numpy(np.asarray(rng.uniform(0.1, 4, shape)))
        made[f"m.{i}.weight_scale"] = drawn.to(DTYPES[i % len(DTYPES)])
        made[f"m.{i}.input_scale"] = torch.tensor(float(rng.uniform(0.1, 4)))
    return made


def test_they_are_doubled_to_the_bit(tmp_path):
    before = checkpoint(1200)
    save(tmp_path / "model.safetensors", before)
    after = load_state_dict(tmp_path)
    for i in range(1200):
        for name, times in ((f"m.{i}.weight_scale", 2 if i % 5 else 1), (f"m.{i}.input_scale", 2)):
            assert after[name].shape == before[name].shape
            assert after[name].dtype == before[name].dtype
            assert blob(after[name]) == blob((before[name].double() * times).to(before[name].dtype)), name
    addresses = {tensor.untyped_storage().data_ptr() for tensor in after.values()}
    assert len(addresses) == len(after)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in after.values())


def test_more_of_them_than_go_together(tmp_path):
    """A batch ends before torch would start threads of its own."""
    made = {f"m.{i}.weight": codes([[0x7E] * 4] * 3000) for i in range(30)}
    made |= {f"m.{i}.weight_scale": torch.full((3000, 1), i + 1.0) for i in range(30)}
    save(tmp_path / "model.safetensors", made)
    after = load_state_dict(tmp_path)
    assert all(bool((after[f"m.{i}.weight_scale"] == 2 * (i + 1)).all()) for i in range(30))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_bad_one_is_named_among_many(tmp_path, value):
    made = checkpoint(300)
    for i in (36, 100, 204):
        made[f"m.{i}.weight_scale"] = torch.tensor([[value]])
        made[f"m.{i}.weight"] = codes([[0x7E] * 8] * 4)
    save(tmp_path / "model.safetensors", made)
    with pytest.raises(ScaleError) as error:
        load_state_dict(tmp_path)
    text = str(error.value)
    assert "3 problems" in text or "3 scales" in text
    assert text.index("m.100.weight_scale") < text.index("m.204.weight_scale")
    assert "m.36.weight_scale" in text
