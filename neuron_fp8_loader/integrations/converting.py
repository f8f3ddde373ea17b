"""What makes a model's own conversion slow, done quickly without its knowing: transposed copies, and collections."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..codes import kernel
from ..host.memory import give_back
from ..host.parallel import run

_WORTH = 1 << 14  # bytes of a matrix; torch copies less in some microseconds
_SHARED = 1 << 22  # bytes of a matrix from which on several threads are quicker than one
_HELD = 1 << 28  # bytes copied, and mostly freed then, after which memory is given back


@contextmanager
def quick(threads: int) -> Iterator[None]:
    """Within the block, torch's copies that transpose one-byte tensors run on the kernel, and collections are short.

    A conversion transposes each expert's weight, which torch does byte by byte, and some call ``gc.collect()`` for
    each layer, which goes through all objects of all imported modules. What comes out is the same, in bytes, shapes
    and strides. Experts freed one by one leave gaps, in which no layer has room: they are given back as it goes, or
    the peak would be twice the checkpoint. It holds for the calling thread; on others, all is as ever.

    Args:
        threads: how many copy a large matrix.
    """
    mine = gc.get_freeze_count() == 0  # whoever has frozen objects will want to thaw them
    if mine:
        gc.freeze()  # what is there already is no garbage that the conversion makes
    try:
        with _Quick(threads):
            yield
    finally:
        if mine:
            gc.unfreeze()


class _Quick(TorchFunctionMode):
    def __init__(self, threads: int) -> None:
        super().__init__()
        self.threads, self.held = threads, 0
        # and with how many arguments by place, which by name; with others it is torch's
        self.ways: dict[Any, tuple[Callable[..., torch.Tensor | None], set[int], set[str]]] = {
            torch.Tensor.copy_: (self.copy_, {2}, set()),
            torch.Tensor.__setitem__: (self.setitem, {3}, set()),
            torch.Tensor.contiguous: (self.contiguous, {1}, set()),
            torch.stack: (self.stack, {1, 2}, {"dim"}),
            torch.cat: (self.cat, {1, 2}, {"dim"}),
        }

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.ways:
            way, counts, names = self.ways[func]
            done = way(*args, **kwargs) if len(args) in counts and kwargs.keys() <= names else None
            if done is not None:
                return done
        return func(*args, **kwargs)

    # each of these returns None, and has changed nothing, where torch is to do it

    def copy_(self, target: Any, source: Any) -> torch.Tensor | None:
        return target if self.turned(source, target) else None

    def setitem(self, target: Any, index: Any, source: Any) -> torch.Tensor | None:
        several = index if isinstance(index, tuple) else (index,)
        views = all(type(i) in (int, slice) for i in several)  # anything else, a bool too, makes a copy
        if type(target) is not torch.Tensor or not views or not _turns(source):
            return None
        return target if self.turned(source, target[index]) else None

    def contiguous(self, tensor: Any) -> torch.Tensor | None:
        return None if not _turns(tensor) else self.filled([tensor], tensor.shape, [()])

    def stack(self, tensors: Any, dim: Any = 0) -> torch.Tensor | None:
        if dim != 0 or not _alike(tensors) or any(tensor.shape != tensors[0].shape for tensor in tensors):
            return None
        return self.filled(tensors, (len(tensors), *tensors[0].shape), [(k,) for k in range(len(tensors))])

    def cat(self, tensors: Any, dim: Any = 0) -> torch.Tensor | None:
        if type(dim) is not int or not _alike(tensors) or not -tensors[0].dim() <= dim < tensors[0].dim():
            return None
        dim %= tensors[0].dim()
        others = {(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors}
        if len(others) > 1:
            return None
        ends = list(itertools.accumulate(tensor.shape[dim] for tensor in tensors))
        head = (slice(None),) * dim
        places = [(*head, slice(e - t.shape[dim], e)) for e, t in zip(ends, tensors, strict=True)]
        return self.filled(tensors, (*tensors[0].shape[:dim], ends[-1], *tensors[0].shape[dim + 1 :]), places)

    def filled(self, tensors: Sequence[torch.Tensor], shape: Sequence[int], places: Sequence[Any]) -> torch.Tensor:
        """A new contiguous tensor, with each of ``tensors`` at its place."""
        made = torch.empty(tuple(shape), dtype=tensors[0].dtype, device="cpu")
        for tensor, place in zip(tensors, places, strict=True):
            if not self.turned(tensor, made[place]):
                made[place].copy_(tensor)
        return made

    def turned(self, source: Any, target: Any) -> bool:
        """Copy, if that transposes matrices of bytes: True. If not, nothing is done."""
        if not (_turns(source) and _plain(target)) or source.dtype != target.dtype:
            return False
        more = target.dim() - source.dim()
        if more < 0 or target.shape[more:] != source.shape or any(size != 1 for size in target.shape[:more]):
            return False
        target = target[(0,) * more]
        if target.stride(-1) != 1 or target.stride(-2) < target.shape[-1]:
            return False
        if source.untyped_storage().data_ptr() == target.untyped_storage().data_ptr():
            return False
        target[..., :1, :1].copy_(source[..., :1, :1])  # torch's own objections, and the version that it counts
        for at in itertools.product(*map(range, source.shape[:-2])):
            self.place(source[at].T, target[at])
            self.held += source[at].numel()
            if self.held >= _HELD:
                self.held = 0
                give_back()
        return True

    def place(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """``target = source.T``, for a contiguous matrix."""
        rows = len(source)
        if source.numel() < _SHARED or self.threads == 1:
            kernel.place(source, target)
            return
        each = -(-rows // self.threads // 64) * 64  # 64 bytes are a cache line, which is best written by one
        parts = [slice(first, min(first + each, rows)) for first in range(0, rows, each)]
        run(parts, lambda part: kernel.place(source[part], target[:, part]), self.threads)


def _plain(value: Any) -> bool:
    """Is it an ordinary tensor of matrices of bytes?"""
    return (
        type(value) is torch.Tensor
        and value.dim() >= 2
        and value.element_size() == 1
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not (value.requires_grad or value.is_quantized)
    )


def _turns(value: Any) -> bool:
    """Are its matrices transposed, and large enough for the kernel to be quicker?"""
    if not _plain(value):
        return False
    rows, columns = value.shape[-2:]
    return bool(min(rows, columns) > 1 and rows * columns >= _WORTH and value.stride()[-2:] == (1, rows))


def _alike(tensors: Any) -> bool:
    """Are they some that torch would neither convert nor lay down in another order, and one of them transposed?"""
    return (
        isinstance(tensors, (list, tuple))
        and any(map(_turns, tensors))
        and all(map(_plain, tensors))
        and len({(tensor.dtype, tensor.dim()) for tensor in tensors}) == 1
        and tensors[0].dim() <= 3
    )
