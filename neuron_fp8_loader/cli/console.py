"""What the commands share: options, errors as one line, tables, JSON."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import click
from rich import box
from rich.console import Console
from rich.table import Table

from ..codes.formats import METHODS
from ..errors import Fp8LoaderError

SCHEMA = 1
"""Goes up when a JSON key changes its meaning or goes away; new keys may come without."""

FINE, FINDING, BROKEN, INTERRUPTED = 0, 1, 2, 130

F = TypeVar("F", bound=Callable[..., Any])
_MOST = 3  # problems that one line names


class Command(click.Command):
    """A command that ends with one line on stderr, not a traceback, where its input is broken."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Fp8LoaderError as error:
            _fail(ctx, one_line(str(error)))
        except BrokenPipeError:
            raise  # click ends quietly when the reader of a pipe has gone
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            _fail(ctx, f"{name}{error.strerror or error}")
        except ModuleNotFoundError as error:
            if error.name not in ("numpy", "ml_dtypes"):
                raise
            _fail(
                ctx, f"{ctx.info_name} needs {error.name}; install the extra: pip install 'neuron-fp8-loader[verify]'"
            )
        except KeyboardInterrupt:
            click.echo("neuron-fp8: interrupted", err=True)
            ctx.exit(INTERRUPTED)


def _fail(ctx: click.Context, text: str) -> NoReturn:
    if ctx.params.get("as_json"):
        print_json(ctx.info_name or "", {"error": text})
    click.echo(f"neuron-fp8: {text}", err=True)
    ctx.exit(BROKEN)


def one_line(text: str) -> str:
    """An error's text on one line; of a list of problems the first few, and how many more there are."""
    head, *rest = text.split("\n")
    line, shown, left_out = head, 0, 0
    for part in rest:
        item, more = re.match(r"  - (.*)", part), re.match(r"  \.\.\. and (\d+) more", part)
        if more:
            left_out += int(more[1])
        elif not item:
            line += f" (and {left_out} more)" if left_out else ""
            line, shown, left_out = f"{line.rstrip()}{'.' if shown else ''} {part.strip()}", 0, 0
        elif shown < _MOST:
            line, shown = f"{line}{';' if shown else ''} {item[1]}", shown + 1
        else:
            left_out += 1
    return line + (f" (and {left_out} more)" if left_out else "")


def checkpoint_argument(function: F) -> F:
    return click.argument("ckpt", type=click.Path())(function)


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)


def threads_option(function: F) -> F:
    return click.option(
        "--threads", type=click.IntRange(min=1), help="How many read and compute (default: what suits the host)."
    )(function)


def load_options(function: F) -> F:
    """The options of a load that change its result."""
    options = (
        click.option(
            "--method", type=click.Choice(list(METHODS)), default="half", show_default=True, help="How to rescale."
        ),
        click.option("--always", is_flag=True, help="Rescale weights that fit +-240 already, too."),
        click.option(
            "--nan",
            type=click.Choice(["error", "keep"]),
            default="error",
            show_default=True,
            help="NaN codes in a weight.",
        ),
        click.option(
            "--unscaled",
            type=click.Choice(["error", "dequantize", "keep"]),
            default="error",
            show_default=True,
            help="FP8 weights that have no scale and do not fit.",
        ),
        click.option(
            "--activation-scales",
            type=click.Choice(["rescale", "keep"]),
            default="rescale",
            show_default=True,
            help="Static activation and KV cache scales.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def print_json(command: str, data: dict[str, Any]) -> None:
    """One JSON object on stdout, led by ``schema`` and ``command``; a number that is not finite becomes null."""
    text = json.dumps(_finite({"schema": SCHEMA, "command": command, **data}), indent=2, allow_nan=False)
    click.echo(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def console() -> Console:
    """stdout: colours on a terminal, plain text of any width elsewhere."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, no_color=True, width=1000)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "") -> Table:
    """A table; columns whose first heading letter is ``>`` are set right."""
    made = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, title=title or None, title_justify="left")
    for heading in headings:
        made.add_column(heading.lstrip(">"), justify="right" if heading.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


def escape(text: str) -> str:
    """Text that rich prints as it is."""
    return text.replace("[", "\\[")


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Labels and values, one pair a line."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for label, value in pairs:
        made.add_row(label, escape(value))
    return made


def say(out: Console, *lines: Any) -> None:
    """Print strings as they are, and tables, without trailing blanks on a pipe."""
    for line in lines:
        if out.is_terminal:
            out.print(line, soft_wrap=isinstance(line, str), markup=not isinstance(line, str))
            continue
        with out.capture() as captured:
            out.print(line, soft_wrap=isinstance(line, str), markup=not isinstance(line, str))
        for text in captured.get().splitlines():
            click.echo(text.rstrip())


def percent(part: float, whole: float) -> str:
    """``'1.65 %'``; small shares keep two digits."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.2f} %" if share >= 0.1 or share == 0 else f"{share:.2g} %"
