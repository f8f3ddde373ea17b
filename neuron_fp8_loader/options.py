"""The options that every way of loading takes: what becomes of the tensors, and how the work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from .errors import OptionError

if TYPE_CHECKING:
    from .codes.formats import Table

THREADS_ENV = "NEURON_FP8_LOADER_THREADS"

Method = Literal["half", "ratio"]
Nan = Literal["error", "keep"]
Unscaled = Literal["error", "dequantize", "keep"]
ActivationScales = Literal["rescale", "keep"]
LayoutName = Literal["keep", "per_channel", "per_tensor"]
Experts = Literal["keep", "fused"]
Qkv = Literal["keep", "split"]

CHOICES: dict[str, tuple[str, ...]] = {
    "method": get_args(Method),
    "nan": get_args(Nan),
    "unscaled": get_args(Unscaled),
    "activation_scales": get_args(ActivationScales),
    "layout": get_args(LayoutName),
    "experts": get_args(Experts),
    "qkv": get_args(Qkv),
}
"""What an option of a few words may be; the default comes first. The command line offers the same."""


class OptionKeywords(TypedDict, total=False):
    """The fields of ``Options``, for functions that take them as keyword arguments."""

    method: Method
    always: bool
    nan: Nan
    unscaled: Unscaled
    activation_scales: ActivationScales
    layout: LayoutName
    experts: Experts
    qkv: Qkv
    keep: str | Sequence[str]
    dequantize: str | Sequence[str]
    threads: int | None
    progress: bool | None
    download: bool


@dataclass(frozen=True)
class What:
    """What becomes of the tensors; ``Options`` describes each field. Equal ones give the same result."""

    method: str = "half"
    always: bool = False
    nan: str = "error"
    unscaled: str = "error"
    activation_scales: str = "rescale"
    layout: str = "keep"
    experts: str = "keep"
    qkv: str = "keep"
    keep: str | Sequence[str] = ()
    dequantize: str | Sequence[str] = ()

    @property
    def table(self) -> Table:
        from .codes.formats import METHODS  # torch: the command line offers the options without it

        return METHODS[self.method]


@dataclass(frozen=True)
class How:
    """How the work is done; the result does not depend on it."""

    threads: int | None = None
    progress: bool | None = None
    download: bool = False

    def thread_count(self) -> int:
        """The number of threads to use. Raises OptionError for a malformed environment variable."""
        if self.threads is not None:
            return self.threads
        text = os.environ.get(THREADS_ENV, "").strip()
        if text:
            if not text.isdecimal() or int(text) < 1:
                raise OptionError(f"{THREADS_ENV}={text}: expected a whole number from 1 up")
            return int(text)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # reads wait for the disk, so a few more than the cores of a small host; beyond 32 memory is the limit
        return min(32, max(4, cores))


@dataclass(frozen=True)
class Options(How, What):
    """What becomes of the tensors, and how the work is done.

    Attributes:
        method: ``"half"`` (weight / 2, scale x 2; exact but for 8 of 126 codes) or ``"ratio"`` (448/240, byte for
            byte what the recipe in Neuron's README gives).
        always: rescale weights that already fit +-240 too; by default they pass bit for bit, as do their scales.
        nan: NaN codes in a weight are an ``"error"``, or are let through (``"keep"``).
        unscaled: an e4m3fn weight that does not fit and has no scale is an ``"error"``; ``"dequantize"`` returns
            unscaled weights as bfloat16 (exact), ``"keep"`` as they are.
        activation_scales: static activation and KV cache scales, calibrated for +-448: ``"rescale"`` multiplies all
            of them by the method's factor if any weight of the checkpoint did not fit, ``"keep"`` leaves them.
        layout: scale shapes that the consumer takes: ``"keep"`` as on disk, ``"per_channel"`` [rows, 1] (block scales
            are requantized, which rounds once more; see ``codes.requantize``), ``"per_tensor"`` [1].
        experts: of a mixture of experts: ``"keep"`` as on disk; ``"fused"`` as NxD's fused layers take them, those of
            a block in one tensor: ``{block}.expert_mlps.mlp_op.gate_up_proj.weight`` float8_e4m3fn [experts, in,
            2 x out] (gate, then up) and ``...down_proj.weight`` [experts, in, out], each with a float32 ``.scale``:
            [experts, 1, out], or with ``layout="keep"`` and block scales one a block, [experts, in / 128, out / 128].
            ``{block}`` is what stands before ``.experts`` in the checkpoint, prefixes included. Bytes and scales of
            each expert are those of ``"keep"`` with the same layout: a weight that fits passes bit for bit here too.
        qkv: of a weight in which queries, keys and values lie interleaved (MiMo-V2.5): ``"keep"`` as on disk;
            ``"split"`` as ``q_proj``, ``k_proj`` and ``v_proj``, each with its own scales [rows, 1], which wants
            ``layout="per_channel"`` for FP8. Split only where config.json and all shapes tell how they lie.
        keep: shell patterns of module names (``"*.experts.*"``): their scales stay as on disk, whatever the layout.
        dequantize: shell patterns of module names (``"*.self_attn.*"``): these FP8 modules become bfloat16, their
            weight scales are dropped.
        threads: how many read and translate; default ``NEURON_FP8_LOADER_THREADS``, else what suits the host.
        progress: show a progress bar; default: on a terminal, for loads that last.
        download: fetch a repository of the Hugging Face Hub that is not in the local cache.
    """

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"{name}={getattr(self, name)!r}: expected {' or '.join(map(repr, choices))}")
        for name in ("keep", "dequantize"):
            given = getattr(self, name)
            patterns = (given,) if isinstance(given, str) else given
            if not isinstance(patterns, list | tuple) or not all(isinstance(p, str) for p in patterns):
                raise OptionError(f"{name}={given!r}: expected module names or patterns, as a list")
            object.__setattr__(self, name, tuple(patterns))
        if self.experts == "fused" and self.layout == "per_tensor":
            raise OptionError(
                'experts="fused" with layout="per_tensor": expected layout="per_channel" or "keep"; either gives one '
                "scale an expert and row for scales per tensor"
            )
        if not isinstance(self.always, bool):
            raise OptionError(f"always={self.always!r}: expected True or False")
        threads = self.threads
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise OptionError(f"threads={threads!r}: expected a whole number from 1 up, or None")
        if not isinstance(self.download, bool):
            raise OptionError(f"download={self.download!r}: expected True or False")
        if self.progress is not None and not isinstance(self.progress, bool):
            raise OptionError(f"progress={self.progress!r}: expected True, False or None")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        """From keyword arguments. Raises OptionError, listing the known names, for an unknown one."""
        if not isinstance(options, Mapping):
            raise OptionError(f"options={options!r}: expected names and values, not a {type(options).__name__}")
        known = [f.name for f in fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise OptionError(f"unknown option {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
        return cls(**options)

    @property
    def what(self) -> What:
        """The part that the result depends on."""
        return What(**{f.name: getattr(self, f.name) for f in fields(What)})
