"""The pictures of the ``load`` benchmark, from its JSON."""

from __future__ import annotations

import json
from pathlib import Path

from .common import console, machine_line, plotting
from .contenders import OURS

_COLOURS = {OURS: "#d95f02", "load_file + clone": "#666666", "load_file, pread": "#1b9e77"}
_STATES = {"warm": ("#d95f02", "o", "page cache warm"), "dropped": ("#7570b3", "s", "page cache dropped")}


def draw(path: Path) -> Path | None:
    """Draw ``load.png`` beside ``load.json``: seconds over size, GB/s over threads. None without the data for it."""
    data = json.loads(path.read_text(encoding="utf-8"))
    results = data["results"]
    plt = plotting()
    if plt is None or not results.get("growth") or not results.get("threads"):
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")

    names = list(results["growth"][0]["contenders"])
    for name in names:
        points = [(p["nbytes"] / 2**30, p["contenders"][name]) for p in results["growth"]]
        x = [size for size, _ in points]
        y = [entry["median_s"] for _, entry in points]
        error = [[e["median_s"] - e["min_s"] for _, e in points], [e["max_s"] - e["median_s"] for _, e in points]]
        left.errorbar(x, y, _bars(error), marker="o", ms=4, capsize=2, lw=1.5, label=name, color=_COLOURS.get(name))
    left.set(xlabel="checkpoint, GiB", ylabel="seconds", title="Time grows with size", xlim=(0, None), ylim=(0, None))
    left.legend(frameon=False)

    for state, (colour, marker, label) in _STATES.items():
        runs = [p for p in results["threads"] if p["state"] == state]
        if runs:
            x = [p["threads"] for p in runs]
            right.plot(x, [p["gb_per_s"] for p in runs], marker=marker, ms=4, lw=1.5, color=colour, label=label)
            low, high = ([p["nbytes"] / p[key] / 1e9 for p in runs] for key in ("max_s", "min_s"))
            right.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    counts = sorted({p["threads"] for p in results["threads"]})
    right.set_xscale("log", base=2)
    right.set_xticks(counts, [str(count) for count in counts])
    right.set(xlabel=f"threads (on {data['machine']['cores']} cores)", ylabel="GB/s", ylim=(0, None))
    right.set_title(f"{OURS}: speed and threads")
    right.legend(frameon=False)

    figure.supxlabel(machine_line(data["machine"]), fontsize=6, color="#555555")
    target = path.with_name("load.png")
    figure.savefig(target)
    plt.close(figure)
    console.print(f"[dim]{target}[/dim]", soft_wrap=True)
    return target


def _bars(error: list[list[float]]) -> list[list[float]] | None:
    """Error bars, or none where there was one round only."""
    return error if any(any(side) for side in error) else None
