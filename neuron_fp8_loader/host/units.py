"""Numbers for people."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """``'1.6 MB'``."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}" if unit != "B" else f"{nbytes:.0f} B"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
