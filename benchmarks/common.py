"""What the benchmarks share: fair timing, medians and ratios, the machine's description, JSON and tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

import neuron_fp8_loader
from neuron_fp8_loader import kernel

RESULTS = Path(__file__).resolve().parent / "results"
T = TypeVar("T")
console = Console()

out_option = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="benchmarks/results",
    help="Directory of the JSON and the pictures.",
)


class WrongAnswer(click.ClickException):
    """A contender was fast and wrong; its time means nothing. Exit code 1."""


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call; the result is freed after the clock has stopped."""
    begin = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begin
    del result
    return seconds


def interleaved(contenders: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Run every contender once a round, ``repeats`` rounds, so that what disturbs the machine disturbs all of them.

    Each round begins with another contender, so that none always follows the same one.
    """
    names = list(contenders)
    results: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(repeats):
        for step in range(len(names)):
            name = names[(turn + step) % len(names)]
            results[name].append(contenders[name]())
    return results


def summarize(seconds: Sequence[float], nbytes: int, reference: Sequence[float] | None = None) -> dict[str, Any]:
    """Median, range and raw times of one contender.

    Args:
        seconds: one entry a round.
        nbytes: bytes that one run handles.
        reference: the reference's times in the same rounds. ``speedup`` is the median over rounds of how many times
            as fast as the reference this contender was, which a disturbance of whole rounds does not change.
    """
    middle = statistics.median(seconds)
    found: dict[str, Any] = {
        "median_s": middle,
        "min_s": min(seconds),
        "max_s": max(seconds),
        "gb_per_s": nbytes / middle / 1e9,
        "nbytes": nbytes,
        "runs_s": list(seconds),
    }
    if reference is not None:
        found["speedup"] = statistics.median(r / s for r, s in zip(reference, seconds, strict=True))
    return found


def machine() -> dict[str, Any]:
    """What the numbers hang on. No host names: the JSON is made to be published."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "cpu": _cpu(),
        "cores": cores,
        "memory_gib": _memory_gib(),
        "instance": _instance(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "kernel": kernel.active,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    for package in ("torch", "safetensors", "numpy", "jax", "torch-neuronx", "neuronx-cc"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine_line(data: Mapping[str, Any]) -> str:
    """The machine in one line, for captions."""
    kind = f"{data['instance']}, " if data.get("instance") else ""
    memory = f", {data['memory_gib']} GiB" if data.get("memory_gib") else ""
    return (
        f"{kind}{data['cpu']}, {data['cores']} cores{memory}, {data['system']}; Python {data['python']}, "
        f"torch {data.get('torch', '?')}, safetensors {data.get('safetensors', '?')}; kernel {data['kernel']}"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpu() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return " ".join(value.split())
    return platform.processor() or platform.machine()


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (ValueError, OSError, AttributeError):
        return None


def _instance() -> str:
    """The EC2 instance type, which Nitro hosts give as the board's product name; empty elsewhere."""
    if "Amazon EC2" not in _read("/sys/devices/virtual/dmi/id/sys_vendor"):
        return ""
    return _read("/sys/devices/virtual/dmi/id/product_name").strip()


def write(out: Path, name: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> Path:
    """Write ``out/name.json``: what was measured, how, when, and on what."""
    out.mkdir(parents=True, exist_ok=True)
    data = {
        "benchmark": name,
        "version": neuron_fp8_loader.__version__,
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "settings": dict(settings),
        "results": dict(results),
    }
    path = out / f"{name}.json"
    partial = out / f"{name}.json.tmp"  # so that an interrupted run leaves the last good file
    partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
    console.print(f"[dim]{path}[/dim]", soft_wrap=True)
    return path


def finite(value: float) -> float | None:
    """JSON has no inf and no nan: None stands for both."""
    return value if value - value == 0 else None


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print a table; the first column is text, the others are numbers."""
    shown = Table(title=title, caption=caption or None, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in rows:
        shown.add_row(*row)
    # not on a terminal (a log, a pipe): as wide as the table needs, so that no figure is cut off
    (console if console.is_terminal else Console(width=200)).print(shown)


def plotting() -> Any | None:
    """altair; None (and a word why) where it, or what it writes pictures with, is not installed."""
    try:
        import altair
        import vl_convert  # noqa: F401
    except ImportError:
        console.print("[yellow]no picture: altair is not installed (pip install altair vl-convert-python)[/yellow]")
        return None
    return altair


def save_chart(chart: Any, target: Path) -> Path:
    """Write an altair chart as a picture, and say where."""
    chart = chart.configure_view(stroke=None).configure_axis(grid=False).configure_title(anchor="middle")
    chart.save(str(target), ppi=130)
    console.print(f"[dim]{target}[/dim]", soft_wrap=True)
    return target


def size_option(text: str) -> int:
    """``"1GiB"``, ``"256MiB"``, ``"64KiB"`` or plain bytes as a number of bytes."""
    for suffix, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("", 1)):
        if text.endswith(suffix):
            try:
                number = float(text[: len(text) - len(suffix)])
            except ValueError:
                break
            if number > 0:
                return int(number * factor)
            break
    raise click.BadParameter(f"{text!r}: expected a size like 1GiB, 256MiB or 64KiB")


class Size(click.ParamType):  # type: ignore[type-arg]
    """A click type for sizes: ``1GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return value if isinstance(value, int) else size_option(str(value))


def in_units(nbytes: float) -> str:
    """``1.5 GiB``, ``256 MiB``."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"
