"""Runs a backend with and without the loader, and says whether what came out is right."""

from __future__ import annotations

from typing import Any

from ..common import finite
from .backend import Backend, Outcome
from .model import Case, Tensors, judge


def check(backend: Backend, case: Case) -> dict[str, Any]:
    """Compile and run ``case`` with the loader and without.

    Returns:
        plain data; ``"problems"`` lists what is wrong with the loaded model, empty if nothing is.
    """
    reference = backend.reference(case)
    # the loaded model first: one that computes nan may leave a device in an error state
    loaded = backend.run(case, case.loaded)
    entry: dict[str, Any] = {
        "backend": backend.name,
        "versions": backend.versions(),
        "dtype": str(case.dtype).removeprefix("torch."),
        "method": case.method,
        "details": loaded.details,
        "with": _measured(loaded, case),
        "problems": [],
    }
    if loaded.logits.numel() == 0:  # compiled for another host
        entry["without"] = _measured(backend.run(case, case.raw), case)
        return entry
    entry["with"] |= judge(loaded.logits, reference)
    entry["problems"] = problems(backend, case, entry["with"])
    entry["without"] = _without(backend, case, case.raw, reference)
    return entry


def problems(backend: Backend, case: Case, seen: dict[str, Any]) -> list[str]:
    """What is wrong with the outputs of the loaded model."""
    if not seen["finite"]:
        return [
            f"{backend.name}: with the loader {seen['nan']} of {seen['outputs']} outputs are nan, {seen['inf']} inf"
        ]
    if backend.exact and case.exact and case.method == "half":
        return (
            []
            if seen["equal"]
            else [f"{backend.name}: not equal to the e4m3fn reference: {seen['largest_error']:.1e}"]
        )
    allowed = tolerance(backend, case)
    if seen["largest_error"] > allowed:
        return [f"{backend.name}: {seen['largest_error']:.1e} from the e4m3fn reference, more than {allowed:g}"]
    return []


def tolerance(backend: Backend, case: Case) -> float:
    """``ratio`` rounds nine weights in ten, and bfloat16 keeps three digits."""
    if case.method == "ratio":
        return 0.2
    return max(backend.tolerance, 0.05) if case.dtype.itemsize < 4 else backend.tolerance


def _measured(outcome: Outcome, case: Case) -> dict[str, Any]:
    speed = case.tokens / outcome.run_s if outcome.run_s else None
    return {"compile_s": outcome.compile_s, "run_s": outcome.run_s, "tokens_per_s": speed}


def _without(backend: Backend, case: Case, tensors: Tensors, reference: Any) -> dict[str, Any]:
    try:
        outcome = backend.run(case, tensors)
    except RuntimeError as error:
        # "status=1003 message=Numerical Error" is what the Neuron runtime says of nan
        return {"refused": str(error).strip().splitlines()[0] if str(error) else type(error).__name__, "finite": False}
    seen = _measured(outcome, case) | judge(outcome.logits, reference)
    seen["largest_error"] = None if seen["largest_error"] is None else finite(seen["largest_error"])
    return seen
