"""The picture of the ``fidelity`` benchmark, from its JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .common import plotting, save_chart

_COLOURS = {"checkpoint": "#666666", "half": "#d95f02", "ratio": "#7570b3", "clamp to 240": "#e7298a"}
_SHAPES = {"checkpoint": "diamond", "half": "circle", "ratio": "square", "clamp to 240": "triangle-down"}


def draw(path: Path) -> Path | None:
    """Draw ``fidelity.png`` beside ``fidelity.json``: error by code, SQNR by source, divergence of logits."""
    alt = plotting()
    if alt is None:
        return None
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    parts = (_codes(alt, results), _weights(alt, results), _logits(alt, results))
    return save_chart(
        alt.hconcat(*parts, spacing=24).resolve_scale(color="independent", shape="independent"),
        path.with_name("fidelity.png"),
    )


def _marks(alt: Any, names: dict[str, str], legend: Any) -> dict[str, Any]:
    """Colour and shape by name; ``names``: label -> name."""
    domain = list(names)
    return {
        "color": alt.Color(
            "name:N", scale=alt.Scale(domain=domain, range=[_COLOURS[n] for n in names.values()]), legend=legend
        ),
        "shape": alt.Shape(
            "name:N", scale=alt.Scale(domain=domain, range=[_SHAPES[n] for n in names.values()]), legend=legend
        ),
    }


def _codes(alt: Any, results: dict[str, Any]) -> Any:
    rows, names = [], {}
    for name in ("half", "ratio", "clamp to 240"):
        errors = results["codes"][name]
        label = f"{name}: {errors.count(0)} of {len(errors)} codes exact"
        names[label] = name
        rows += [{"code": c, "error": e * 100, "name": label} for c, e in enumerate(errors, start=1) if e]
    axis = alt.Axis(values=list(range(0, 0x81, 0x10)), labelExpr="'0x' + format(datum.value, '02x')", grid=False)
    legend = alt.Legend(title=None, orient="top", direction="vertical", labelLimit=300)
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_point(filled=True, size=22, opacity=1)
        .encode(
            x=alt.X("code:Q", title="e4m3fn magnitude code", axis=axis, scale=alt.Scale(domain=[0, 0x80])),
            y=alt.Y("error:Q", title="error, % of the value", scale=alt.Scale(type="log")),
            **_marks(alt, names, legend),
        )
        .properties(title="What happens to each code", width=300, height=300)
    )


def _weights(alt: Any, results: dict[str, Any]) -> Any:
    sources = list(results["rows"])
    rows = [
        {"source": source, "name": name, "dB": results["rows"][source][name]["sqnr_original_db"]}
        for source in sources
        for name in _COLOURS
    ]
    legend = alt.Legend(title=None, orient="top")
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_point(filled=True, opacity=1)
        .encode(
            x=alt.X("dB:Q", title="SQNR against the bf16 original, dB (more is better)", scale=alt.Scale(zero=False)),
            y=alt.Y("source:N", sort=sources, title=None, axis=alt.Axis(grid=True, labelLimit=220)),
            size=alt.condition("datum.name == 'checkpoint'", alt.value(200), alt.value(50)),  # half lies on it
            **_marks(alt, {name: name for name in _COLOURS}, legend),
        )
        .properties(title="What is left of the weights", width=340, height=330)
    )


def _logits(alt: Any, results: dict[str, Any]) -> Any:
    rows = [
        {
            "name": name,
            "kl": results["logits"][name]["kl_original"],
            "floor": 0.01,
            "label": [
                f"{results['logits'][name]['kl_original']:.1e}",
                f"top-1 {results['logits'][name]['top_1_original'] * 100:.1f} %",
            ],
        }
        for name in _COLOURS
        if results["logits"][name]["finite"]
    ]
    names = [row["name"] for row in rows]
    lost = results["logits"]["without the loader"]
    colour = alt.Color("name:N", scale=alt.Scale(domain=names, range=[_COLOURS[n] for n in names]), legend=None)
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("name:N", sort=names, title=None, axis=alt.Axis(labelAngle=0)),
        y=alt.Y("kl:Q", title="KL divergence from bf16, nats", scale=alt.Scale(type="log", domain=[0.01, 10])),
    )
    bars = base.mark_bar(width=40).encode(y2="floor:Q", color=colour)
    text = base.mark_text(dy=-18, fontSize=10, lineBreak="\n").encode(text="label:N")
    title = alt.TitleParams(
        "What is left of the logits (small Llama)",
        subtitle=f"without the loader: {lost.get('nan', 0)} of {lost['positions']} positions nan",
    )
    return alt.layer(bars, text).properties(title=title, width=300, height=300)
