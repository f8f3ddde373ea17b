"""What the commands share: options, errors as one line, tables, JSON."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from ..errors import Fp8LoaderError, printable
from ..host.units import size
from ..options import CHOICES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCHEMA = 1
"""Goes up when a JSON key changes its meaning or goes away; new keys may come without."""

FINE, FINDING, BROKEN, INTERRUPTED = 0, 1, 2, 130

F = TypeVar("F", bound=Callable[..., Any])
_MOST = 3  # problems that one line names


class Command(click.Command):
    """A command that ends with one line on stderr, not a traceback, where its input is broken."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            if ctx.meta.get(_DOWNLOAD):
                from ..checkpoint import existing

                existing(ctx.params["ckpt"], download=True)  # the command finds it in the cache
            return super().invoke(ctx)
        except Fp8LoaderError as error:
            _fail(ctx, as_given(one_line(str(error))))
        except BrokenPipeError:
            raise  # click ends quietly when the reader of a pipe has gone
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            _fail(ctx, printable(f"{name}{error.strerror or error}"))
        except MemoryError:
            from ..checkpoint import existing
            from ..load.files import bytes_on_disk

            place = str(ctx.params.get("ckpt", ""))
            needed = size(bytes_on_disk(existing(place)))
            _fail(ctx, printable(f"{place}: not enough memory: {needed} needed to map its files; see ulimit -v"))
        except ModuleNotFoundError as error:
            if error.name not in ("numpy", "ml_dtypes"):
                raise
            _fail(ctx, f"{ctx.info_name} needs {error.name}: pip install 'neuron-fp8-loader[verify]'")
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


_NAMES = {name: f"--{name.replace('_', '-')}" for name in (*CHOICES, "dequantize", "threads")} | {"tp_degree": "--tp"}
_OPTION = re.compile(
    rf"(?<![\w.\"'-])({'|'.join(_NAMES)})=(?:([\"'])(?P<word>.*?)\2|(?P<number>\d+)|\[(?P<list>[^\[\]]*)\])"
)


def as_given(text: str) -> str:
    """An error's text with options as the command line has them: ``--nan keep`` for ``nan="keep"``."""

    def given(found: re.Match[str]) -> str:
        flag = _NAMES[found[1]]
        if found["list"] is None:
            return f"{flag} {shlex.quote(found['word'] if found['word'] is not None else found['number'])}"
        words = re.findall(r"([\"'])(.*?)\1", found["list"])
        return " ".join(f"{flag} {shlex.quote(word)}" for _, word in words) or found[0]

    return _OPTION.sub(given, text)


_DOWNLOAD = "neuron_fp8_loader.download"


def checkpoint_argument(function: F) -> F:
    """CKPT, and ``--download`` for one that is a repository of the Hub."""

    def note(ctx: click.Context, _option: click.Parameter, given: bool) -> None:
        ctx.meta[_DOWNLOAD] = given

    text = "Fetch CKPT, a repository of the Hugging Face Hub, if it is not in the local cache."
    download = click.option("--download", is_flag=True, expose_value=False, callback=note, help=text)
    return click.argument("ckpt", type=click.Path())(download(function))


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(function)


def threads_option(function: F) -> F:
    return click.option(
        "--threads", type=click.IntRange(min=1), help="How many read and compute (default: what suits the host)."
    )(function)


_HELP = {
    "method": "How to rescale.",
    "nan": "NaN codes in a weight.",
    "unscaled": "FP8 weights that have no scale and do not fit.",
    "activation_scales": "Static activation and KV cache scales.",
    "layout": "Scale shapes instead of those that --for takes: as on disk, one a row, or one a tensor.",
}

STACKS = ("nxd", "vllm-neuron")


def stack_option(function: F) -> F:
    """``--for``: which stack the load is for."""
    return click.option(
        "--for",
        "stack",
        type=click.Choice(STACKS),
        default=STACKS[0],
        show_default=True,
        help="NxD Inference (by itself, or below vLLM), or the vLLM Neuron plugin without it.",
    )(function)


def choice(name: str) -> Callable[[F], F]:
    """The option of the command line for an option of a few words; the default is the first of them."""
    flag, words = f"--{name.replace('_', '-')}", CHOICES[name]
    if name == "layout":
        return click.option(flag, type=click.Choice(words), help=_HELP[name])  # which is the default, --for tells
    return click.option(flag, type=click.Choice(words), default=words[0], show_default=True, help=_HELP[name])


def experts_option(name: str) -> Callable[[F], F]:
    """``--experts``, handed on as ``name``."""
    return click.option(
        "--experts",
        name,
        type=click.Choice(["expert_wise", "blockwise"]),
        help="Scales of FP8 experts: one an output row of each (the default, faster), or the checkpoint's blocks.",
    )


def load_options(function: F) -> F:
    """The stack that a load is for, and the options that change its result: those of ``What``."""
    options: list[Callable[[F], F]] = [
        stack_option,
        experts_option("experts_as"),
        choice("method"),
        click.option("--always", is_flag=True, help="Rescale weights that fit +-240 already, too."),
        # these two are for those who load; inspect, verify and export go tensor by tensor
        *(choice(name) for name in CHOICES if name not in ("method", "experts", "qkv")),
        click.option(
            "--dequantize",
            multiple=True,
            metavar="PATTERN",
            help="FP8 modules to have as bfloat16, e.g. '*.self_attn.*'; may be given several times.",
        ),
    ]
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


def echo(text: str) -> None:
    """Print lines as they are, names from files escaped."""
    click.echo(printable(text, keep="\n"))


def shell(text: str) -> str:
    """Text as one word of a shell; where a terminal would act on it, escaped as bash, zsh and ksh read it."""
    if text.isprintable():
        return shlex.quote(text)
    plain = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else _octal(c) for c in plain) + "'"


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogateescape"))


def console() -> Console:
    """stdout: colours on a terminal, plain text of any width elsewhere."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, no_color=True, width=1000)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of plain text; columns whose first heading letter is ``>`` are set right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None)
    for heading in headings:
        made.add_column(heading.lstrip(">"), justify="right" if heading.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    return made


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Labels and values, one pair a line, as plain text."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for label, value in pairs:
        made.add_row(label, Text(printable(value)))
    return made


def say(out: Console, *lines: str | Table) -> None:
    """Print strings as they are, and tables, without trailing blanks on a pipe."""
    from rich.text import Text

    for line in lines:
        plain = isinstance(line, str)  # not as a string: rich would look for markup and names of emoji in it
        shown = Text(printable(line)) if isinstance(line, str) else line
        if out.is_terminal:
            out.print(shown, soft_wrap=plain)
            continue
        with out.capture() as captured:
            out.print(shown, soft_wrap=plain)
        for text in captured.get().splitlines():
            click.echo(text.rstrip())


def percent(part: float, whole: float) -> str:
    """``'1.65 %'``; small shares keep two digits."""
    share = 100 * part / whole if whole else 0.0
    return f"{share:.2f} %" if share >= 0.1 or share == 0 else f"{share:.2g} %"
