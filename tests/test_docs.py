"""The pages: links lead somewhere, and the errors that they name are errors that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def headings(page: Path) -> set[str]:
    """The anchors of a page, as they are made from its headings."""
    lines = re.sub(r"```.*?```", "", page.read_text(), flags=re.S).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in headings(there), target


def said() -> list[str]:
    """Every text in the package, with ... where a value goes."""
    found = []
    for file in (ROOT / "neuron_fp8_loader").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_error_that_is_explained_is_one_of_ours() -> None:
    ours = (ROOT / "docs" / "troubleshooting.md").read_text().split("## With the flag: our errors")[1]
    rows = [line.split(" | ")[0] for line in ours.splitlines() if line.startswith("| `")]
    phrases = [phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row)]
    assert len(phrases) > 12
    texts = said()
    for phrase in phrases:
        pattern = re.compile(
            ".*".join(map(re.escape, phrase.replace("2 candidates", "... candidates").split("..."))), re.S
        )
        assert any(pattern.search(text) for text in texts), phrase


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:tests|docs|benchmarks|examples|neuron_fp8_loader)/[\w./-]+)`", page.read_text()):
        assert (ROOT / name).exists(), name
