"""Calling a function as soon as a module has been imported, be that now or later."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]


class PostImport(importlib.abc.MetaPathFinder):
    """A finder that finds nothing itself: it has others find the modules it waits for, and looks on as they load."""

    def __init__(self, callbacks: Mapping[str, Callback]) -> None:
        self._callbacks = callbacks
        self._local = threading.local()
        self._underway: set[str] = set()

    def install(self) -> None:
        """Wait for the modules; for those that are there already, call back now.

        One that is being imported just now (its import led to ours) is called back for at the next import after it.
        """
        sys.meta_path.insert(0, self)
        for name, callback in self._callbacks.items():
            module = sys.modules.get(name)
            if module is not None and _is_underway(module):
                self._underway.add(name)
            elif module is not None:
                callback(module)

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if self._underway and not getattr(self._local, "busy", False):
            self._settle()
        if fullname not in self._callbacks or getattr(self._local, "busy", False):
            return None
        self._local.busy = True  # another finder of this kind may ask us back
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            self._local.busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._callbacks[fullname])
        return spec

    def _settle(self) -> None:
        self._local.busy = True  # a callback may import
        try:
            for name in list(self._underway):
                module = sys.modules.get(name)
                if module is None or not _is_underway(module):
                    self._underway.discard(name)  # one whose import failed is looked for anew
                    if module is not None:
                        self._callbacks[name](module)
        finally:
            self._local.busy = False

    def _ask_others(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None


def _is_underway(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


class _Loader(importlib.abc.Loader):
    """The real loader, with a call back at the end; it leaves no trace in the module."""

    def __init__(self, real: Any, callback: Callback) -> None:
        self._real, self._callback = real, callback

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._real.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._real
        module.__loader__ = self._real
        self._real.exec_module(module)
        self._callback(module)
