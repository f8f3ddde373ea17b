"""``safe_open``: whole tensors and slices as ``load_file(always=True)`` gives them, each read by itself."""

from __future__ import annotations

import pytest
import safetensors
import torch
from support import TINY, can_save, codes, digests, random_codes, same_bytes, save, save_shards

from neuron_fp8_loader import load_file, safe_open
from neuron_fp8_loader.errors import CheckpointError, Fp8LoaderError, OptionError, ScaleError, WeightError

FILE = TINY / "model.safetensors"


@pytest.fixture
def mixed(tmp_path):
    tensors = {
        "a.weight": random_codes((16, 12), 1),
        "a.weight_scale": torch.rand(16, 1),
        "a.input_scale": torch.rand(2),
        "b.weight": random_codes((16, 12), 2, top=0x77),
        "b.weight_scale": torch.rand(16, 1).bfloat16(),
        "e.weight": random_codes((4, 8, 6), 3),
        "e.weight_scale": torch.arange(32, dtype=torch.uint8).view(4, 8),
        "f.weight": random_codes((8, 8), 4).view(torch.float8_e4m3fnuz),
        "u.weight": random_codes((8, 8), 5, top=0x77),
        "plain": torch.rand(6, 5),
        "empty": torch.rand(0, 5),
        "scalar": torch.tensor(3),
    }
    tensors["f.weight"].view(torch.uint8)[tensors["f.weight"].view(torch.uint8) == 0x80] = 1
    if not can_save(torch.float8_e4m3fnuz):
        del tensors["f.weight"]
    return save(tmp_path / "mixed.safetensors", tensors, {"format": "pt"})


@pytest.mark.parametrize("method", ["half", "ratio"])
def test_whole_tensors_equal_load_file_always(method):
    before = digests(TINY)
    expected = load_file(FILE, always=True, method=method)
    with safe_open(FILE, framework="pt", device="cpu", method=method) as f:
        for name in f.keys():  # noqa: SIM118
            assert same_bytes(f.get_tensor(name), expected[name])
        assert all(same_bytes(tensor, expected[name]) for name, tensor in f.get_tensors().items())
    assert digests(TINY) == before


def test_every_kind_of_tensor(mixed):
    expected = load_file(mixed, always=True)
    with safe_open(mixed) as f:
        assert sorted(f.keys()) == sorted(expected)
        for name, tensor in f.get_tensors().items():
            assert same_bytes(tensor, expected[name]), name


def test_it_reads_as_the_original_does(mixed):
    with safe_open(mixed) as ours, safetensors.safe_open(str(mixed), framework="pt") as theirs:
        assert ours.keys() == list(theirs.keys())
        assert ours.offset_keys() == list(theirs.offset_keys())
        assert ours.metadata() == theirs.metadata()
        for name in theirs.keys():  # noqa: SIM118
            one, other = ours.get_slice(name), theirs.get_slice(name)
            assert one.get_shape() == list(other.get_shape())
            assert one.get_dtype() == other.get_dtype()


INDEXES = [
    slice(None),
    slice(2, 5),
    slice(None, -3),
    slice(7, None),
    slice(5, 2),
    0,
    3,
    (slice(None), slice(1, 4)),
    (slice(2, 3), slice(None)),
    (slice(None), 2),
    (1, slice(0, 3)),
    (1, 2),
    (Ellipsis, slice(0, 2)),
    Ellipsis,
]


@pytest.mark.parametrize("index", INDEXES, ids=str)
@pytest.mark.parametrize(
    "name",
    ["a.weight", "a.weight_scale", "b.weight", "b.weight_scale", "e.weight", "e.weight_scale", "f.weight", "plain"],
)
def test_slices_commute(mixed, name, index):
    """Slicing and converting give the same in either order; an index that safetensors refuses is refused."""
    if name == "f.weight" and not can_save(torch.float8_e4m3fnuz):
        pytest.skip("this safetensors cannot write float8_e4m3fnuz")
    expected = load_file(mixed, always=True)[name]
    with safetensors.safe_open(str(mixed), framework="pt") as theirs:
        try:
            reference = theirs.get_slice(name)[index]
        except Exception:
            reference = None
    with safe_open(mixed) as f:
        part = f.get_slice(name)
        if reference is None:
            with pytest.raises(Exception):  # noqa: B017
                part[index]
            return
        got = part[index]
    assert got.shape == reference.shape
    assert same_bytes(got, expected[index])


def test_shards_put_together_again(mixed):
    expected = load_file(mixed, always=True)
    with safe_open(mixed) as f:
        for axis, cuts in ((0, (0, 4, 11, 16)), (1, (0, 5, 12))):
            index = [slice(None)] * axis
            part = f.get_slice("a.weight")
            rows = [part[(*index, slice(x, y))] for x, y in zip(cuts, cuts[1:], strict=False)]  # noqa: RUF007
            whole = torch.cat([r.view(torch.uint8) for r in rows], axis).view(torch.float8_e4m3fn)
            assert same_bytes(whole, expected["a.weight"])


def test_a_weight_that_fits_and_its_scale_are_converted_apart(tmp_path):
    """Reading the one tells nothing to the reader of the other, so both always change."""
    file = save(tmp_path / "m.safetensors", {"a.weight": codes([[0x40, 0x77]]), "a.weight_scale": torch.ones(1)})
    with safe_open(file) as f:
        assert f.get_tensor("a.weight_scale").item() == 2
    with safe_open(file) as f:
        assert f.get_slice("a.weight")[:, :1].view(torch.uint8).item() == 0x38


def test_scales_in_a_sibling_shard(tmp_path):
    one, two = save_shards(tmp_path, {"a.weight": codes([0x7E])}, {"a.weight_scale": torch.ones(1)})
    with safe_open(one) as f:
        assert f.keys() == ["a.weight"]
        assert f.get_tensor("a.weight").view(torch.uint8).tolist() == [0x76]
    with safe_open(two) as f:
        assert f.get_tensor("a.weight_scale").item() == 2


def test_nan(tmp_path):
    tensors = {"a.weight": codes([[1, 2], [0x7F, 4]]), "a.weight_scale": torch.tensor([[1.0], [float("nan")]])}
    file = save(tmp_path / "m.safetensors", tensors)
    with safe_open(file) as f:
        with pytest.raises(WeightError, match=r"m\.safetensors: a\.weight: 1 NaN codes"):
            f.get_tensor("a.weight")
        with pytest.raises(ScaleError, match=r"a\.weight_scale: 1 of 2 scale values are not finite"):
            f.get_tensor("a.weight_scale")
        assert f.get_slice("a.weight")[:1].view(torch.uint8).tolist() == [[0, 1]]
        assert f.get_slice("a.weight_scale")[:1].tolist() == [[2.0]]
    with safe_open(file, nan="keep") as f:
        assert f.get_tensor("a.weight").view(torch.uint8).tolist() == [[0, 1], [0x7F, 2]]


def test_unscaled(tmp_path):
    file = save(tmp_path / "m.safetensors", {"a.weight": codes([[1, 2], [0x7E, 4]])})
    with safe_open(file) as f:
        with pytest.raises(WeightError, match=r"a\.weight: 1 codes above 240"):
            f.get_tensor("a.weight")
        assert f.get_slice("a.weight")[:1].view(torch.uint8).tolist() == [[1, 2]]
    with safe_open(file, unscaled="dequantize") as f:
        assert f.get_slice("a.weight")[1:].tolist() == [[448.0, 2**-7]]
        assert f.get_slice("a.weight")[1:].dtype == torch.bfloat16
    with safe_open(file, unscaled="keep") as f:
        assert f.get_tensor("a.weight").view(torch.uint8).tolist() == [[1, 2], [0x7E, 4]]


def test_activation_scales(mixed):
    with safe_open(mixed, activation_scales="keep") as kept, safe_open(mixed) as rescaled:
        assert torch.equal(kept.get_tensor("a.input_scale") * 2, rescaled.get_tensor("a.input_scale"))


def test_inside_a_default_device(mixed):
    expected = load_file(mixed, always=True)
    with torch.device("meta"), safe_open(mixed) as f:
        for name in f.keys():  # noqa: SIM118
            assert same_bytes(f.get_tensor(name), expected[name])
        assert same_bytes(f.get_slice("a.weight")[3:5], expected["a.weight"][3:5])


def test_device(mixed):
    with safe_open(mixed, device="meta") as f:
        assert f.get_tensor("a.weight").device.type == "meta"
        assert f.get_slice("a.weight_scale")[:2].shape == (2, 1)


def test_arguments(tmp_path, mixed):
    with pytest.raises(OptionError, match="framework='np'"):
        safe_open(mixed, framework="np")
    with pytest.raises(OptionError, match="unknown option 'methd'"):
        safe_open(mixed, methd="half")
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError, match=r"takes one|no such file"):
            safe_open(path)
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(Fp8LoaderError, match=r"broken\.safetensors"):
        safe_open(tmp_path / "broken.safetensors")
