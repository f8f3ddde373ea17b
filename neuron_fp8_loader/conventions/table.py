"""The registry as text, in Markdown."""

from __future__ import annotations

from .activations import ACTIVATION_RULES
from .registry import conventions


def table() -> str:
    """What each producer writes, all conventions, and the names of static scales: three tables."""
    rules: dict[str, list[str]] = {}
    for rule in conventions():
        for producer in filter(None, rule.producers.split(", ")):
            rules.setdefault(producer, []).append(f"{rule.name} (`{_x(rule.weight)}`, `{_x(rule.scale)}`)")
    lines = ["| producer | conventions |", "|---|---|"]
    lines += [f"| {producer} | {', '.join(found)} |" for producer, found in sorted(rules.items(), key=_alphabetically)]
    return "\n".join([*lines, "", _all_rules(), "", _static_scales()])


def _alphabetically(item: tuple[str, object]) -> str:
    return item[0].lower()


def _all_rules() -> str:
    lines = ["| convention | weight | scale | producers |", "|---|---|---|---|"]
    for rule in conventions():
        beats = f" (beats {', '.join(rule.beats)})" if rule.beats else ""
        lines.append(f"| {rule.name}{beats} | `{_x(rule.weight)}` | `{_x(rule.scale)}` | {rule.producers} |")
    return "\n".join(lines)


def _static_scales() -> str:
    lines = ["| static scale | name (regular expression) | holds | producers |", "|---|---|---|---|"]
    for entry in ACTIVATION_RULES:
        pattern = entry.pattern.pattern.replace("|", "\\|")
        holds = "1 / scale" if entry.reciprocal else "scale"
        lines.append(f"| {entry.kind} | `{pattern}` | {holds} | {entry.producers} |")
    return "\n".join(lines)


def _x(template: str) -> str:
    return template.replace("{}", "X")
