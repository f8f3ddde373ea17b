"""The house is as docs/design.md says: imports point one way, and what is known in one place is named in one place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from neuron_fp8_loader import conventions
from tests.support import ROOT

PACKAGE = ROOT / "neuron_fp8_loader"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = (
    "errors", "host", "codes", "checkpoint", "conventions", "options", "plan", "load", "integrations", "tools", "cli"
)  # fmt: skip
"""From the ground up: a floor imports itself and those before it."""


def imported(file: Path) -> set[str]:
    """The floors that a file imports; ``TYPE_CHECKING`` imports too."""
    found = set()
    here = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = here[: len(here) - node.level + 1]
            modules = [f"{node.module}.x" if node.module else alias.name for alias in node.names]
            found |= {".".join((*package, module)) for module in modules}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("neuron_fp8_loader.")} - {"__version__"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    floor = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if floor in ("__init__", "__main__"):
        return
    below = FLOORS[: FLOORS.index(floor) + 1]
    assert imported(file) <= set(below), f"{floor} stands on {below}"


def test_the_design_page_lists_every_folder() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    folders = {d.name for d in PACKAGE.iterdir() if (d / "__init__.py").is_file()}
    assert set(re.findall(r"`(\w+)/`", page.split("## The recipe")[0])) == folders


def test_nothing_outside_lists_conventions() -> None:
    common = {"weight_scale", "weight_scale_inv", "scale", "torchao", "quanto"}  # also names of other things
    names = {rule.name for rule in conventions.conventions()} - common
    assert len(names) >= 10
    for file in FILES:
        if "conventions" in file.parts:
            continue
        strings = {n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)}
        assert not names & strings, file


def test_files_can_be_read_in_one_sitting() -> None:
    lengths = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in FILES}
    assert max(lengths.values()) < 400, sorted(lengths.items(), key=lambda item: -item[1])[:5]


def test_the_native_module_has_one_door() -> None:
    users = [file for file in FILES if re.search(r"import _kernel\b|_kernel import", file.read_text())]
    assert {str(file.relative_to(PACKAGE)) for file in users} == {"codes/kernel.py"}


def test_the_native_module_built_anywhere_runs_on_every_python() -> None:
    """Lengths by "#" mean int or Py_ssize_t by what the headers at build time made of them: 3.13's break in 3.12."""
    for file in (PACKAGE / "codes" / "_native").glob("*.c"):
        formats = re.findall(r'Py(?:Arg_Parse|_BuildValue)\w*\([^"]*"([^":]*)', file.read_text())
        assert not any("#" in text for text in formats), file
    assert "Py_LIMITED_API 0x030A0000" in (PACKAGE / "codes" / "_native" / "arguments.h").read_text()
