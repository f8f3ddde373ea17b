"""Arguments of public functions, checked: wrong ones are OptionErrors that say what was expected."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import OptionError


def checked_device(device: Any) -> torch.device:
    """The device that tensors go to. Raises OptionError where torch knows none of that name."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise OptionError(f"device={device!r}: expected a torch device such as 'cpu': {text}") from error


def check_backend(backend: Any) -> None:
    """Raise OptionError for a ``backend`` that is no name; which one it is does not matter here."""
    if not isinstance(backend, str):
        raise OptionError(f"backend={backend!r}: expected a name, as safetensors takes it, such as 'mmap'")
