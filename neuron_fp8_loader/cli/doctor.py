"""``neuron-fp8 doctor``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ..errors import printable
from .console import FINDING, Command, console, json_option, print_json, say

if TYPE_CHECKING:
    from ..tools.doctor import Finding


@click.command(cls=Command)
@click.option("--device", is_flag=True, help="Compile and run one FP8 layer on the Neuron device, too.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, device: bool, as_json: bool) -> None:
    """Is this machine set up for FP8 on Neuron?

    Platform, stack and SDK, Neuron packages (and placeholders under their names), environment, vLLM's hook, kernel,
    threads; each finding with what to do. Exits with 1 if something will not work.

    --device says what the device makes of FP8 codes: subnormals kept or flushed, code 0x78 read as inf or nan, values
    up to 240 right. Exits with 1 where there is no device.

    \b
    Example:
      neuron-fp8 doctor
      neuron-fp8 doctor --device
    """
    from ..tools.doctor import examine

    findings = examine(run=device)
    if as_json:
        print_json("doctor", {"ok": not _problems(findings), "findings": [asdict(f) for f in findings]})
    else:
        from rich.text import Text

        out = console()
        colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
        for finding in findings:
            level = f"{finding.level:<8}"
            if out.is_terminal:
                text = f" {finding.topic:<12} {printable(finding.text)}"
                out.print(Text.assemble((level, colours[finding.level]), text))
            else:
                say(out, f"{level} {finding.topic:<12} {finding.text}")
            if finding.todo:
                say(out, f"{'':<8} {'':<12} -> {finding.todo}")
    if _problems(findings):
        ctx.exit(FINDING)


def _problems(findings: list[Finding]) -> int:
    return sum(finding.level == "problem" for finding in findings)
