"""``python -m neuron_fp8_loader.conventions`` prints the registry."""

import os
import sys

from . import table

try:
    print(table(), flush=True)
except BrokenPipeError:  # the reader had enough: `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes there at the end
