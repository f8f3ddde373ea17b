"""Plain torch: rescaling on the way into ``Module.load_state_dict``."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..errors import OptionError
from ..load.state_dict import rescale_state_dict
from ..options import Options


def rescale_on_load(module: torch.nn.Module, **options: Any) -> RemovableHandle:
    """Have ``module.load_state_dict`` take FP8 state dicts as GPUs know them, and load them Neuron-ready.

    The caller's dict and tensors stay as they were. ``strict``, ``assign=True`` and loading through a parent of
    ``module`` work as ever; only tensors below ``module`` are looked at, so a weight's scale must be there too.

    Args:
        module: any module; hooks of its children are not needed.
        **options: see ``Options``.

    Returns:
        a handle: ``handle.remove()`` ends it, and so does leaving a ``with`` block.

    Raises:
        OptionError: wrong options, or no module. ``load_state_dict`` raises Fp8LoaderError as ``rescale_state_dict``
            does, before anything of ``module`` is loaded.
    """
    Options.of(options)
    if not isinstance(module, torch.nn.Module):
        raise OptionError(f"module={module!r}: expected a torch.nn.Module, not a {type(module).__name__}")
    handle: RemovableHandle = module.register_load_state_dict_pre_hook(_Hook(options))
    return handle


class _Hook:
    """A class, not a closure, so that modules with it can be copied and pickled."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def __call__(self, module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # torch passes a copy of the caller's dict, which it cuts up for the children afterwards
        mine = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        ready = rescale_state_dict(mine, **self._options)
        for name in mine:
            if name not in ready:
                del state_dict[name]
        state_dict.update(ready)
