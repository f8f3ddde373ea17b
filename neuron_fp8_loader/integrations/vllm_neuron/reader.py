"""The plugin's one reading point, with FP8 weights in the dtype of the parameters that they are read for.

What is done with a weight follows from the model, not from its name: a parameter of 16 bits or more gets bfloat16,
value x scale; a float8 one, or one of packed bytes, gets FP8, rescaled for the device, and so are its scales. A loader
that asks for a weight's scale beside the weight knows how to use it, and gets both as they are.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from ...checkpoint import TensorInfo, describe
from ...checkpoint.declared import read_declared
from ...codes.device import needs_rescale
from ...codes.scales import rescaled
from ...errors import OptionError, WeightError
from ...load.bf16 import read_bfloat16, unscaled_bfloat16
from ...load.slices import ready
from ...options import Options
from ...plan import Recipe, Step, make_plan, make_recipe
from .flag import log
from .names import sharing_input, spellings

_FP8_NAMES = ("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2")  # as safetensors has them
_OTHERS = ("float8_e4m3fnuz", "float8_e5m2")


class View:
    """A lazy tensor, as the plugin's weight loaders take it. All of a single value may be ``[:]``, too."""

    def __init__(self, shape: Iterable[int], dtype: str, read: Callable[[Any], torch.Tensor]) -> None:
        self._shape, self._dtype, self._read = list(shape), dtype, read

    def get_shape(self) -> list[int]:
        """The whole tensor's shape."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """The dtype that parts come out with, as safetensors names it."""
        return self._dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        if not self._shape and index == slice(None):
            index = ()
        with torch.device("cpu"):  # safetensors obeys a default device
            return self._read(index)


class Reader:
    """Reads for one ``SafetensorsCheckpoint`` of the plugin.

    Args:
        checkpoint: it. Its files may arrive one by one: nothing is planned before all of them are there.
        options: of the flag.
        platform: "trn2", "trn3", ...; None where it is not known.
    """

    def __init__(self, checkpoint: Any, options: Options, platform: str | None) -> None:
        self._checkpoint, self._options = checkpoint, options
        self._rescales = needs_rescale(platform)
        self._lock = threading.Lock()
        self._tried = False
        self._recipe: Recipe | None = None
        self._places: dict[str, Any] = {}
        self._others: dict[str, str] = {}
        self._dtypes: dict[str, set[torch.dtype]] = {}
        self._beside: dict[str, set[str]] = {}

    # -- what there is ---------------------------------------------------------------------------------------------

    def holds_back(self, name: str) -> bool:
        """Is it an FP8 weight whose scale may be in a file that is not there yet? The plugin asks again later."""
        if self._recipe is not None or not self._is_fp8(name):
            return False
        return self._planned() is None

    def resolved(self, name: str, index: Mapping[str, str]) -> str | None:
        """The name on disk of what the plugin calls ``name``; None where there is no such tensor.

        Args:
            index: the names on disk that have been seen so far.
        """
        if dict.__contains__(index, name):
            return name
        recipe = self._planned()
        if recipe is None:
            return None
        plan = recipe.plan
        if name.endswith(".weight_scale"):
            return plan.scale_of.get(name.removesuffix("_scale"))
        kinds = {scale.name: scale.kind for scale in plan.activation_scales}
        return next((other for other, kind in spellings(name) if kinds.get(other) == kind), None)

    def scale_names(self) -> set[str]:
        """The names that belong to FP8 weights and caches: not missing where no parameter asks for them."""
        recipe = self._planned()
        return set() if recipe is None else {s.name for s in recipe.steps.values() if s.role.endswith("scale")}

    def _is_fp8(self, name: str) -> bool:
        checkpoint = self._checkpoint
        file = dict.get(checkpoint._tensor_name_to_file, name)
        opened = checkpoint._open_safetensor_files.get(file)
        return opened is not None and opened.get_slice(name).get_dtype() in _FP8_NAMES

    def _planned(self) -> Recipe | None:
        """The recipe, once all files are there. Raises PlanError as ``plan_checkpoint`` does."""
        with self._lock:
            complete = len(self._checkpoint._open_safetensor_files) == self._checkpoint.get_num_files()
            if self._recipe is None and (complete or not self._tried):
                self._tried = True  # asked of the hub's cache, whether files are there is no cheap question
                paths = self._paths()
                if paths:
                    self._recipe = self._make(paths)
            return self._recipe

    def _paths(self) -> dict[str, str] | None:
        """File name -> path, of all files; None where one has not been downloaded yet."""
        source = self._checkpoint._source
        try:
            paths = {name: str(source.get_file_path(name)) for name in self._checkpoint._safetensor_file_names}
        except Exception:  # the hub's, which we do not import
            return None
        return paths if all(Path(path).is_file() for path in paths.values()) else None

    def _make(self, paths: Mapping[str, str]) -> Recipe:
        infos: dict[str, TensorInfo] = {}
        belongs = getattr(self._checkpoint._source, "contains_tensor", lambda file, name: True)
        for file, path in paths.items():
            opened = safetensors.safe_open(path, framework="pt", device="cpu")
            for name in opened.keys():  # noqa: SIM118, no mapping
                if belongs(file, name):
                    part = opened.get_slice(name)
                    info = _header(name, part, Path(path))
                    if info.dtype in _OTHERS:  # paired with its scale as any other; read by its own values
                        self._others[name] = info.dtype
                        info = info._replace(dtype="float8_e4m3fn")
                    infos[name] = info  # of two files the last one counts, as ever there
                    self._places[name] = part
        directory = Path(next(iter(paths.values()))).parent
        plan = make_plan(infos, str(directory), read_declared(directory))
        what = Options(
            method=self._options.method, nan=self._options.nan, activation_scales=self._options.activation_scales
        )
        return make_recipe(plan, what.what)

    # -- what the model wants --------------------------------------------------------------------------------------

    def expect(self, model: Any, mappings: Mapping[str, Any], override: Mapping[str, torch.dtype]) -> None:
        """Take down for which dtypes, and beside what, the model's parameters read each tensor."""
        for name, parameter in model.named_parameters():
            keys = mappings.get(name, name)
            keys = keys if isinstance(keys, list) else [keys]
            for key in keys:
                self._dtypes.setdefault(key, set()).add(override.get(name, parameter.dtype))
                self._beside.setdefault(key, set()).update(keys)

    def is_kept(self, name: str) -> bool:
        """Is this FP8 weight read for a parameter that cannot hold bfloat16?"""
        return any(not dtype.is_floating_point or dtype.itemsize < 2 for dtype in self._dtypes.get(name, ()))

    def summary(self) -> str:
        """What happens to the FP8 weights, in one line; "" where there are none."""
        recipe = self._planned()
        if recipe is None or not recipe.weights:
            return ""
        kept = sum(self.is_kept(step.name) for step in recipe.weights)
        parts = [f"{len(recipe.weights) - kept} as bfloat16, value x scale"] if kept < len(recipe.weights) else []
        if kept:
            how = f"rescaled by {recipe.what.method}" if self._rescales else "as they are"
            parts.append(f"{kept} as FP8, {how}")
        return f"{recipe.plan.source}: {len(recipe.weights)} FP8 weights: {'; '.join(parts)}"

    # -- reading ---------------------------------------------------------------------------------------------------

    def slice(self, name: str, raw: Callable[[str], Any]) -> Any:
        """What ``SafetensorsCheckpoint._get_slice`` returns for ``name``.

        Args:
            name: as the plugin calls it.
            raw: the plugin's own ``_get_slice``.

        Raises:
            PlanError, OptionError, WeightError: what it is read for cannot be made of it. Reading a part raises
                WeightError and ScaleError for damaged values.
        """
        recipe = self._planned()
        if recipe is None:
            return raw(name)  # an FP8 weight is held back until there is one
        on_disk = self.resolved(name, self._checkpoint._tensor_name_to_file)
        step = recipe.steps.get(on_disk or "")
        if step is None:
            return raw(name)
        if step.role == "weight":
            return self._weight(recipe, step)
        if step.role == "scale" and (step.pair is None or self._scale_changes(recipe, step)):
            return self._ready(recipe, step)
        if step.activation is not None:
            return self._activation(recipe, step, name)
        part = self._places[step.name]
        return View(part.get_shape(), part.get_dtype(), part.__getitem__)

    def _weight(self, recipe: Recipe, step: Step) -> Any:
        part, pair = self._places[step.name], step.pair
        if pair is not None and pair.scale in self._beside.get(step.name, ()):
            return part
        if self.is_kept(step.name):
            if step.name in self._others:
                raise OptionError(
                    f"{recipe.plan.where(step.name)}: is {self._others[step.name]}, and the plugin's FP8 layers are "
                    'for float8_e4m3fn; NEURON_FP8_LOADER=\'{"dequantize": ["*"]}\' has it as bfloat16'
                )
            reads_scale = pair is not None and pair.scale in self._dtypes  # into a parameter of its own
            if (
                pair is not None
                and not reads_scale
                and (pair.granularity.kind != "tensor" or pair.granularity.experts)
            ):
                raise OptionError(
                    f"{recipe.plan.where(step.name)}: one scale per {pair.granularity}, and the plugin's static FP8 "
                    'layers take one a tensor; NEURON_FP8_LOADER=\'{"dequantize": ["*"]}\' has it as bfloat16'
                )
            return self._ready(recipe, step) if self._rescales else part
        plan, nan = recipe.plan, recipe.what.nan
        if pair is not None:
            scale = self._places[pair.scale]
            return View(step.shape, "BF16", lambda index: read_bfloat16(plan, pair, part, scale, index, nan))
        if self._options.unscaled == "error":
            raise WeightError(
                f"{plan.where(step.name)}: has no scale, and is to be read as bfloat16. A scale of another name: "
                "neuron_fp8_loader.conventions.register; none at all: "
                'NEURON_FP8_LOADER=\'{"unscaled": "dequantize"}\' takes its values as they are'
            )
        return View(step.shape, "BF16", lambda index: unscaled_bfloat16(plan, step.name, part, index, nan))

    def _scale_changes(self, recipe: Recipe, step: Step) -> bool:
        weights = [pair.weight for pair in recipe.plan.by_scale[step.name]]
        beside = any(step.name in self._beside.get(weight, ()) for weight in weights)
        return self._rescales and not beside and any(self.is_kept(weight) for weight in weights)

    def _ready(self, recipe: Recipe, step: Step) -> View:
        part = self._places[step.name]
        return View(part.get_shape(), part.get_dtype(), lambda index: ready(recipe, step.name, part[index]))

    def _activation(self, recipe: Recipe, step: Step, name: str) -> View:
        """An input scale (the largest of those that must be one) or a KV scale, grown with the range of the device."""
        assert step.activation is not None
        index = self._checkpoint._tensor_name_to_file
        group = [found for other in sharing_input(name) if (found := self.resolved(other, index)) is not None]
        group = [other for other in group if other in recipe.steps] or [step.name]
        part = self._places[step.name]
        grows = self._rescales and step.action == "scale"

        def read(index: Any) -> torch.Tensor:
            own: torch.Tensor = part[index]
            if len(group) > 1 and own.numel() == 1:
                others = [self._places[other][...].reshape(own.shape) for other in group]
                own = torch.stack([other.to(own.dtype) for other in others]).amax(0)
            if not grows:
                return own
            return rescaled(own, recipe.table, recipe.plan.where(step.name), reciprocal=step.reciprocal)

        return View(part.get_shape(), part.get_dtype(), read)


class Index(dict[str, str]):
    """``_tensor_name_to_file``: knows scales by the names that the plugin looks for, and holds FP8 weights back until
    their scales are there. What it lists are the names on disk."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self._reader = reader

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        if super().__contains__(name):
            return not self._reader.holds_back(name)
        return self._reader.resolved(name, self) is not None


def _header(name: str, part: Any, file: Path) -> TensorInfo:
    shape = tuple(part.get_shape())
    try:
        sample = part[0:0] if shape else part[()]
    except Exception:  # a dtype that this torch does not have: no weight or scale of FP8
        log.debug("%s: %s is %s", file, name, part.get_dtype())
        return TensorInfo(name, str(part.get_dtype()).lower(), shape, 0, file)
    info = describe(name, sample, file)
    return TensorInfo(name, info.dtype, shape, sample.element_size() * math.prod(shape), file)
