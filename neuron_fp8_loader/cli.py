"""The command line."""


def main() -> None:
    """Entry point of ``neuron-fp8``."""
