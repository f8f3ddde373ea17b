"""The ways to load a checkpoint that the ``load`` benchmark compares. Each runs in a process of its own."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch

from neuron_fp8_loader import Options, load_state_dict  # whose import is no part of a load
from neuron_fp8_loader.checkpoint import open_checkpoint
from neuron_fp8_loader.host.memory import as_bytes, populate
from neuron_fp8_loader.host.parallel import pieces, run

from .layout import sqnr
from .made import Made

Tensors = dict[str, torch.Tensor]
FACTOR = 448.0 / 240.0


@dataclass(frozen=True)
class Job:
    """What a contender gets: the checkpoint, a number of threads for those that take one, a directory to write to."""

    made: Made
    threads: int | None = None
    output: Path | None = None


@dataclass(frozen=True)
class Contender:
    """One way to load.

    Attributes:
        name: in tables and JSON.
        run: returns the state dict, or the directory that it has written.
        gives: what a correct result holds, a key of ``Made.crc``, or ROWS.
        missing: why it cannot run here; empty where it can.
    """

    name: str
    run: Callable[[Job], Tensors | Path]
    gives: str
    missing: str = ""


def _ours(method: str, layout: Literal["keep", "per_channel"] = "keep") -> Callable[[Job], Tensors]:
    def run(job: Job) -> Tensors:
        return load_state_dict(job.made.directory, method=method, layout=layout, threads=job.threads, progress=False)

    return run


def _load_file_clone(job: Job) -> Tensors:
    # without the clone nothing is read: the tensors are a mapping of the file, paid for at first use
    return {
        name: tensor.clone() for file in job.made.files for name, tensor in safetensors.torch.load_file(file).items()
    }


def _limit(job: Job) -> Tensors:
    """The same bytes by preadv into fresh memory, populated ahead, by as many threads, a MiB at a time; no more."""
    tensors: Tensors = {}
    for file in job.made.files:
        with file.open("rb") as handle:
            head = 8 + int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(head - 8))
            memory = torch.empty(file.stat().st_size - head, dtype=torch.uint8)
            view = memoryview(memory.numpy())

            def work(part: tuple[int, int]) -> None:
                start, end = part
                populate(memory, start, end)  # noqa: B023 # run at once
                got = os.preadv(handle.fileno(), [view[start:end]], head + start)  # noqa: B023
                if got != end - start:
                    raise OSError(f"{file}: a short read")  # noqa: B023

            run(list(pieces(memory.numel())), work, job.threads or Options().thread_count())
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                dtype = _DTYPES[entry["dtype"]]
                tensors[name] = memory[start:end].view(dtype).view(entry["shape"])
    return tensors


_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _reader(job: Job) -> Tensors:
    checkpoint = open_checkpoint(job.made.directory)
    infos = checkpoint.selected_tensors()
    return checkpoint.source.read(infos, {}, job.threads or Options().thread_count())[0]


def _pread(job: Job) -> Tensors:
    tensors: Tensors = {}
    for file in job.made.files:
        tensors |= safetensors.torch.load_file(file, backend="pread")
    return tensors


def _runai(job: Job) -> Tensors:
    from runai_model_streamer import SafetensorsStreamer

    tensors: Tensors = {}
    with SafetensorsStreamer() as streamer:
        for file in job.made.files:
            streamer.stream_file(str(file))
            # its buffer is used again for what comes next
            tensors |= {name: tensor.clone() for name, tensor in streamer.get_tensors()}
    return tensors


def _rescale_by_recipe(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The recipe of README_rescaling_fp8_for_neuron.md in neuronx-distributed: a bf16 division, and a cast."""
    return (weight.bfloat16() / FACTOR).to(torch.float8_e4m3fn), scale * FACTOR


def _recipe(job: Job) -> Tensors:
    tensors: Tensors = {}
    for file in job.made.files:
        tensors |= {name: tensor.clone() for name, tensor in safetensors.torch.load_file(file).items()}
    for weight, scale in job.made.pairs:
        tensors[weight], tensors[scale] = _rescale_by_recipe(tensors[weight], tensors[scale])
    return tensors


def _script(job: Job) -> Path:
    """The steps of the whole README script, shard by shard: print the ranges, rescale, compare both readings, save;
    then the ranges of what was saved."""
    assert job.output is not None
    job.output.mkdir(parents=True, exist_ok=True)
    written = []
    for file in job.made.files:
        _ranges(file)
    for file in job.made.files:
        tensors = safetensors.torch.load_file(file)
        for weight, scale in job.made.pairs:
            if weight not in tensors:
                continue
            new_weight, new_scale = _rescale_by_recipe(tensors[weight], tensors[scale])
            # upstream's scale_dequantize takes scales of shape [] and [1] only; this one broadcasts
            before, after = _bf16(tensors[weight], tensors[scale]), _bf16(new_weight, new_scale)
            if not any(torch.allclose(after, before, atol=10.0**-digits) for digits in (5, 4, 3, 2, 1)):
                raise RuntimeError(f"{weight}: not close after the rescale")
            tensors[weight], tensors[scale] = new_weight, new_scale
        written.append(job.output / file.name)
        safetensors.torch.save_file(tensors, written[-1])
    for file in written:
        _ranges(file)
    return job.output


def _bf16(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight.float() * _spread(scale, weight.shape)).bfloat16()


def _spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if scale.ndim == 2 and scale.shape[1] > 1:  # blocks
        rows, columns = (-(-n // k) for n, k in zip(shape, scale.shape, strict=True))
        return scale.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]
    return scale


def _ranges(file: Path) -> tuple[float, float]:
    low, high = float("inf"), -float("inf")
    for tensor in safetensors.torch.load_file(file).values():
        if tensor.dtype == torch.float8_e4m3fn:
            values = tensor.bfloat16()
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    return low, high


def _missing_pread() -> str:
    has = "backend" in inspect.signature(safetensors.torch.load_file).parameters
    return "" if has else f"safetensors {safetensors.__version__} has no pread backend (0.8 has)"


def _missing_runai() -> str:
    return "" if importlib.util.find_spec("runai_model_streamer") else "runai-model-streamer is not installed"


OURS = "neuron_fp8_loader"
LAYOUT = f"{OURS}, block -> row"
ROWS = "rows"  # one scale a row, whatever the checkpoint has
LIMIT = "preadv, no more"
READER = f"{OURS}, nothing translated"
REFERENCE = "load_file + clone"
SCRIPT = "README script"

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender(OURS, _ours("half"), "half"),
        Contender(f"{OURS}, ratio", _ours("ratio"), "ratio"),
        Contender(LAYOUT, _ours("half", "per_channel"), ROWS),
        Contender(READER, _reader, "raw"),
        Contender(LIMIT, _limit, "raw"),
        Contender(REFERENCE, _load_file_clone, "raw"),
        Contender("load_file, pread", _pread, "raw", _missing_pread()),
        Contender("runai-model-streamer", _runai, "raw", _missing_runai()),
        Contender("README recipe in memory", _recipe, "ratio"),
        Contender(SCRIPT, _script, "ratio"),
    )
}


def wrong(made: Made, gives: str, result: Tensors | Path) -> list[str]:
    """Names of the tensors whose bytes are not what they should be, missing and surplus ones included."""
    if isinstance(result, Path):
        result = {
            k: t for f in sorted(result.glob("*.safetensors")) for k, t in safetensors.torch.load_file(f).items()
        }
    if gives == ROWS:
        return _wrong_rows(made, result)
    expected = made.crc[gives]
    bad = [name for name in result if name not in expected] + [name for name in expected if name not in result]
    return bad + [name for name in expected if name in result and _crc(result[name]) != expected[name]]


def _wrong_rows(made: Made, result: Tensors) -> list[str]:
    """Weights that do not fit +-240 or have no scale a row; and the first one, if it is not what it was to 25 dB."""
    bad = []
    for weight, scale in made.pairs:
        new, rows = result.get(weight), result.get(scale)
        if new is None or rows is None or rows.numel() != len(new) or _largest(new) > 0x77:
            bad.append(weight)
    weight, scale = made.pairs[0]
    if weight not in bad:
        before = safetensors.torch.load_file(made.files[0])
        then = before[weight].double() * _spread(before[scale].double(), before[weight].shape)
        if sqnr(then, result[weight].double() * result[scale].double().view(-1, 1)) < 25:
            bad.append(weight)
    return bad


def _largest(weight: torch.Tensor) -> int:
    return int((weight.view(torch.uint8) & 0x7F).max())


def _crc(tensor: torch.Tensor) -> int:
    return zlib.crc32(as_bytes(tensor.contiguous()).numpy().data)
