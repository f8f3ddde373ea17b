"""Which Neuron platform this is, and what it makes of an e4m3fn byte."""

from __future__ import annotations

import os

PLATFORM_ENV = "NEURON_PLATFORM_TARGET_OVERRIDE"


def platform() -> str | None:
    """``"trn1"``, ``"inf2"``, ``"trn2"``, ``"trn3"`` ..., or None where it cannot be told.

    ``NEURON_PLATFORM_TARGET_OVERRIDE`` counts first, as it does for NxD Inference; then
    ``torch_neuronx.utils.get_platform_target()``.
    """
    override = os.environ.get(PLATFORM_ENV, "").strip().lower()
    if override:
        return override
    try:
        from torch_neuronx.utils import get_platform_target

        target = get_platform_target()
    except Exception:  # not installed, a placeholder package, no device, no driver
        return None
    return target.strip().lower() or None if isinstance(target, str) else None


def needs_rescale(target: str | None) -> bool:
    """Does the platform read e4m3fn bytes as FP8_EXP4, which ends at +-240?

    trn1, inf2 and trn2 do; trn3 reads e4m3fn as it is. A platform that is not known counts as one that does: a rescale
    too many costs a few roundings, one too few gives NaN.
    """
    return target is None or not target.startswith("trn3")
