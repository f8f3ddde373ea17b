"""Pictures of a scan: where the overflow sits, and the codes before and after. Needs the extra ``plot`` (altair)."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..codes.formats import LARGEST_FIT, NAN_CODE
from ..errors import OptionError, printable
from .scan import Scan

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d+)\.(.+)$")
_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_SUFFIX = re.compile(r"(\.weight|\._weight_qdata|\.weight\._data)$")

_FITS, _INF, _NAN = "fits Neuron (up to 240)", "read as inf (256)", "read as nan (288 to 448)"
_COLOURS = {_FITS: "#4c78a8", _INF: "#f58518", _NAN: "#d62728"}
_ELSEWHERE = "-"


def check_plot(path: str) -> None:
    """Raise OptionError where a plot could not be written: another suffix, or the extra is missing."""
    if Path(path).suffix not in (".png", ".html"):
        raise OptionError(f"--plot {path}: expected a name that ends in .png or .html")
    if not Path(path).absolute().parent.is_dir():
        raise OptionError(f"--plot {path}: there is no such directory")
    for module in ("altair", "vl_convert"):
        if importlib.util.find_spec(module) is None:
            raise OptionError(f"--plot needs {module}: pip install 'neuron-fp8-loader[plot]'")


def write_plot(scan: Scan, path: str, stack: str = "") -> None:
    """Draw ``scan`` to a ``.png``, or to an ``.html`` that needs no network and answers the pointer.

    Args:
        scan: of a load.
        path: of the file.
        stack: what the load is for, in words.

    Raises:
        OptionError: as ``check_plot``.
    """
    check_plot(path)
    import altair as alt

    width = 640
    chart = alt.vconcat(
        _map(alt, scan, width), _layers(alt, scan, width), _codes(alt, scan, width, stack), spacing=28
    ).properties(
        title=alt.TitleParams(
            printable(Path(scan.plan.source).name),
            subtitle=f"{scan.as_inf + scan.as_nan:,} of {scan.numel:,} FP8 codes are above 240, "
            f"in {len(scan.worst())} of {len(scan.weights)} weights",
            fontSize=18,
            anchor="start",
            offset=16,
        )
    )
    chart = chart.configure_view(stroke=None).configure_title(anchor="start").resolve_scale(color="independent")
    if path.endswith(".png"):
        chart.save(path, ppi=110)
    else:
        chart.save(path, inline=True, json_kwds={"cls": _ForHtml})


class _ForHtml(json.JSONEncoder):
    """JSON that stays within its ``<script>``, whatever the names in it are; HTML looks for ``</script>`` first."""

    def iterencode(self, o: Any, _one_shot: bool = False) -> Iterator[str]:
        for part in super().iterencode(o, _one_shot):
            yield part.replace("<", "\\u003c")

    def encode(self, o: Any) -> str:
        return "".join(self.iterencode(o))


def module_kind(weight: str) -> tuple[str, str]:
    """(layer, kind) of a weight: ``model.layers.3.mlp.experts.7.up_proj.weight`` is ("3", "mlp.experts.*.up_proj");
    outside of layers the layer is "-"."""
    name = _SUFFIX.sub("", printable(weight))
    found = _LAYER.search(name)
    if not found:
        return _ELSEWHERE, name
    return found[1], _NUMBER.sub(".*", found[2])


def _cells(scan: Scan) -> list[dict[str, Any]]:
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for weight in scan.weights.values():
        layer, kind = module_kind(weight.name)
        cell = cells.setdefault((layer, kind), {"layer": layer, "module": kind, "codes": 0, "above": 0, "weights": 0})
        cell["codes"] += weight.numel
        cell["above"] += weight.above
        cell["weights"] += 1
    for cell in cells.values():
        cell["share"] = cell["above"] / cell["codes"] if cell["codes"] else 0.0
    return list(cells.values())


def _layer_order(cells: list[dict[str, Any]]) -> list[str]:
    layers = {cell["layer"] for cell in cells}
    return sorted(layers, key=lambda layer: (layer == _ELSEWHERE, int(layer) if layer.isdigit() else 0))


def _map(alt: Any, scan: Scan, width: int) -> Any:
    cells = _cells(scan)
    modules = list(dict.fromkeys(cell["module"] for cell in cells))
    return (
        alt.Chart(alt.Data(values=cells), title="Share of codes above 240, by layer and module")
        .mark_rect(stroke="white", strokeWidth=0.5)
        .encode(
            x=alt.X("layer:N", sort=_layer_order(cells), axis=alt.Axis(title=None, labelAngle=0, labelOverlap=True)),
            y=alt.Y("module:N", sort=modules, axis=alt.Axis(title=None, labelLimit=260)),
            color=alt.Color(
                "share:Q",
                scale=alt.Scale(scheme="orangered", domainMin=0),
                legend=alt.Legend(title="share", format=".2%"),
            ),
            tooltip=[
                "layer:N",
                "module:N",
                alt.Tooltip("share:Q", format=".3%"),
                alt.Tooltip("above:Q", format=","),
                alt.Tooltip("codes:Q", format=","),
                "weights:Q",
            ],
        )
        .properties(width=width, height=max(60, 20 * len(modules)))
    )


def _layers(alt: Any, scan: Scan, width: int) -> Any:
    cells = _cells(scan)
    rows = []
    for layer in _layer_order(cells):
        own = [cell for cell in cells if cell["layer"] == layer]
        codes, above = sum(c["codes"] for c in own), sum(c["above"] for c in own)
        rows.append({"layer": layer, "codes": codes, "above": above, "share": above / codes if codes else 0.0})
    return (
        alt.Chart(alt.Data(values=rows), title="The same, by layer")
        .mark_bar(color=_COLOURS[_NAN])
        .encode(
            x=alt.X(
                "layer:N",
                sort=[row["layer"] for row in rows],
                axis=alt.Axis(title="layer", labelAngle=0, labelOverlap=True),
            ),
            y=alt.Y("share:Q", axis=alt.Axis(format=".2%", title="codes above 240")),
            tooltip=["layer:N", alt.Tooltip("share:Q", format=".3%"), alt.Tooltip("above:Q", format=",")],
        )
        .properties(width=width, height=110)
    )


def _codes(alt: Any, scan: Scan, width: int, stack: str) -> Any:
    before, after = scan.histograms()
    total = max(1, sum(before))
    stages = (("on disk", before), (_after(scan, stack), after))
    rows = [
        {
            "stage": stage,
            "code": code,
            "hex": f"0x{code:02x}",
            "count": n,
            "share": n / total,
            "neuron": _reading(code),
        }
        for stage, counts in stages
        for code, n in enumerate(counts)
        if n and code < NAN_CODE
    ]
    powers = [10**n for n in range(0, len(str(max(before + after))), 1 + len(str(total)) // 5)]
    ticks = [0, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, LARGEST_FIT]
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_bar(size=width / 128 - 0.8)
        .encode(
            x=alt.X(
                "code:Q",
                scale=alt.Scale(domain=[-1, NAN_CODE]),
                axis=alt.Axis(
                    values=ticks, grid=False, title="magnitude code", labelExpr="'0x' + format(datum.value, '02x')"
                ),
            ),
            y=alt.Y(
                "count:Q", scale=alt.Scale(type="symlog"), axis=alt.Axis(title="codes", format=",d", values=powers)
            ),
            color=alt.Color(
                "neuron:N",
                scale=alt.Scale(domain=list(_COLOURS), range=list(_COLOURS.values())),
                legend=alt.Legend(title="Neuron", orient="right", labelLimit=200),
            ),
            tooltip=["hex:N", alt.Tooltip("count:Q", format=","), alt.Tooltip("share:Q", format=".3%"), "neuron:N"],
        )
        .properties(width=width, height=110)
        .facet(
            row=alt.Row(
                "stage:N",
                sort=[stage for stage, _ in stages],
                header=alt.Header(title=None, labelAngle=0, labelAnchor="start", labelOrient="top", labelFontSize=12),
            ),
        )
        .properties(title="Codes, and how Neuron reads them")
    )


def _after(scan: Scan, stack: str) -> str:
    """What the load does to the codes, in words."""
    done = [scan.recipe.what.method] if scan.rescaled else []
    done += [f"{len(scan.requantized)} weights requantized to row scales: predicted"] if scan.requantized else []
    done += [f"{len(scan.dequantized)} weights as bfloat16: no codes left"] if scan.dequantized else []
    return f"after a load{f' for {stack}' if stack else ''} ({'; '.join(done) or 'as they are'})"


def _reading(code: int) -> str:
    if code <= LARGEST_FIT:
        return _FITS
    return _INF if code == LARGEST_FIT + 1 else _NAN
