"""The pictures of the ``load`` benchmark, from its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .common import machine_line, plotting, save_chart
from .contenders import OURS

_COLOURS = {OURS: "#d95f02", "load_file + clone": "#666666", "load_file, pread": "#1b9e77"}
_STATES = {"warm": ("#d95f02", "page cache warm"), "dropped": ("#7570b3", "page cache dropped")}


def draw(path: Path) -> Path | None:
    """Draw ``load.png`` beside ``load.json``: seconds over size, GB/s over threads. None without the data for it."""
    data = json.loads(path.read_text(encoding="utf-8"))
    results = data["results"]
    alt = plotting()
    if alt is None or not results.get("growth") or not results.get("threads"):
        return None
    size = {"width": 330, "height": 230}

    sizes = [
        {"GiB": p["nbytes"] / 2**30, "name": name, "s": e["median_s"], "low": e["min_s"], "high": e["max_s"]}
        for p in results["growth"]
        for name, e in p["contenders"].items()
    ]
    names = list(results["growth"][0]["contenders"])
    colour = alt.Color("name:N", legend=_LEGEND, scale=_scale(alt, {n: _COLOURS.get(n, "#999999") for n in names}))
    base = alt.Chart(alt.Data(values=sizes)).encode(
        x=alt.X("GiB:Q", title="checkpoint, GiB", scale=alt.Scale(zero=True)), color=colour
    )
    growth = alt.layer(
        base.mark_line(point=True).encode(y=alt.Y("s:Q", title="seconds")),
        base.mark_rule().encode(y="low:Q", y2="high:Q"),
    ).properties(title="Time grows with size", **size)

    runs = [
        {
            "threads": p["threads"],
            "cache": _STATES[p["state"]][1],
            **{key: p["nbytes"] / p[seconds] / 1e9 for key, seconds in _GB_PER_S.items()},
        }
        for p in results["threads"]
        if p["state"] in _STATES
    ]
    colour = alt.Color("cache:N", legend=_LEGEND, scale=_scale(alt, {label: c for c, label in _STATES.values()}))
    counts = sorted({run["threads"] for run in runs})
    x = alt.X(
        "threads:Q",
        title=f"threads (on {data['machine']['cores']} cores)",
        scale=alt.Scale(type="log", base=2),
        axis=alt.Axis(values=counts, format="d"),
    )
    base = alt.Chart(alt.Data(values=runs)).encode(x=x, color=colour)
    speed = alt.layer(
        base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", title="GB/s"), y2="high:Q"),
        base.mark_line(point=True).encode(y=alt.Y("median:Q", title="GB/s")),
    ).properties(title=f"{OURS}: speed and threads", **size)

    both = alt.hconcat(growth, speed, spacing=30).resolve_scale(color="independent")
    foot = alt.TitleParams(machine_line(data["machine"]), fontSize=9, color="#555555", orient="bottom", fontWeight=400)
    return save_chart(both.properties(title=foot), path.with_name("load.png"))


_LEGEND = {"title": None, "orient": "top", "symbolOpacity": 1}
_GB_PER_S = {"median": "median_s", "low": "max_s", "high": "min_s"}


def _scale(alt: Any, colours: dict[str, str]) -> Any:
    return alt.Scale(domain=list(colours), range=list(colours.values()))
