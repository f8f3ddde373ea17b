"""What a conversion makes is the same with and without ``quick``, in bytes, strides and errors, but sooner."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuron_fp8_loader.codes import kernel
from neuron_fp8_loader.integrations import converting
from neuron_fp8_loader.integrations.converting import quick

E4M3FN = torch.float8_e4m3fn
Work = Callable[..., Any]


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = E4M3FN) -> torch.Tensor:
    made = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return made.view(dtype) if dtype.itemsize == 1 else made.to(dtype)


def empty(*shape: int, dtype: torch.dtype = E4M3FN) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8).view(dtype)


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "_WORTH", 1)
    monkeypatch.setattr(converting, "_SHARED", 1 << 12)


def seen(work: Work, *tensors: Any) -> Any:
    """What comes out, or torch's error."""
    try:
        made = work(*tensors)
    except Exception as error:
        return type(error), str(error)
    return made.shape, made.stride(), made.dtype, made.view(torch.uint8).tolist()


def placed(work: Work, make: Callable[[], tuple[Any, ...]], threads: int = 2) -> int:
    """How many matrices the kernel placed; what comes out is what torch alone makes."""
    expected, tensors = seen(work, *make()), make()
    with quick(threads), patch.object(kernel, "place", wraps=kernel.place) as place:
        found = seen(work, *tensors)
    assert found == expected
    return int(place.call_count)


def nxdi(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """How NxD Inference's own conversions put an expert in its place."""
    inner, fused = len(gate), empty(3, gate.shape[1], 2 * gate.shape[0])
    row = torch.narrow(fused, 0, 1, 1)
    torch.narrow(row, 2, 0, inner).copy_(gate.T.detach().clone())
    torch.narrow(row, 2, inner, inner).copy_(up.T.detach().clone())
    return fused


def by_index(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    fused = empty(3, gate.shape[1], 2 * gate.shape[0])
    fused[2] = torch.cat([gate, up], dim=0).T
    fused[0, :, : len(gate)] = up.T
    fused[-2, :, -len(gate) :] = gate.T
    return fused


WAYS: dict[str, tuple[Work, int]] = {
    "as NxD Inference": (nxdi, 2),
    "by index": (by_index, 3),
    "contiguous": (lambda a, b: a.T.contiguous(), 1),
    "a stack, contiguous": (lambda a, b: torch.stack([a, b]).transpose(1, 2).contiguous(), 2),
    "a stack of transposed": (lambda a, b: torch.stack([a.T, b.T]), 2),
    "a stack, one of them transposed": (lambda a, b: torch.stack([a.T, b.T.contiguous()]), 2),
    "side by side": (lambda a, b: torch.cat([a.T, b.T], dim=1), 2),
    "side by side, from the end": (lambda a, b: torch.cat((a.T, b.T), -1), 2),
    "one below another": (lambda a, b: torch.cat([a.T, b.T]), 2),
    "from a stack into a stack": (lambda a, b: empty(2, a.shape[1], len(a)).copy_(torch.stack([a, b]).mT), 2),
    "twice": (lambda a, b: a.T.contiguous().T.contiguous(), 2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [E4M3FN, torch.float8_e5m2, torch.uint8], ids=str)
def test_what_comes_out_is_torchs(way: str, dtype: torch.dtype) -> None:
    work, matrices = WAYS[way]
    casts = dtype != E4M3FN and way in ("as NxD Inference", "by index", "from a stack into a stack")
    for shape in ((64, 96), (33, 70), (2, 2), (129, 5)):

        def make(shape: tuple[int, int] = shape) -> tuple[Any, ...]:
            return matrix(*shape, dtype=dtype), matrix(*shape, seed=1, dtype=dtype)

        count = placed(work, make, threads=1)
        assert casts or count == matrices


NOT_OURS: dict[str, Work] = {
    "not transposed": lambda a: empty(*a.shape).copy_(a),
    "contiguous already": lambda a: a.contiguous(),
    "another dtype": lambda a: torch.zeros(a.shape[::-1], dtype=torch.bfloat16).copy_(a.T).view(torch.uint8),
    "larger elements": lambda a: a.bfloat16().T.contiguous(),
    "onto itself": lambda a: a[:5, :5].copy_(a[:5, :5].T),
    "a part of a row": lambda a: a[:, 1:].T.contiguous(),
    "every other row": lambda a: a[::2].T.contiguous(),
    "a vector": lambda a: empty(a.numel()).copy_(a.T.reshape(-1)),
    "one row": lambda a: a[:1].T.contiguous(),
    "nothing": lambda a: a[:0].T.contiguous(),
    "spread": lambda a: empty(4, a.shape[1], len(a)).copy_(a.T),
    "a row spread": lambda a: empty(a.shape[1], len(a)).copy_(a[:1].T),
    "into every other column": lambda a: empty(a.shape[1], 2 * len(a))[:, ::2].copy_(a.T),
    "into what is transposed itself": lambda a: empty(*a.shape).T.copy_(a.T),
    "clone": lambda a: a.T.clone(),
    "stacked last": lambda a: torch.stack([a.T, a.T], dim=2),
    "memory format": lambda a: a.T.contiguous(memory_format=torch.contiguous_format),
    "memory format, by place": lambda a: a.T.contiguous(torch.contiguous_format),
    "all by name": lambda a: torch.cat(tensors=[a.T, a.T], dim=0),
    "not blocking": lambda a: empty(*a.T.shape).copy_(a.T, non_blocking=True),
    "out": lambda a: torch.cat([a.T, a.T], out=empty(2 * a.shape[1], len(a))),
    "by a mask": lambda a: _set(empty(2, a.shape[1], len(a)), (True, 0), a.T),
    "by a list": lambda a: _set(empty(2, a.shape[1], len(a)), [0], a.T),
    "by None": lambda a: _set(empty(a.shape[1], len(a)), None, a.T),
    "by dots": lambda a: _set(empty(a.shape[1], len(a)), ..., a.T),
}


def _set(tensor: torch.Tensor, index: Any, value: torch.Tensor) -> torch.Tensor:
    tensor[index] = value
    return tensor


@pytest.mark.parametrize("way", NOT_OURS)
def test_torch_does_what_is_no_transposing_of_bytes(way: str) -> None:
    assert placed(NOT_OURS[way], lambda: (matrix(40, 72),)) == 0


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.skipif(not hasattr(torch, "quantize_per_tensor"), reason="this torch has no tensors with zero points")
def test_torch_copies_tensors_with_zero_points() -> None:
    def make() -> tuple[Any, ...]:
        return (torch.quantize_per_tensor(matrix(40, 72).bfloat16().float(), 2.0, 3, torch.qint8),)

    assert placed(lambda a: a.T.contiguous(), make) == 0


WRONG: dict[str, Work] = {
    "too small": lambda a: empty(3, 3).copy_(a.T),
    "more dimensions than its place": lambda a: empty(*a.T.shape).copy_(a.T[None]),
    "the other way round": lambda a: empty(2, 1, *a.T.shape).copy_(torch.stack([a, a]).mT),
    "unlike ones": lambda a: torch.stack([a.T, a.T[1:]]),
    "unlike sides": lambda a: torch.cat([a.T, a.T[1:]], dim=1),
    "a side too many": lambda a: torch.cat([a.T, a.T], 0, 0),
    "a place too many": lambda a: torch.stack([a.T, a.T], 0, 0),
    "no such side": lambda a: torch.cat([a.T, a.T], dim=2),
    "beyond the end": lambda a: _set(empty(2, *a.T.shape), 2, a.T),
    "unlike dtypes": lambda a: torch.cat([a.T, a.T.view(torch.uint8)]),
    "nothing to copy": lambda a: empty(*a.T.shape).copy_(),
    "none": lambda a: torch.cat([]),
    "a view that overlaps": lambda a: empty(1, len(a)).expand(a.shape[1], len(a)).copy_(a.T),
    "written to after all": lambda a: a.requires_grad_().T.contiguous(),
}


@pytest.mark.parametrize("way", WRONG)
def test_errors_are_torchs(way: str) -> None:
    assert placed(WRONG[way], lambda: (matrix(40, 72),)) == 0


@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(0, 70),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_any_shape(head: list[int], rows: int, columns: int, more: int, threads: int, seed: int) -> None:
    def make() -> tuple[Any, ...]:
        return matrix(*head, rows, columns, seed=seed), empty(*head, columns, rows + more)

    placed(lambda source, target: (target[..., more:].copy_(source.mT), target)[1], make, threads)
    placed(lambda source, target: source.mT.contiguous(), make, threads)


@pytest.mark.parametrize("write", [lambda t, s: t[0].copy_(s), lambda t, s: _set(t, 0, s)], ids=["copy_", "index"])
def test_a_tensor_written_to_counts_a_version(write: Work) -> None:
    # by its version it is told whether a tensor is as it was read
    target = empty(2, 72, 40)
    with quick(1), patch.object(kernel, "place", wraps=kernel.place) as place:
        write(target, matrix(40, 72).T)
    assert place.call_count == 1
    assert target._version > 0


@pytest.mark.parametrize(("count", "times"), [(3, 0), (4, 1), (9, 2), (18, 4)])
def test_what_is_freed_is_given_back_as_it_goes(count: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = matrix(40, 72)
    monkeypatch.setattr(converting, "_HELD", 4 * source.numel())
    with quick(1), patch.object(converting, "give_back", wraps=converting.give_back) as give_back:
        for _ in range(count):
            source.T.contiguous()
    assert give_back.call_count == times


@pytest.fixture
def _thawed() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_thawed")
def test_collections_find_what_the_block_makes_and_only_that() -> None:
    class Cycle:
        gone = 0

        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            Cycle.gone += 1

    def convert() -> None:
        assert gc.get_freeze_count() > 1000
        Cycle()
        gc.collect()
        assert Cycle.gone == 1
        raise KeyError("as a conversion may")

    with pytest.raises(KeyError), quick(1):
        convert()
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("_thawed")
def test_what_others_have_frozen_stays_so() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with quick(1):
        pass
    assert gc.get_freeze_count() == frozen > 0
