"""``torch.distributed.checkpoint`` reads FP8 checkpoints Neuron-ready: DTensors, FSDP, several nodes, each its part.

Facts about torch, read in 2.13 (``torch/distributed/checkpoint``): every rank calls ``read_metadata``; the planner
compares sizes, not dtypes, and asks for boxes of the tensors as the metadata has them; ``read_data`` gets all of a
rank's boxes.
``HuggingFaceStorageReader`` copies what is stored into the parameter with ``copy_``, which makes of FP8 codes for a
bfloat16 parameter their values without the scale.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

try:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
except ImportError as error:
    raise ImportError(
        f"NeuronStorageReader needs torch.distributed.checkpoint.HuggingFaceStorageReader, which torch "
        f"{torch.__version__} does not have; install a newer torch (2.13 does), or use load_state_dict(slices=...)"
    ) from error
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ..checkpoint import existing, open_checkpoint
from ..codes.dequantize import scale_values
from ..codes.scales import is_e8m0
from ..errors import CheckpointError, OptionError, listing, printable
from ..load.regions import Regions, Wanted
from ..options import Options
from ..plan import ALL, Step, Verdict, recipe_for
from ..plan.layout import can_be_dequantized, unknown

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..options import OptionKeywords

log = logging.getLogger("neuron_fp8_loader")

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_BATCH = 256 << 20  # bytes that are read before they are copied to where they go, if they cannot be read there


class NeuronStorageReader(HuggingFaceStorageReader):
    """A storage reader for ``dcp.load`` whose FP8 weights and scales come out Neuron-ready.

    ``dcp.load(state_dict, storage_reader=NeuronStorageReader(path))`` fills each rank's part of every tensor with the
    bytes that ``load_state_dict(path, always=True, **options)`` has there. Little more than these is read, by several
    threads, which may share a file. Ranks cannot tell from a part whether the whole weight fits, so every weight that
    has a scale is rescaled.

    What a parameter's dtype asks for is given: an e4m3fn weight into float8_e4m3fn as codes; into bfloat16, float16 or
    float32 as value x scale, computed in float32 and rounded to the dtype (as ``dequantize`` does), for which the
    scale must not be in the state dict. What would change values in silence is an OptionError naming the parameter.

    Args:
        path: a directory, a ``.safetensors`` file or an index file; all shards of one checkpoint.
        verdict: which weights are rescaled, if not all; the same on all ranks. See ``load_state_dict``.
        **options: see ``Options``; ``threads`` is torch's ``thread_count``. Sizes and dtypes that ``layout`` and
            ``dequantize`` change are in the metadata, so the parameters must have them: a row scale with
            ``layout="per_channel"`` is [rows, 1], and a dequantized weight's scale is not there.

    Raises:
        CheckpointError, PlanError, OptionError: as ``load_state_dict``, here already. ``dcp.load`` raises a
        CheckpointException around the WeightError, ScaleError or OptionError of each rank.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, verdict: Verdict | None = None, **options: Unpack[OptionKeywords]
    ) -> None:
        self._options = Options.of(options)
        self._verdict = ALL if verdict is None else verdict
        super().__init__(os.fspath(path), thread_count=self._options.thread_count())
        self._open()

    def _open(self) -> None:
        path = existing(self.path, download=self._options.download)
        parts = sorted((path if path.is_dir() else path.parent).glob("shard-*-model-*.safetensors"))
        if len(parts) > 1:
            raise CheckpointError(
                f"{path}: {printable(parts[0].name)} and {len(parts) - 1} more are what the ranks of a "
                "HuggingFaceStorageWriter saved, each its parts of tensors; save with enable_consolidation=True and "
                "give the path of the result"
            )
        checkpoint = open_checkpoint(path)
        self._recipe = recipe_for(checkpoint, self._options)
        self._names = [info.name for info in checkpoint.selected_tensors()]
        self._regions = Regions(checkpoint, self._recipe, self._verdict, self._options)
        for warning in self._recipe.plan.warnings:
            log.warning("%s: %s", printable(str(self.path)), warning)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Start over, on another checkpoint if its path is given; called by ``dcp.load``."""
        super().reset(checkpoint_id)
        if checkpoint_id:
            self._open()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Names, sizes and dtypes as they come out; from headers alone."""
        tensors: dict[str, Any] = {}
        stored: dict[MetadataIndex, Step] = {}
        for name in self._names:
            step = self._recipe.steps[name]
            if step.action == "drop":
                continue
            size, origin = torch.Size(step.shape), torch.Size([0] * len(step.shape))
            dtype = _made(step) or self._recipe.plan.tensors[name].torch_dtype
            chunks = [ChunkStorageMetadata(origin, size)]
            tensors[step.out] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)
            stored[MetadataIndex(step.out, origin)] = step
        return Metadata(tensors, storage_data=stored, storage_meta=StorageMeta(load_id=self.load_id))

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the parts of the plan's parameters."""
        boxes = [
            _Box(item, self.storage_data[item.storage_index], planner.resolve_tensor(item)) for item in plan.items
        ]
        self._check(boxes)
        for batch in _batches(boxes):
            made = self._regions.load({box.step.name: box.wanted() for box in batch}).tensors
            for box in batch:
                box.put(made.pop(box.step.name))
                planner.commit_tensor(box.item, box.target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _check(self, boxes: list[_Box]) -> None:
        """What a parameter cannot take is known before anything is read."""
        plan = self._recipe.plan
        problems = []
        here = {box.step.name for box in boxes}
        bare = set()
        for box in boxes:
            pair, target = box.step.pair, f"its parameter {str(box.target.dtype).removeprefix('torch.')}"
            found = box.refusal()
            if found:
                problems.append(f"{plan.where(box.step.name)}: is {box.step.dtype} and {target}; {found}")
            elif box.step.role == "weight" and pair is not None:
                if not box.dequantized:
                    bare |= {box.step.name} if pair.scale not in here else set()
                elif not can_be_dequantized(pair, plan.tensors):
                    problems.append(f"{plan.where(pair.weight)}: {target}, but {unknown(pair, plan.tensors)}")
                elif pair.scale in here:
                    problems.append(
                        f"{plan.where(pair.weight)}: {target} takes value x scale, yet its scale {pair.scale} is in "
                        "the state dict and would be applied again; leave the scale out, or make the weight "
                        "float8_e4m3fn"
                    )
        if problems:
            raise OptionError(f"cannot be loaded as asked, {listing('parameter', problems)}")
        if bare:
            log.warning(
                "%s: codes without their scales, which the state dict does not have, of %s",
                printable(str(self.path)),
                listing("FP8 weight", sorted(bare), limit=3),
            )


def _made(step: Step) -> torch.dtype | None:
    dtype = getattr(torch, step.dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else None


@dataclass
class _Box:
    """A part of a tensor, and the part of a parameter that it goes to.

    Attributes:
        item: what the planner asks for.
        step: what becomes of the tensor.
        target: where it goes; of any strides, on any device.
    """

    item: ReadItem
    step: Step
    target: torch.Tensor

    def __post_init__(self) -> None:
        self.target = self.target.detach()
        self._written = False

    @property
    def dequantized(self) -> bool:
        """Is it a weight that goes into floats?"""
        return self.step.role == "weight" and self.target.dtype in _FLOATS

    def wanted(self) -> Wanted:
        region = tuple(
            (start, start + length) for start, length in zip(self.item.storage_offsets, self.item.lengths, strict=True)
        )
        right = self.target.dtype == _made(self.step) or self.dequantized
        self._written = right and self.target.device.type == "cpu" and self.target.is_contiguous()
        return Wanted(region, self.target.dtype if self.dequantized else None, self.target if self._written else None)

    def refusal(self) -> str:
        """Why the parameter's dtype cannot be, and what to do; empty if it can."""
        dtype, made, role = self.target.dtype, _made(self.step), self.step.role
        if dtype == made:
            return ""
        if role == "weight":
            if self.step.action == "dequantize" and dtype not in _FLOATS:
                return "dequantize= makes it a float; leave it out of dequantize, or make the parameter bfloat16"
            if self.step.pair is None and self.step.action == "translate":
                return "how its scale covers it is not known, so only its codes can be had"
            return "" if dtype in _FLOATS else "make it float8_e4m3fn, or bfloat16 for value x scale"
        if role != "other" and (dtype in _FLOATS or (dtype.itemsize == 1 and is_e8m0(torch.empty(0, dtype=dtype)))):
            return ""  # put() looks at the values
        if dtype in _FLOATS and made in _FLOATS:
            return ""
        return f"a cast would change what it means; make it {self.step.dtype}"

    def put(self, made: torch.Tensor) -> None:
        """Copy to the parameter what was not read into it."""
        if self._written:
            return
        if tuple(made.shape) != tuple(self.target.shape):
            raise AssertionError(f"{self.step.name}: {list(made.shape)} for a parameter of {list(self.target.shape)}")
        if self.step.role in ("scale", "activation scale") and made.dtype != self.target.dtype:
            made = self._exact(made)
        self.target.copy_(made)

    def _exact(self, scale: torch.Tensor) -> torch.Tensor:
        """A scale in the parameter's dtype, which must hold its values."""
        dtype = self.target.dtype
        if is_e8m0(scale) and is_e8m0(torch.empty(0, dtype=dtype)):
            return scale.view(dtype)
        value = scale_values(scale)
        cast = value.to(dtype)
        if not torch.equal(cast.double().nan_to_num(), value.nan_to_num()):
            raise OptionError(
                f"{self.step.name}: is {self.step.dtype}, and its parameter {str(dtype).removeprefix('torch.')} would "
                f"round it; make the parameter {'float32' if is_e8m0(scale) else self.step.dtype}"
            )
        return cast


def _batches(boxes: Iterable[_Box]) -> Iterator[list[_Box]]:
    """Boxes to be loaded together: each tensor once, pairs together, memory bounded."""
    groups: dict[tuple[str, int], list[_Box]] = {}
    times: dict[str, int] = {}
    for box in boxes:
        name, pair = box.step.name, box.step.pair
        times[name] = times.get(name, 0) + 1
        groups.setdefault((pair.scale if pair is not None else name, times[name]), []).append(box)
    batch: list[_Box] = []
    nbytes = 0
    for group in groups.values():
        size = sum(box.target.numel() * box.target.element_size() for box in group)
        names = {box.step.name for box in batch}
        if batch and (nbytes + size > _BATCH or any(box.step.name in names for box in group)):
            yield batch
            batch, nbytes = [], 0
        batch += group
        nbytes += size
    if batch:
        yield batch
