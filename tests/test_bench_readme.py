"""The figures of README.md and docs/performance.md come from the JSON, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks import __main__ as suite
from benchmarks import fidelity, kernel, load, plan, readme_table, threads
from benchmarks.common import RESULTS
from benchmarks.neuron_compile import __main__ as neuron_compile


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a run at tiny sizes: the figures mean nothing, the keys do."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_BATCH", 1)
        patch.setenv("NEURON_FP8_SHARED", str(out / "absent"))
        for command, options in (
            (load.main, ["--size=64KiB", "--repeats=1", "--cold-repeats=1", "--script-size=64KiB",
                         "--script-repeats=1", "--layout-size=64KiB", "--sizes=64KiB", "--thread-counts=2",
                         "--directory", str(out)]),
            (kernel.main, ["--cache-size=4KiB", "--memory-size=64KiB", "--side=128", "--repeats=1", "--no-slow"]),
            (fidelity.main, ["--side=128", "--hidden=64", "--layers=1", "--tokens=8"]),
            (neuron_compile.main, ["--backend=emulate", "--hidden=64", "--tokens=8"]),
        ):  # fmt: skip
            done = CliRunner().invoke(command, [*options, f"--out={out}"])
            assert done.exit_code == 0, f"{done.output}\n{done.exception}"
    return out


@pytest.fixture
def pages(tmp_path: Path) -> list[Path]:
    """A README and a page of tables."""
    files = [tmp_path / "README.md", tmp_path / "performance.md"]
    for path in files:
        path.write_text(f"# before\n\n{readme_table.BEGIN}\nold\n{readme_table.END}\n\nafter\n")
    return files


def run(results: Path, pages: list[Path], *options: str) -> int:
    where = [f"--results={results}", f"--readme={pages[0]}", f"--performance={pages[1]}"]
    return CliRunner().invoke(readme_table.main, [*where, *options]).exit_code


@pytest.mark.parametrize("one", [0, 1])
def test_check_tells_whether_a_page_is_what_was_measured(results: Path, pages: list[Path], one: int) -> None:
    readme = pages[one]
    assert run(results, pages, "--check") == 1
    assert run(results, pages) == 0
    text = readme.read_text()
    assert text.startswith("# before\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    assert run(results, pages, "--check") == 0
    assert run(results, pages) == 0
    assert readme.read_text() == text
    readme.write_text(re.sub(r"(\d) %", r"\g<1>1 %", text))
    assert readme.read_text() != text
    assert run(results, pages, "--check") == 1


def test_every_figure_is_in_the_json(results: Path, pages: list[Path], tmp_path: Path) -> None:
    """Change the JSON, and the text follows."""
    copy = tmp_path / "copy"
    shutil.copytree(results, copy)
    for name, change in (
        ("load", lambda r: r["warm"]["neuron_fp8_loader"].update(gb_per_s=123.4)),
        ("load", lambda r: r["script"]["README script"].update(median_s=9876.5)),
        ("load", lambda r: r["layout"]["neuron_fp8_loader, block -> row"].update(cpu_s=8765.43)),
        ("kernel", lambda r: r["memory"]["paths"]["memcpy"].update(gb_per_s=234.5)),
        ("fidelity", lambda r: r["logits"]["ratio"].update(kl_original=0.456)),
        ("neuron_compile", lambda r: r["backends"][0]["without"].update(nan=4711)),
    ):
        path = copy / f"{name}.json"
        data = json.loads(path.read_text())
        change(data["results"])
        path.write_text(json.dumps(data))
    assert run(copy, pages) == 0
    text = pages[1].read_text()
    for figure in ("123", "9876.5", "8765.43", "234", "0.46", "4711 of"):
        assert figure in text
    assert "Measured 20" in text
    assert "Measured 20" in pages[0].read_text()


def test_tables_are_whole(results: Path) -> None:
    text = readme_table.render(readme_table.load_results(results))
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, block
    assert "the whole script of Neuron's README" in text
    assert "None" not in text


def test_missing_results_are_named(tmp_path: Path) -> None:
    (tmp_path / "load.json").write_text("{}")
    with pytest.raises(click.ClickException, match=r"no kernel.json, fidelity.json, neuron_compile.json"):
        readme_table.load_results(tmp_path)


@pytest.mark.parametrize("text", ["", readme_table.BEGIN, f"{readme_table.END}{readme_table.BEGIN}"])
def test_a_readme_without_markers_is_refused(text: str) -> None:
    with pytest.raises(click.ClickException, match="once each"):
        readme_table.fill(text, "table")


def test_growth_is_drawn(results: Path) -> None:
    pytest.importorskip("altair")
    assert (results / "load.png").stat().st_size > 10_000


def test_the_readme_of_this_repository() -> None:
    if not all((RESULTS / f"{name}.json").is_file() for name in readme_table.NEEDED):
        pytest.skip("no results in the repository")
    done = CliRunner().invoke(readme_table.main, ["--check"])  # and docs/performance.md
    assert done.exit_code == 0, done.output


def test_every_benchmark_explains_itself() -> None:
    commands = (load.main, kernel.main, plan.main, fidelity.main, neuron_compile.main, threads.main)
    for command in commands:
        assert any(option.name == "out" for option in command.params)  # the suite passes it
    for command in (suite.main, *commands, readme_table.main):
        done = CliRunner().invoke(command, ["--help"])
        assert done.exit_code == 0
        assert len(done.output) > 400
    assert set(suite.QUICK) <= set(suite.available())
    assert {"load", "kernel", "fidelity", "neuron_compile"} <= set(suite.available())
