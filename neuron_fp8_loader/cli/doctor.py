"""``neuron-fp8 doctor``."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..tools.doctor import PROBLEM, Finding, examine
from .console import FINDING, Command, console, escape, json_option, print_json, say


@click.command(cls=Command)
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Is this machine set up for FP8 on Neuron?

    Platform, Neuron packages (and placeholders under their names), environment, vLLM's hook, kernel, threads; each
    finding with what to do. Exits with 1 if something will not work.

    \b
    Example:
      neuron-fp8 doctor
    """
    findings = examine()
    if as_json:
        print_json("doctor", {"ok": not _problems(findings), "findings": [asdict(f) for f in findings]})
    else:
        out = console()
        colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
        for finding in findings:
            level = f"{finding.level:<8}"
            if out.is_terminal:
                out.print(f"[{colours[finding.level]}]{level}[/] {finding.topic:<12} {escape(finding.text)}")
            else:
                say(out, f"{level} {finding.topic:<12} {finding.text}")
            if finding.todo:
                say(out, f"{'':<8} {'':<12} -> {finding.todo}")
    if _problems(findings):
        ctx.exit(FINDING)


def _problems(findings: list[Finding]) -> int:
    return sum(finding.level == PROBLEM for finding in findings)
