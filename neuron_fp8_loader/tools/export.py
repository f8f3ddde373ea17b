"""A converted copy on disk, for those who need one: shard by shard, resumable, never half a file.

OUT gets the configs first, then the shards, the index last; each is written beside and renamed. A hidden file in OUT
says whose export it is and whether it is finished, so an interrupted one resumes and a foreign directory is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, TensorInfo, open_checkpoint
from ..checkpoint.regular import LONGEST_CONFIG, read_json
from ..checkpoint.remote import URL
from ..errors import CheckpointError, ShownPath, WeightError
from ..host.parallel import progress
from ..host.units import size
from ..load.parts import Parts, refuse_fused
from ..options import Options
from ..plan import Recipe, Verdict, converted
from .copying import OTHER_DECLARATIONS, Form, config_after, form_for, written
from .scan import scan
from .shards import PARTIAL, ExportError, Target, beside, copy_beside, nbytes_after, write_bin, write_safetensors
from .stacks import Aim, aim_for

STATE = ".neuron-fp8-export.json"
"""The file in OUT that says what is being exported to it."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".partial")
_DIFFERENT = {"options": "other options", "for": "other options", "version": "another version"}
_SPARE = 16 << 20  # bytes for headers that grow by a note, and the file system's own


@dataclass
class Export:
    """One export, prepared: nothing is written before ``run``.

    Attributes:
        checkpoint, form, options: what is exported, in which form, and how.
        stack: which it is for, "" for none.
        refusals: why a load would stop, as far as headers tell.
        out: the directory that it goes to.
        base: the directory that it comes from.
        others: files carried over as they are, relative to ``base``.
        done: shards found finished in ``out``, relative to ``base``.
        needed: bytes still to be written.
        free: bytes free where ``out`` lies.
        state: what the hidden file of an earlier, interrupted run says; empty for a new export.
    """

    checkpoint: Checkpoint
    form: Form
    options: Options
    out: Path
    base: Path
    others: list[Path]
    done: list[Path] = field(default_factory=list)
    needed: int = 0
    free: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    stack: str = ""
    refusals: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """What is done with each tensor."""
        return self.form.recipe

    @property
    def finished(self) -> bool:
        """Is the whole export there already?"""
        return bool(self.state.get("finished")) and len(self.done) == len(self.checkpoint.files)

    @property
    def rescaled(self) -> int:
        """How many weights are rescaled; known once ``run`` has looked at their codes."""
        return len(converted(self.recipe, self.verdict)) if self.state else 0

    @property
    def verdict(self) -> Verdict:
        """Which weights are rescaled, as the hidden file says."""
        return Verdict(frozenset(self.state["convert"]), bool(self.state["overflow"]))

    def run(self) -> None:
        """Write what is missing.

        Raises:
            WeightError: what a load would refuse; nothing is written then.
            ExportError, OSError: no room, or another export is writing here.
            Other Fp8LoaderError: as ``load_state_dict``.
        """
        if self.finished:
            return
        if self.needed + _SPARE > self.free:
            raise ExportError(f"{self.out}: {size(self.needed)} needed, {size(self.free)} free; give another disk")
        if not self.state:
            self.state = self._decided()
        self.out.mkdir(parents=True, exist_ok=True)
        with _locked(self.out):
            self._save_state()
            self._write()
            self.state["finished"] = True
            self._save_state()

    def _decided(self) -> dict[str, Any]:
        found = scan(self.checkpoint, self.recipe, self.options, self.refusals)
        if found.refusals:
            raise WeightError("\n".join(found.refusals))
        groups = sorted({self.recipe.steps[name].group for name in found.rescaled})
        decided = {"convert": groups, "overflow": found.verdict.any, "finished": False}
        return {**_identity(self.checkpoint, self.options, self.stack), **decided}

    def _write(self) -> None:
        parts = Parts(self.checkpoint, self.recipe, self.verdict, self.options)
        for other in self.others:
            self._carry_over(other)
        by_file = _by_file(self.checkpoint)
        left = [file for file in self.checkpoint.files if file.relative_to(self.base) not in self.done]
        total = sum(info.nbytes for file in left for info in by_file[file])
        note = json.dumps(
            {
                "what": "float8_e4m3fn weights rescaled to +-240 for AWS Neuron, their scales multiplied to make up",
                "version": self.state["version"],
                "method": self.options.method,
                "weights_rescaled": self.rescaled,
            }
        )
        with progress("exporting", total, self.options.progress) as advance:
            for file in left:
                target, infos = Target(self.out, file.relative_to(self.base)), by_file[file]
                if infos and not _left_of(infos, self.recipe):
                    advance(sum(info.nbytes for info in infos))  # a shard of scales that are all dropped
                elif self.checkpoint.is_bin:
                    write_bin(target, infos, parts, self.form, advance)
                elif infos:
                    write_safetensors(target, infos, parts, self.form, note, advance)
                else:
                    copy_beside(file, target)
                self.done.append(file.relative_to(self.base))
        if self.checkpoint.index:
            self._write_index(self.checkpoint.index)

    def _carry_over(self, other: Path) -> None:
        source, target = self.base / other, Target(self.out, other)
        if self.form.changed and other.name == "config.json":
            try:
                content = config_after(source, self.form)
            except (OSError, CheckpointError, AttributeError):
                pass  # nobody can read it: as it is
            else:
                with beside(target) as file:
                    file.write(content)
                return
        copy_beside(source, target)

    def _write_index(self, index: Path) -> None:
        content = json.loads(index.read_text(encoding="utf-8"))
        infos = self.checkpoint.tensors.values()
        total = nbytes_after(infos, self.recipe)
        target = Target(self.out, index.relative_to(self.base))
        names = written(self.recipe.steps)
        if total == sum(info.nbytes for info in infos) and all(old == new for old, new in names.items()):
            copy_beside(index, target)
            return
        content["weight_map"] = {names[n]: file for n, file in content["weight_map"].items() if n in names}
        metadata = content.get("metadata")
        content["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
        with beside(target) as file:
            file.write(json.dumps(content, indent=2).encode())

    def _save_state(self) -> None:
        with beside(Target(self.out, Path(STATE))) as file:
            file.write(json.dumps(self.state, indent=1).encode())


def prepare_export(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    stack: str | None = None,
    experts_as: str | None = None,
    **options: Any,
) -> Export:
    """Check everything that can be checked before an export: headers, pairs, OUT, disk.

    Args:
        path: a whole checkpoint: a directory, an index, or a single file.
        out: the directory to write; new, empty, or an interrupted export of the same checkpoint.
        stack: ``"nxd"`` or ``"vllm-neuron"``: the copy is what that stack takes (``copying``), if need be with other
            names and shapes, and config.json says so; None: names as they are, shapes as the options say.
        experts_as: for ``"nxd"``, as ``experts`` of ``settings_for``.
        **options: see ``Options``.

    Raises:
        CheckpointError, PlanError, OptionError: as ``load_checkpoint``.
        ExportError: ``path`` is one shard of several, ``out`` is not fit, or no copy would serve the stack.
    """
    refuse_fused(Options.of({n: v for n, v in options.items() if n != "layout" or v is not None}), "an export")
    checkpoint = open_checkpoint(path, download=options.get("download", False))
    if checkpoint.is_remote:
        raise ExportError(
            f"{checkpoint.path}: lies in a store, and an export is made from a directory; copy it to one first"
        )
    if checkpoint.selected != frozenset(checkpoint.files):
        raise ExportError(
            f"{checkpoint.path}: is one of {len(checkpoint.files)} shards; give their directory or the index"
        )
    if URL.match(os.fsdecode(out)):
        raise ExportError(
            f"{os.fsdecode(out)}: is a URL, and an export goes to a directory; copy that to a store then"
        )
    base = checkpoint.index.parent if checkpoint.index else checkpoint.files[0].parent
    out = ShownPath(out)
    _check_place(Path(path), base, out)
    aim = aim_for(checkpoint, stack, options, experts_as)
    _check_use(aim)
    chosen, form = aim.options, form_for(aim) if stack else Form(aim.recipe)
    recipe = form.recipe
    others = [other for other in _others(checkpoint, Path(path), base) if not _stale(other, form)]
    export = Export(checkpoint, form, chosen, out, base, others, stack=aim.stack, refusals=aim.refusals)
    export.state = _resumable(out, checkpoint, chosen, aim.stack)
    by_file = _by_file(checkpoint)
    for file in checkpoint.files:
        grown = nbytes_after(by_file[file], recipe) - sum(info.nbytes for info in by_file[file])
        empty = bool(by_file[file]) and not _left_of(by_file[file], recipe)
        if export.state and (empty or Target(out, file.relative_to(base)).is_there()):
            export.done.append(file.relative_to(base))
        else:
            export.needed += file.stat().st_size + grown
    for other in export.others:
        Target(out, other).is_there()  # refuses links
    if not export.finished:
        export.needed += sum((base / other).stat().st_size for other in export.others)
    export.free = shutil.disk_usage(_existing(out)).free
    return export


def _stale(other: Path, form: Form) -> bool:
    """Does a file say how the original was quantized, which the copy is not?"""
    return form.changed and other.name in OTHER_DECLARATIONS


def _check_use(aim: Aim) -> None:
    """Raise ExportError where no copy serves the stack."""
    plan = aim.recipe.plan
    if aim.stack and not plan.fp8_weights:
        raise ExportError(f"{plan.source}: no FP8 weights, so there is nothing to convert; see neuron-fp8 inspect")
    if aim.design is not None and aim.design.kept:
        raise ExportError(
            f"{plan.source}: the vLLM Neuron plugin's static FP8 layers rescale what they read, a converted copy too; "
            "serve the checkpoint itself with --quantization neuron_fp8, which keeps them from it, or have a bfloat16 "
            'copy (dequantize="*")'
        )


def _check_place(path: Path, base: Path, out: Path) -> None:
    inside, whole = out.resolve(), base.resolve()
    if inside == whole or (whole in inside.parents and not _is_single_file(path)):
        raise ExportError(f"{out}: lies in the checkpoint {base}, which stays as it is; give a directory outside it")
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out}: is a file; an export goes to a directory")


def _resumable(out: Path, checkpoint: Checkpoint, options: Options, stack: str) -> dict[str, Any]:
    """The state of an interrupted export of the same thing, {} for a fresh directory; else ExportError."""
    # a first run that was killed as it wrote its note leaves but a part of that
    if not out.is_dir() or all(file.name == STATE + PARTIAL for file in out.iterdir()):
        return {}
    try:
        state = read_json(out / STATE, LONGEST_CONFIG)
        ours = isinstance(state["convert"], list) and isinstance(state["overflow"], bool)
        ours = ours and isinstance(state["files"], dict)
    except (OSError, CheckpointError, KeyError, TypeError):
        ours = False
    if not ours:
        raise ExportError(f"{out}: is not empty and not an export of ours; give a new or an empty directory")
    for key, value in _identity(checkpoint, options, stack).items():
        if state.get(key) != value:
            what = _DIFFERENT.get(key, "other files")
            raise ExportError(
                f"{out}: holds an export made from {what} ({key} differ); delete it, or give another directory"
            )
    return dict(state)


def _identity(checkpoint: Checkpoint, options: Options, stack: str) -> dict[str, Any]:
    """What must be the same for an export to be resumed."""
    from .. import __version__

    stats = {file: file.stat() for file in checkpoint.files}
    identity: dict[str, Any] = {
        "version": __version__,
        "for": stack,
        "files": {str(file.resolve()): [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
        "options": {
            name: value for name, value in vars(options).items() if name not in ("threads", "progress", "download")
        },
    }
    return dict(json.loads(json.dumps(identity)))  # as it will be read back


def _others(checkpoint: Checkpoint, path: Path, base: Path) -> list[Path]:
    """Configs, tokenizer, model code: every file beside the weights that is not weights, hidden ones left out."""
    if _is_single_file(path) and not (base / "config.json").is_file():
        return []  # a folder of many models
    found = base.iterdir() if _is_single_file(path) else base.rglob("*")
    relative = [file.relative_to(base) for file in found if file.is_file()]
    return sorted(
        file
        for file in relative
        if file.suffix not in _WEIGHTS
        and not file.name.endswith(tuple(suffix + ".index.json" for suffix in _WEIGHTS))
        and not any(part.startswith(".") for part in file.parts)
    )


def _is_single_file(path: Path) -> bool:
    return path.is_file() and path.suffix in (".safetensors", ".bin")


def _by_file(checkpoint: Checkpoint) -> dict[Path, list[TensorInfo]]:
    by_file: dict[Path, list[TensorInfo]] = {file: [] for file in checkpoint.files}
    for info in checkpoint.tensors.values():
        assert info.file is not None
        by_file[info.file].append(info)
    return by_file


def _left_of(infos: list[TensorInfo], recipe: Recipe) -> bool:
    """Is there any tensor of a shard in the copy?"""
    return any(recipe.steps[info.name].action != "drop" for info in infos)


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExportError(f"{out}: another export is writing here") from None
        except OSError:
            pass  # a network file system without locks
        yield
    finally:
        os.close(handle)
