"""``safe_open`` whose tensors and slices come out Neuron-ready."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Any

import safetensors
import torch

from ..checkpoint import RemotePath, check_unchanged, existing_file, open_checkpoint
from ..codes.dequantize import values
from ..codes.formats import E4M3FN
from ..codes.kernel import Counts, translate
from ..codes.scales import check_scale, rescaled
from ..errors import CheckpointError, OptionError
from ..host.memory import as_bytes, check_mode
from ..options import Options
from ..plan import ALL, Plan, Recipe, Step, recipe_for
from .arguments import check_backend, checked_device
from .checks import check_weights
from .lazy import LazyFile
from .parts import refuse_fused

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..options import OptionKeywords


class safe_open:
    """Drop-in for ``safetensors.safe_open``: ``get_tensor`` and ``get_slice(...)[...]`` return Neuron-ready values.

    A slice is converted by itself, with no state shared between a weight's reader and its scale's reader. Since a
    slice does not tell whether the whole weight fits, every weight that has a scale is converted, and every scale.

    Args:
        filename: one ``.safetensors`` file; scales may be in the shards that an index beside it lists. Of one in a
            store only what is asked for is read.
        framework: ``"pt"``.
        device: where the values go once converted.
        backend: taken because safetensors 0.8 takes it, and without effect: the file is mapped.
        **options: see ``Options``; ``always`` and ``threads`` mean nothing here.

    Raises:
        CheckpointError, PlanError: as ``plan_checkpoint``; OptionError: another framework, ``layout``,
            ``experts`` or ``dequantize``. Reading raises WeightError and ScaleError as ``load_file`` does, for the
            slice at hand.
    """

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str = "pt",
        device: str | int | torch.device = "cpu",
        *,
        backend: str = "mmap",
        **options: Unpack[OptionKeywords],
    ) -> None:
        if framework not in ("pt", "torch", "pytorch"):
            raise OptionError(f"framework={framework!r}: neuron_fp8_loader.safe_open gives torch tensors ('pt') only")
        check_backend(backend)
        file = existing_file(filename, "safe_open", download=options.get("download", False))
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{file}: is no .safetensors file, which is what safe_open takes")
        self._options = Options.of(options)
        if self._options.layout != "keep" or self._options.dequantize:
            raise OptionError("layout and dequantize need whole pairs of weight and scale; use load_state_dict")
        refuse_fused(self._options, "safe_open")
        checkpoint = open_checkpoint(file)
        self._recipe = recipe_for(checkpoint, self._options)
        self.plan: Plan = self._recipe.plan
        self._device = checked_device(device)
        self._file: Any
        if isinstance(file, RemotePath):
            self._file = LazyFile(checkpoint, file, self._options.thread_count())
            return
        self._file = safetensors.safe_open(str(file), framework="pt", device="cpu")
        check_unchanged(file, checkpoint.stamps[file])

    def __enter__(self) -> safe_open:
        self._file.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def keys(self) -> list[str]:
        """The names of the tensors in this file."""
        return list(self._file.keys())

    def offset_keys(self) -> list[str]:
        """The names, in the order of their data."""
        return list(self._file.offset_keys())

    def metadata(self) -> dict[str, str] | None:
        """The file's own metadata."""
        found = self._file.metadata()
        return None if found is None else dict(found)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, converted."""
        _check_name(name)
        check_mode()
        with torch.device("cpu"):  # safetensors obeys a default device, and may run inside `torch.device("meta")`
            return self._ready(name, self._file.get_tensor(name))

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the file, converted, in the order of their data."""
        return {name: self.get_tensor(name) for name in self.offset_keys()}

    def get_slice(self, name: str) -> Slice:
        """A lazy tensor: index it for the converted values of a part."""
        _check_name(name)
        return Slice(self, name, self._file.get_slice(name))

    def _ready(self, name: str, part: torch.Tensor) -> torch.Tensor:
        return ready(self._recipe, name, part).to(self._device)


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise OptionError(f"name={name!r}: expected the name of a tensor, not a {type(name).__name__}")


def ready(recipe: Recipe, name: str, part: torch.Tensor) -> torch.Tensor:
    """What a part of the tensor ``name`` becomes if every weight is converted; a new tensor where it changes.

    Args:
        recipe: with ``layout="keep"`` and nothing to dequantize by a scale.
        name: on disk.
        part: any part of the tensor, on the CPU.

    Raises:
        WeightError, ScaleError: as ``load_file`` does, for this part.
    """
    step = recipe.steps[name]
    if step.role == "weight":
        return _weight(recipe, step, part)
    if step.role in ("scale", "activation scale"):
        where = recipe.plan.where(name)
        if recipe.what.nan == "error":
            check_scale(part, where)
        if step.action == "scale" and ALL.applies(step):
            part = rescaled(part, recipe.table, where, reciprocal=step.reciprocal)
    return part


def _weight(recipe: Recipe, step: Step, part: torch.Tensor) -> torch.Tensor:
    assert step.table is not None  # every weight has one
    part = part.contiguous()
    fresh = torch.empty_like(part, dtype=E4M3FN, device="cpu") if step.action == "translate" else None
    seen: Counts = translate(as_bytes(part), None if fresh is None else as_bytes(fresh), step.table)
    check_weights(recipe, {step.name: seen})
    if fresh is not None:
        return fresh
    return values(part) if step.action == "dequantize" else part


class Slice:
    """A tensor of an open file, read and converted a part at a time."""

    def __init__(self, owner: safe_open, name: str, part: Any) -> None:
        self._owner, self._name, self._part = owner, name, part

    def get_shape(self) -> list[int]:
        """The whole tensor's shape."""
        return list(self._part.get_shape())

    def get_dtype(self) -> str:
        """The dtype on disk, as safetensors names it."""
        return str(self._part.get_dtype())

    def __getitem__(self, index: Any) -> torch.Tensor:
        check_mode()
        with torch.device("cpu"):  # as in get_tensor
            try:
                part = self._part[index]
            except TypeError as error:
                raise OptionError(f"{self._name}[{index!r}]: expected whole numbers and slices: {error}") from error
            return self._owner._ready(self._name, part)
