"""Everything that hangs on the modules of a package, by identity: what was replaced, and has it been put back?"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping

Snapshot = Mapping[str, object]
_ABSENT = object()


def snapshot(*packages: str) -> Snapshot:
    """The path of each name in the packages' modules and classes -> what it stands for.

    Of functions also the code, the defaults and the attributes, of dicts, lists and sets what is in them. Submodules
    are left out: they hang on their packages once they are imported.
    """
    found: dict[str, object] = {"sys.meta_path": tuple(sys.meta_path)}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in packages:
            for path, value in _names(name, module):
                found[path] = value
                found.update(_inside(path, value))
    return found


def _names(name: str, module: types.ModuleType) -> Iterator[tuple[str, object]]:
    for key, value in list(vars(module).items()):
        if key in ("__builtins__", "__warningregistry__") or isinstance(value, types.ModuleType):
            continue
        yield f"{name}.{key}", value
        if isinstance(value, type) and value.__module__ == name:
            yield from ((f"{name}.{value.__qualname__}.{own}", it) for own, it in list(vars(value).items()))


def _inside(path: str, value: object) -> Iterator[tuple[str, object]]:
    value = getattr(value, "__func__", value)  # of a classmethod or staticmethod
    if isinstance(value, types.FunctionType):
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            yield f"{path}.{name}", getattr(value, name)
        value = vars(value)
    if isinstance(value, dict):
        yield from ((f"{path}[{key!r}]", item) for key, item in list(value.items()))
    elif isinstance(value, list | set | frozenset | tuple):
        yield from ((f"{path}[{place}]", item) for place, item in enumerate(value))


def changed(before: Snapshot, after: Snapshot) -> set[str]:
    """The paths that stand for another object now; those of modules imported since are not among them."""
    modules = {path.rpartition(".")[0] for path in before}
    return {
        path
        for path in before.keys() | after.keys()
        if path in before or path.rpartition(".")[0] in modules
        if not _same(before.get(path, _ABSENT), after.get(path, _ABSENT))
    }


def _same(one: object, other: object) -> bool:
    # numbers, texts and lists of them, such as a count of ranks, are made anew
    plain = isinstance(one, bool | int | float | str | list | tuple) and type(one) is type(other)
    return one is other or (plain and one == other)
