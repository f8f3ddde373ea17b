"""The one flag: ``vllm serve CKPT --quantization neuron_fp8``, or ``NEURON_FP8_LOADER=1`` in the environment."""

from __future__ import annotations

import json
import logging
import os
import sys

from ...codes.device import PLATFORM_ENV, platform
from ...errors import OptionError
from ...options import Options
from ..flag import parse

QUANTIZATION = "neuron_fp8"
"""The name for ``--quantization``."""

ENV = "NEURON_FP8_LOADER"
"""``1``, a method, or options as a JSON object. The hook sets it for the workers where ``--quantization`` asked."""

GUARD_ENV = "NEURON_FP8_LOADER_GUARD"
"""``0`` lets the plugin cast FP8 weights without their scales."""

_ON, _OFF = ("1", "true", "on", "yes"), ("", "0", "false", "off", "no")

# a child of vLLM's logger, which has a handler in each of its processes
log = logging.getLogger("vllm.neuron_fp8_loader")


_for_workers = False  # was the variable set here, because --quantization asked?


def asked() -> bool:
    """Is the flag in the environment set to anything but off? Never raises."""
    return os.environ.get(ENV, "").strip().lower() not in _OFF


def asked_by_user() -> bool:
    """Is it, by somebody else than ``tell_workers``?"""
    return asked() and not _for_workers


def tell_workers(on: bool) -> None:
    """Set the variable, which the processes of the workers inherit; or take it back, for another model."""
    global _for_workers
    if on and not asked():
        os.environ[ENV], _for_workers = "1", True
    elif not on and _for_workers:
        os.environ.pop(ENV, None)
        _for_workers = False


def options() -> Options | None:
    """What the flag in the environment asks for; None where it is off.

    Raises:
        OptionError: it holds what it cannot be.
    """
    text = os.environ.get(ENV, "").strip()
    if text.lower() in _OFF:
        return None
    value: object = True if text.lower() in _ON else text
    if text.startswith("{"):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise OptionError(f"{ENV}={text}: not a JSON object ({error})") from error
    try:
        chosen = Options.of(parse(value) or {})
    except OptionError as error:
        raise OptionError(f"{ENV}={text}: expected 1, half, ratio or options as a JSON object; {error}") from error
    if chosen.layout != "keep" or chosen.dequantize not in ((), ("*",)):
        raise OptionError(
            f'{ENV}={text}: layout means nothing to the vLLM Neuron plugin, and dequantize only as ["*"], which has '
            "the whole model as bfloat16"
        )
    return chosen


def guarded() -> bool:
    """Is the guard on? It is, unless it was switched off."""
    return os.environ.get(GUARD_ENV, "1").strip().lower() not in _OFF


def target() -> str | None:
    """The platform as the plugin has it, else as ``codes.device.platform`` tells."""
    module = sys.modules.get("libtorch_neuronx_lite.compile.platform")
    if module is not None and not os.environ.get(PLATFORM_ENV, "").strip():
        try:
            found = module.get_platform_target()
        except Exception:  # no device, no driver
            return platform()
        return found.strip().lower() or None if isinstance(found, str) else None
    return platform()
