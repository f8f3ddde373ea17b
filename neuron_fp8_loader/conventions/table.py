"""The registry as text."""

from __future__ import annotations

from .activations import ACTIVATION_RULES
from .registry import conventions


def table() -> str:
    """All conventions and the names of static scales, as Markdown."""
    lines = ["| convention | weight | scale | producers |", "|---|---|---|---|"]
    for rule in conventions():
        beats = f" (beats {', '.join(rule.beats)})" if rule.beats else ""
        lines.append(f"| {rule.name}{beats} | `{_x(rule.weight)}` | `{_x(rule.scale)}` | {rule.producers} |")
    lines += ["", "| static scale | name (regular expression) | holds | producers |", "|---|---|---|---|"]
    for entry in ACTIVATION_RULES:
        pattern = entry.pattern.pattern.replace("|", "\\|")
        holds = "1 / scale" if entry.reciprocal else "scale"
        lines.append(f"| {entry.kind} | `{pattern}` | {holds} | {entry.producers} |")
    return "\n".join(lines)


def _x(template: str) -> str:
    return template.replace("{}", "X")
