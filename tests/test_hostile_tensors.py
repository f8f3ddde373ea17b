"""State dicts that hold no memory, or that of others: an error that names the tensor, never a crash."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from support import TINY, codes, same_bytes
from torch._subclasses.fake_tensor import FakeTensorMode

from neuron_fp8_loader import OptionError, WeightError, load_state_dict, rescale_state_dict, safe_open
from neuron_fp8_loader.integrations.check import check_ready
from neuron_fp8_loader.options import Options


class Wrapper(torch.Tensor):
    """A subclass that is a header only, as quantization libraries make them."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)  # type: ignore[no-any-return,attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of a wrapper")


def weight() -> torch.Tensor:
    return codes([[0x7E, 0x10]] * 4)


def resized(tensor: torch.Tensor, nbytes: int) -> torch.Tensor:
    """A tensor whose memory was taken away under it, as sharding libraries do."""
    made = tensor.clone()  # numpy's own memory cannot be resized
    made.untyped_storage().resize_(nbytes)
    return made


HOLLOW = {
    "fake": lambda: FakeTensorMode().from_tensor(weight()),
    "fake and empty": lambda: FakeTensorMode().from_tensor(weight()[:0]),
    "wrapper": lambda: Wrapper((4, 2), torch.float8_e4m3fn),
    "resized": lambda: resized(weight(), 0),
    "cut short": lambda: resized(weight(), 3),
    "meta": lambda: weight().to("meta"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", list(HOLLOW))
def test_a_weight_without_memory(kind: str, inplace: bool) -> None:
    good = weight()
    tensors = {"m.weight": HOLLOW[kind](), "m.weight_scale": torch.ones(1), "n.weight": good}
    tensors["n.weight_scale"] = torch.ones(1)
    with pytest.raises(WeightError, match=r"m\.weight: is .*rescale it on the CPU"):
        rescale_state_dict(tensors, inplace=inplace)
    assert same_bytes(good, weight())


def test_a_scale_without_memory() -> None:
    hollow = FakeTensorMode().from_tensor(torch.ones(4, 1))
    with pytest.raises(WeightError, match=r"m\.weight_scale: is a FakeTensor"):
        rescale_state_dict({"m.weight": weight(), "m.weight_scale": hollow})


OTHERS = {
    "fake": lambda: FakeTensorMode().from_tensor(torch.ones(3)),
    "wrapper": lambda: Wrapper((4, 2), torch.bfloat16),
    "resized": lambda: resized(torch.ones(3), 0),
    "meta": lambda: torch.ones(3, device="meta"),
    "sparse": lambda: torch.ones(3).to_sparse(),
}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_beside_the_weights_it_passes(kind: str) -> None:
    other = OTHERS[kind]()
    ready = rescale_state_dict({"norm": other, "m.weight": weight(), "m.weight_scale": torch.ones(1)})
    assert ready["norm"] is other
    assert ready["m.weight_scale"].item() == 2


def test_a_parameter_without_a_shape() -> None:
    with pytest.raises(WeightError, match=r"lazy: a UninitializedParameter without a shape"):
        rescale_state_dict({"lazy": torch.nn.parameter.UninitializedParameter()})


@pytest.mark.parametrize("key", [3, None, ("m", "weight"), b"m.weight"])
def test_names_that_are_no_strings(key: Any) -> None:
    with pytest.raises(WeightError, match="names of tensors are strings"):
        rescale_state_dict({"m.weight": weight(), "m.weight_scale": torch.ones(1), key: torch.ones(1)})
    values = {"m.weight": weight(), "m.weight_scale": torch.ones(1), key: "no tensor"}
    assert rescale_state_dict(values)[key] == "no tensor"


@pytest.mark.parametrize("given", [None, 3, "m.weight", [("m.weight", torch.ones(1))], torch.ones(2)])
def test_what_is_no_state_dict(given: Any) -> None:
    with pytest.raises(OptionError, match="expected a state dict"):
        rescale_state_dict(given)


def test_inside_a_fake_mode() -> None:
    tensors = {"m.weight": weight(), "m.weight_scale": torch.ones(1)}
    with FakeTensorMode():
        with pytest.raises(WeightError, match="a torch mode is on that makes a FakeTensor"):
            rescale_state_dict(tensors, inplace=True)
        with pytest.raises(WeightError, match="outside of it"):
            load_state_dict(TINY)
        with safe_open(TINY / "model.safetensors") as opened, pytest.raises(WeightError, match="outside of it"):
            opened.get_tensor(opened.keys()[0])
    assert same_bytes(tensors["m.weight"], weight())


def test_the_last_look_passes_over_them() -> None:
    hollow = {kind: make() for kind, make in HOLLOW.items()}
    check_ready(hollow, "here", Options())
    with pytest.raises(WeightError, match="real: 4 codes above 240"):
        check_ready({**hollow, "real": weight()}, "here", Options())


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no float4_e2m1fn_x2")
def test_the_last_look_knows_nvfp4_stored_as_f4() -> None:
    """Its scales are e4m3fn, use the whole of its range, and are not read as FP8 weights."""
    packed = torch.zeros(4, 16, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    state = {"m.weight": packed, "m.weight_scale": weight(), "m.weight_scale_2": torch.ones(())}
    check_ready(state, "here", Options())
    with pytest.raises(WeightError, match=r"m\.weight_scale: 4 codes"):
        check_ready({**state, "m.weight": torch.zeros(4, 32)}, "here", Options())


def test_a_process_lives_on() -> None:
    """Crashes end the interpreter, so here is one to end: kernels given no memory would read at address 0."""
    program = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from neuron_fp8_loader import Fp8LoaderError, rescale_state_dict
w = torch.zeros(1 << 16, 2, dtype=torch.uint8).fill_(0x7E).view(torch.float8_e4m3fn)
gone = w.clone()
gone.untyped_storage().resize_(0)
for bad in (FakeTensorMode().from_tensor(w), gone):
    for pair in ({"m.weight": bad, "m.weight_scale": torch.ones(1)}, {"m.weight": w, "m.weight_scale": bad}):
        for inplace in (False, True):
            try:
                rescale_state_dict(pair, inplace=inplace)
            except Fp8LoaderError as error:
                print("refused")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["refused"] * 8), done.stderr
