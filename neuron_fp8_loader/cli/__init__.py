"""``neuron-fp8``: look at a checkpoint, and at the machine, before you load."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import click

from .. import __version__
from .config import config
from .doctor import doctor
from .export import export
from .inspect import inspect
from .verify import verify


class _Group(click.Group):
    """Begins with streams that every name can be written to, whatever the process was started with."""

    def main(self, *args: Any, **extra: Any) -> Any:
        _ready_streams()
        return super().main(*args, **extra)


def _ready_streams() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: else the next file opened would get this number, and others' warnings with it
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  as long as the process
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")  # a terminal that cannot show a name


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="neuron-fp8")
def main() -> None:
    """GPU FP8 (e4m3fn) checkpoints on AWS Neuron: look before you load.

    CKPT is a directory, a .safetensors or .bin file, or an index file; the URL of one in a store (s3://bucket/prefix);
    or org/name[@revision], a repository in the cache of the Hugging Face Hub. Nothing here needs a Neuron package or a
    device, nor a network for what is local; CKPT is only read.

    Exit codes: 0 fine, 1 a finding (inspect, config: what stops a load; verify: a wrong value, or no FP8 weight to
    check; doctor: what will not work), 2 wrong use or broken input, 130 interrupted.

    \b
    Example:
      neuron-fp8 inspect ./Llama-3.1-8B-FP8
    """
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's, which needs none for what is done here


for command in (inspect, config, verify, export, doctor):
    main.add_command(command)

__all__ = ["main"]
