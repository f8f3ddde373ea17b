"""``neuron-fp8 doctor``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ..errors import printable
from .console import FINDING, Command, console, json_option, print_json, say

if TYPE_CHECKING:
    from rich.table import Table

    from ..tools.doctor import Finding

_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


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
        out = console()
        for finding in findings:
            if out.is_terminal:
                out.print(_folded(finding))
            else:
                say(out, f"{finding.level:<8} {finding.topic:<12} {finding.text}")
            if finding.todo:  # in one piece, to be copied
                say(out, f"{'':<8} {'':<12} -> {finding.todo}")
    if _problems(findings):
        ctx.exit(FINDING)


def _folded(finding: Finding) -> Table:
    """For a terminal: a long text goes on below itself."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 1))
    made.add_column(style=_COLOURS[finding.level], no_wrap=True)
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    made.add_row(f"{finding.level:<8}", f"{finding.topic:<12}", Text(printable(finding.text)))
    return made


def _problems(findings: list[Finding]) -> int:
    return sum(finding.level == "problem" for finding in findings)
