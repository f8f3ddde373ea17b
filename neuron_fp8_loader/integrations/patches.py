"""Replacing functions of other packages, so that all of it can be undone."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger("neuron_fp8_loader")

Wrapper = Callable[..., Any]
"""Called as ``wrapper(original, *args, **kwargs)``; of a classmethod the class comes first among ``args``."""


class Patches:
    """The names replaced so far. A replacement that somebody still holds after ``restore`` calls the original."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any, Any]] = []
        self._live: set[object] = set()

    def wrap(self, owner: Any, name: str, wrapper: Wrapper) -> bool:
        """Wrap the function or method ``owner.name``. Returns whether ``owner`` itself has that name."""
        before = vars(owner).get(name)
        if before is None:
            return False
        kind = type(before) if isinstance(before, classmethod | staticmethod) else None
        original = before.__func__ if kind else before
        token = object()  # one each: wrapping anew must not wake an old replacement
        self._live.add(token)

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            if token not in self._live:
                return original(*args, **kwargs)
            return wrapper(original, *args, **kwargs)

        after = kind(patched) if kind else patched
        setattr(owner, name, after)
        self._done.append((owner, name, before, after))
        return True

    def restore(self) -> None:
        """Put back every name, last one first. A name that somebody else has replaced since stays theirs."""
        self._live.clear()
        while self._done:
            owner, name, before, after = self._done.pop()
            if vars(owner).get(name) is after:
                setattr(owner, name, before)
            else:
                log.warning("%s.%s was replaced by somebody else too and stays so", owner.__name__, name)
