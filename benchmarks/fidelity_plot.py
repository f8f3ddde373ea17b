"""The picture of the ``fidelity`` benchmark, from its JSON."""

from __future__ import annotations

import json
from pathlib import Path

from .common import console, plotting

_COLOURS = {"checkpoint": "#666666", "half": "#d95f02", "ratio": "#7570b3", "clamp to 240": "#e7298a"}
_MARKERS = {"checkpoint": "|", "half": "o", "ratio": "s", "clamp to 240": "v"}


def draw(path: Path) -> Path | None:
    """Draw ``fidelity.png`` beside ``fidelity.json``: error by code, SQNR by source, divergence of logits."""
    plt = plotting()
    if plt is None:
        return None
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    figure, (codes, noise, tokens) = plt.subplots(
        1, 3, figsize=(13, 4.2), layout="constrained", gridspec_kw={"width_ratios": [3, 4, 3]}
    )

    for name in ("ratio", "clamp to 240", "half"):
        errors = results["codes"][name]
        x = [code for code, error in enumerate(errors, start=1) if error]
        y = [error * 100 for error in errors if error]
        label = f"{name}: {len(errors) - len(x)} of {len(errors)} codes exact"
        codes.scatter(x, y, s=12, color=_COLOURS[name], marker=_MARKERS[name], label=label)
    codes.set(xlabel="e4m3fn magnitude code", ylabel="error, % of the value", yscale="log")
    codes.set_title("What happens to each code")
    codes.set_xticks(range(0, 0x81, 0x10), [f"0x{c:02x}" for c in range(0, 0x81, 0x10)], fontsize=7)
    codes.set_ylim(0.3, 300)
    codes.legend(frameon=False, loc="upper right", fontsize=8)

    sources = list(results["rows"])[::-1]
    for name, colour in _COLOURS.items():
        values = [results["rows"][source][name]["sqnr_original_db"] for source in sources]
        large = name == "checkpoint"
        noise.scatter(
            values, range(len(sources)), s=130 if large else 28, color=colour, marker=_MARKERS[name],
            label=name, zorder=2 if large else 3,
        )  # fmt: skip
    noise.set_yticks(range(len(sources)), sources, fontsize=7)
    noise.set(xlabel="SQNR against the bf16 original, dB (more is better)")
    noise.set_title("What is left of the weights")
    noise.grid(axis="y", lw=0.3)
    noise.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.02))

    shown = [name for name in _COLOURS if results["logits"][name]["finite"]]
    values = [results["logits"][name]["kl_original"] for name in shown]
    tokens.bar(range(len(shown)), values, color=[_COLOURS[name] for name in shown], width=0.6)
    for index, (name, value) in enumerate(zip(shown, values, strict=True)):
        same = results["logits"][name]["top_1_original"] * 100
        tokens.annotate(f"{value:.1e}\ntop-1 {same:.1f} %", (index, value), ha="center", va="bottom", fontsize=7)
    tokens.set_xticks(range(len(shown)), shown, fontsize=8)
    tokens.set(ylabel="KL divergence from bf16, nats", yscale="log")
    low, high = tokens.get_ylim()
    tokens.set_ylim(low, high * 4)
    tokens.set_title("What is left of the logits (small Llama)")
    lost = results["logits"]["without the loader"]
    text = f"without the loader: {lost.get('nan', 0)} of {lost['positions']} positions nan"
    tokens.text(0.02, 0.98, text, transform=tokens.transAxes, va="top", fontsize=7.5)

    target = path.with_name("fidelity.png")
    figure.savefig(target)
    plt.close(figure)
    console.print(f"[dim]{target}[/dim]", soft_wrap=True)
    return target
