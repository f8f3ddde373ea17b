"""Tensors that share memory: tied weights, views of one buffer. They are changed once, and share afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from .grain import GRAIN

Span = tuple[int, int]


def storage_id(tensor: torch.Tensor) -> Span:
    """(address, length) of the memory that the tensor is a view of.

    Both, because arrays that torch did not allocate can be wrapped twice, from the same address on, as storages of
    different lengths.
    """
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """Equal for two tensors that show the same memory in the same way."""
    return (storage_id(tensor), tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())


def span(tensor: torch.Tensor) -> Span:
    """(first, one past the last) byte that the tensor reaches in its storage; empty tensors reach none."""
    size = tensor.element_size()
    start = int(tensor.storage_offset()) * size
    if tensor.is_contiguous():  # empty ones are
        return start, start + tensor.numel() * size
    reach = sum((int(n) - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * size


def overlapping(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Group the names of CPU tensors that reach into the same bytes; every name is in exactly one group.

    Told by address, not by storage: one array wrapped twice (``torch.from_numpy``) is two storages.
    """
    groups: list[list[str]] = [[name] for name, tensor in tensors.items() if tensor.numel() == 0]
    reached: list[tuple[int, int, str]] = []
    for name, tensor in tensors.items():
        if tensor.numel():
            base = tensor.untyped_storage().data_ptr()
            start, stop = span(tensor)
            reached.append((base + start, base + stop, name))
    end = -1
    for start, stop, name in sorted(reached):
        if start >= end:
            groups.append([])
        groups[-1].append(name)
        end = max(end, stop)
    return groups


def is_plain(tensor: torch.Tensor) -> bool:
    """Dense CPU memory that can be looked into: not sparse, not on a device, not a subclass made of other tensors, not
    a fake one, and with its memory there (a storage can be resized to nothing under it)."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    if hasattr(tensor, "__tensor_flatten__") or hasattr(tensor, "fake_mode"):
        return False
    try:
        address, nbytes = storage_id(tensor)
        return tensor.numel() == 0 or (bool(address) and span(tensor)[1] <= nbytes)
    except (RuntimeError, TypeError, ValueError):  # no storage; lengths that are symbols; not initialized
        return False


def moved(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The same views of a copy of the one storage that all of ``tensors`` share."""
    views = list(tensors)
    copy = views[0].untyped_storage().clone()
    out = []
    for view in views:
        fresh = torch.empty(0, dtype=view.dtype, device="cpu")
        out.append(fresh.set_(copy, view.storage_offset(), view.shape, view.stride()))
    return out


def overwrite(view: torch.Tensor, value: torch.Tensor) -> None:
    """Copy into the memory that a tensor shows, whatever mode it was made in; neither may be large (``grain``)."""
    raw = torch.empty(0, dtype=view.dtype, device="cpu")
    raw.set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride()).copy_(value)


def change_once(views: list[torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace every element that any of ``views`` shows by ``change`` of it, once, in place.

    ``views`` are of one dtype and share a storage; ``change`` maps a 1-D tensor to one of the same length and dtype.
    Elements between the views stay as they are.
    """
    size = views[0].element_size()
    spans = [span(v) for v in views]
    low, high = min(s[0] for s in spans) // size, max(s[1] for s in spans) // size
    if low == high:
        return
    first = views[0]
    elements = torch.empty(0, dtype=first.dtype, device="cpu")
    elements = elements.set_(first.untyped_storage(), low, (high - low,), (1,))
    if all(view.is_contiguous() for view in views) and len(overlapping({str(k): v for k, v in enumerate(views)})) == 1:
        for part in elements.split(GRAIN // size):  # all of them, and no threads of torch's
            part.view(torch.uint8).copy_(change(part).view(torch.uint8))
        return
    shown = torch.zeros(high - low, dtype=torch.bool, device="cpu")
    for view in views:
        torch.as_strided(shown, view.shape, view.stride(), view.storage_offset() - low).fill_(True)
    # through bytes: indexing is not implemented for every FP8 dtype
    as_bytes = elements.view(torch.uint8).view(-1, size)
    changed = change(as_bytes[shown].view(-1).view(first.dtype))
    as_bytes[shown] = changed.view(torch.uint8).view(-1, size)


def once_each(
    tensors: Mapping[str, torch.Tensor], names: Iterable[str], change: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """``change`` of each named tensor; names of one and the same tensor get one and the same result."""
    done: dict[tuple[object, ...], torch.Tensor] = {}
    out = {}
    for name in names:
        if name in tensors:
            t = tensors[name]
            key = identity(t) if t.numel() else (name,)
            if key not in done:
                done[key] = change(t)
            out[name] = done[key]
    return out
