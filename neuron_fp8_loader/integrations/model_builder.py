"""NxD's ModelBuilder: a ``checkpoint_loader`` whose result is Neuron-ready."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

import torch

from ..errors import OptionError
from ..load.state_dict import rescale_state_dict
from ..options import Options
from .check import check_ready

P = ParamSpec("P")


def wrap_checkpoint_loader(
    fn: Callable[P, Mapping[str, torch.Tensor]], *, inplace: bool = False, **options: Any
) -> Callable[P, dict[str, torch.Tensor]]:
    """Make what a ``checkpoint_loader`` returns Neuron-ready.

    Args:
        fn: takes whatever its caller passes (ModelBuilder: nothing), returns name -> CPU tensor.
        inplace: rescale in the tensors that ``fn`` returns; saves memory where ``fn`` reads them afresh every time.
        **options: see ``Options``.

    Returns:
        a function with the signature of ``fn``. It gives plain tensors, and works inside ``init_on_device("meta")``,
        where ModelBuilder calls it. It raises Fp8LoaderError as ``rescale_state_dict`` does, and WeightError if an
        e4m3fn weight above 240 is left.

    Raises:
        OptionError: at once, for wrong options, or where ``fn`` is no function.
    """
    chosen = Options.of(options)
    if not callable(fn):
        raise OptionError(f"fn={fn!r}: expected a function that returns a state dict, not a {type(fn).__name__}")
    if not isinstance(inplace, bool):
        raise OptionError(f"inplace={inplace!r}: expected True or False")

    @functools.wraps(fn)
    def load(*args: P.args, **kwargs: P.kwargs) -> dict[str, torch.Tensor]:
        ready = rescale_state_dict(fn(*args, **kwargs), inplace=inplace, **options)
        check_ready(ready, getattr(fn, "__name__", "checkpoint_loader"), chosen)
        return ready

    return load
