"""``python -m neuron_fp8_loader.conventions`` prints the registry."""

from . import table

print(table())
