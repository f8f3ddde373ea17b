"""``python -m benchmarks.readme_table``: the figures of README.md and docs/performance.md, from the JSON of a run.

No number is typed by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from .common import RESULTS, in_units, machine_line
from .contenders import LAYOUT, LIMIT, OURS, READER, REFERENCE, SCRIPT

README = Path(__file__).resolve().parent.parent / "README.md"
PERFORMANCE = README.parent / "docs" / "performance.md"
BEGIN, END = "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->"
NEEDED = ("load", "kernel", "fidelity", "neuron_compile")

_LABELS = {
    OURS: f"**{OURS}**",
    READER: "its reader, nothing translated",
    LIMIT: "`preadv` into populated memory, no more",
    REFERENCE: "`safetensors.torch.load_file` + `clone()`",
    "load_file, pread": '`load_file(backend="pread")`',
    "README recipe in memory": "the recipe of Neuron's README, in memory",
    SCRIPT: "the whole script of Neuron's README",
}
# what comes out of those that read and rescale nothing is nan to the device
_READY = {OURS: "yes", f"{OURS}, ratio": "yes", "README recipe in memory": "yes", SCRIPT: "yes, on disk"}


def load_results(directory: Path) -> dict[str, Any]:
    """The JSON of each benchmark in ``NEEDED``. Raises click.ClickException, naming those that are missing."""
    missing = [name for name in NEEDED if not (directory / f"{name}.json").is_file()]
    if missing:
        raise click.ClickException(
            f"{directory}: no {', '.join(f'{name}.json' for name in missing)}; `make bench` writes them"
        )
    return {name: json.loads((directory / f"{name}.json").read_text(encoding="utf-8")) for name in NEEDED}


def render(found: Mapping[str, Any]) -> str:
    """The tables of docs/performance.md."""
    parts = [loading(found["load"]), kernel(found["kernel"]), fidelity(found["fidelity"])]
    parts += [compiled(found["neuron_compile"]), footer(found)]
    return "\n\n".join(part for part in parts if part)


def headline(found: Mapping[str, Any]) -> str:
    """The figures of the README's first screen."""
    warm, script = found["load"]["results"]["warm"], found["load"]["results"].get("script", {})
    ours, reference = warm[OURS], warm[REFERENCE]
    rows = [
        ("load, of the time of `safetensors.load_file` + `clone`", f"{ours['median_s'] / reference['median_s']:.2f} x")
    ]
    if SCRIPT in script:
        rows.append(
            ("load, against Neuron's script that writes a copy", f"{script[SCRIPT]['times_ours']:.0f} x faster")
        )
    rows.append(("memory at the peak, of the tensors' size", f"{ours['peak_over_size']:.2f} x"))
    fidelity = found["fidelity"]["results"]
    real = fidelity["real"] or list(fidelity["rows"])
    for name, label in (("half", "weights whose value changes"), ("ratio", "the same with 448/240 (Neuron's README)")):
        rows.append((label, _span((fidelity["rows"][source][name]["changed"] * 100 for source in real), "{:.3g} %")))
    text = "\n".join(f"| {label} | **{figure}** |" for label, figure in rows)
    return f"| | |\n| --- | ---: |\n{text}\n\n{footer({'load': found['load']})}"


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def loading(data: Mapping[str, Any]) -> str:
    results, rows = data["results"], []
    dropped, script = results.get("dropped", {}), results.get("script", {})
    measured = all("cpu_s" in entry for entry in results["warm"].values())
    for name, warm in results["warm"].items():
        cold = dropped.get(name)
        rows.append(
            [_LABELS.get(name, f"`{name}`"), f"{warm['median_s']:.2f}", f"{warm['times_ours']:.2f} x", _speed(warm),
             *_cpu(warm, measured), _speed(cold) if cold else "", *_memory(warm), "-", _READY.get(name, "no")]
        )  # fmt: skip
    if SCRIPT in script:
        entry = script[SCRIPT]
        rows.append(
            [f"{_LABELS[SCRIPT]}, on {in_units(entry['nbytes'])}", f"{entry['median_s']:.1f}",
             f"{entry['times_ours']:.0f} x", _speed(entry), *_cpu(entry, measured), "", *_memory(entry),
             in_units(entry["written"]), _READY[SCRIPT]]
        )  # fmt: skip
    columns = ["", "s", "time", "GB/s", *(["CPU s"] if measured else []), "GB/s, page cache dropped", "peak memory",
               "mapped files left out", "written", "Neuron-ready"]  # fmt: skip
    head = f"Loading {in_units(results['nbytes'])} of FP8 weights and scales, page cache warm, median of "
    text = f"{head}{data['settings']['repeats']} interleaved rounds:\n\n{_table(columns, rows)}"
    return "\n\n".join([text, *_loading_blocks(results.get("layout", {}))])


def _loading_blocks(results: Mapping[str, Any]) -> list[str]:
    """A checkpoint in blocks, as it is and to one scale a row."""
    if not results:
        return []
    rows = [
        [label, f"{entry['median_s']:.2f}", f"{entry['times_ours']:.2f} x", _speed(entry), f"{entry['cpu_s']:.2f}"]
        for label, entry in (("blocks stay", results[OURS]), ("block -> row", results[LAYOUT]))
    ]
    size = in_units(results[OURS]["nbytes"])
    return [_table([f"loading {size} in blocks of 128 x 128", "s", "time", "GB/s", "CPU s"], rows)]


def _cpu(entry: Mapping[str, Any], measured: bool) -> list[str]:
    return [f"{entry['cpu_s']:.2f}"] if measured else []


def _memory(entry: Mapping[str, Any]) -> list[str]:
    """Peak memory as multiples of the tensors: all, and without pages of mapped files."""
    own = entry["peak_anonymous"]
    return [f"{entry['peak_over_size']:.2f} x", f"{own / entry['nbytes']:.2f} x" if own else ""]


def _speed(entry: Mapping[str, Any]) -> str:
    return f"{entry['gb_per_s']:.3g}"


def kernel(data: Mapping[str, Any]) -> str:
    live, rows = data["machine"]["kernel"], []
    for place, label in (("cache", "in cache"), ("memory", "from memory"), ("memory_threads", "from memory")):
        entry = data["results"][place]
        count, paths = entry["threads"], entry["paths"]
        threads = f"{count} thread{'s' if count > 1 else ''}"
        cells = [_speed(paths[name]) for name in (f"{live}, half", f"{live}, ratio", "memcpy") if name in paths]
        rows.append([f"{label}, {threads}", *cells])
    columns = ["kernel, GB/s", f"`half` ({live})", f"`ratio` ({live})", "memcpy"]
    text = _table(columns, [row for row in rows if len(row) == len(columns)])
    return "\n\n".join([text, *_layout(data["results"]["layout"])])


def _layout(results: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, _speed(entry), f"{entry['speedup']:.1f} x", _decibels(entry["sqnr_db"])]
        for name, entry in results.items()
    ]
    if not any(name.startswith(OURS) for name in results):
        return []
    return [_table(["one weight in memory", "GB/s", "against the public scripts", "SQNR, dB"], rows)]


def fidelity(data: Mapping[str, Any]) -> str:
    results, rows = data["results"], []
    real = results["real"] or list(results["rows"])
    for name in ("checkpoint", "half", "ratio", "clamp to 240"):
        entries = [results["rows"][source][name] for source in real]
        exact = [error == 0 for error in results["codes"].get(name, [0])]
        logit = results["logits"][name]
        rows.append(
            [{"checkpoint": "the checkpoint itself, as e4m3fn"}.get(name, f"`{name}`"),
             "all" if name == "checkpoint" else f"{sum(exact)} of {len(exact)}",
             _span((e["changed"] * 100 for e in entries), "{:.3g} %"),
             _span((e["sqnr_db"] for e in entries), "{:.1f}"),
             _span((e["sqnr_original_db"] for e in entries), "{:.1f}"),
             f"{logit['kl_original']:.2g}", f"{logit['top_1_original'] * 100:.1f} %"]
        )  # fmt: skip
    columns = ["", "exact codes", "weights changed", "dB to the checkpoint", "dB to bf16", "KL to bf16", "top-1"]
    kind = "real checkpoints" if results["real"] else "random weights of several distributions"
    head = f"Fidelity over {len(real)} {kind}, and the logits of a small Llama:"
    return "\n\n".join([head, _table(columns, rows), _blocks(results["blocks"])])


def _blocks(results: Mapping[str, Any]) -> str:
    """Block scales to one scale a row, apart for scales that are powers of two."""
    rows = []
    for label, powers in (("float32 scales", False), ("scales 2^n", True)):
        sources = [methods for name, methods in results.items() if name.endswith("2^n") == powers]
        for method in sources[0] if sources else ():
            if method != "checkpoint":
                entries = [source[method] for source in sources]
                to_checkpoint, to_original = (
                    _span((entry[key] for entry in entries), "{:.1f}") for key in ("sqnr_db", "sqnr_original_db")
                )
                rows.append([f"{method}, {label}", to_checkpoint, to_original])
    return _table(["128 x 128 blocks to one scale a row", "dB to the checkpoint", "dB to bf16"], rows)


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def _span(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "exact"
    low, high = form.format(min(known)), form.format(max(known))
    return low if low == high else f"{low.removesuffix(' %')}-{high}"


def compiled(data: Mapping[str, Any]) -> str:
    rows = []
    for entry in data["results"]["backends"]:
        seen, before = entry["with"], entry["without"]
        if "finite" not in seen:
            continue
        without = before.get("refused") or (
            "finite" if before["finite"] else f"{before['nan']} of {before['outputs']} outputs nan"
        )
        after = "equal to the e4m3fn reference" if seen["equal"] else f"finite, within {seen['largest_error']:.1e}"
        versions = ", ".join(f"{name} {version}" for name, version in list(entry["versions"].items())[:3])
        rows.append([f"{entry['backend']} ({versions})", without, after if seen["finite"] else "**not finite**"])
    if not rows:
        return ""
    return _table(["two-layer FP8 Llama, compiled by", "without the loader", "with it"], rows)


def footer(found: Mapping[str, Any]) -> str:
    lines = []
    for name in found:
        line = f"Measured {found[name]['when'][:10]} on {machine_line(found[name]['machine'])}."
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def fill(text: str, table: str) -> str:
    """A page's text with the region between the markers replaced. Raises ClickException without markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise click.ClickException(f"the page must hold {BEGIN} and, below it, {END}, once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


@click.command(context_settings={"show_default": True})
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results",
    help="Directory of the JSON.",
)
@click.option(
    "--readme",
    type=click.Path(dir_okay=False, path_type=Path),
    default=README,
    show_default="README.md",
    help="File with the two markers, for the headline.",
)
@click.option(
    "--performance",
    type=click.Path(dir_okay=False, path_type=Path),
    default=PERFORMANCE,
    show_default="docs/performance.md",
    help="File with the two markers, for the tables.",
)
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 if a file differs.")
@click.option("--print", "only_print", is_flag=True, help="Print the Markdown, leave the files alone.")
def main(results: Path, readme: Path, performance: Path, check: bool, only_print: bool) -> None:
    """Fill the benchmark regions, between their two markers, from the JSON of the last run."""
    found, differ = load_results(results), False
    for page, text in ((readme, headline(found)), (performance, render(found))):
        if only_print:
            click.echo(text)
            continue
        before = page.read_text(encoding="utf-8")
        after = fill(before, text)
        if before == after:
            continue
        differ = True
        if check:
            click.echo(f"{page.name} differs from {results}: run `python -m benchmarks.readme_table`", err=True)
        else:
            page.write_text(after, encoding="utf-8")
    sys.exit(check and differ)


if __name__ == "__main__":
    main()
