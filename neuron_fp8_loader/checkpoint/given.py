"""The path that a user gives, and what is said where it leads to no checkpoint."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import CheckpointError, OptionError, Shown, ShownPath
from .regular import stamp

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_OTHER_FORMATS = {
    ".gguf": "is a GGUF file, whose weights are in formats of llama.cpp; get the checkpoint's safetensors files",
    **dict.fromkeys(
        (".pt", ".pth", ".ckpt", ".pkl"),
        "is a file of torch.save; load it with torch.load(..., weights_only=True) and give its state dict to "
        "rescale_state_dict, or save that with safetensors",
    ),
    ".onnx": "is an ONNX model; get the checkpoint's safetensors files",
    ".h5": "is a TensorFlow file; get the checkpoint's safetensors files",
    ".msgpack": "is a Flax file; get the checkpoint's safetensors files",
    ".npz": "is a numpy file; get the checkpoint's safetensors files",
}

_LFS = b"version https://git-lfs.github.com/spec/"
_GGUF = b"GGUF"


def existing(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """The path, given as ``argument``, which leads to a directory or a regular file.

    Raises:
        CheckpointError: there is none; the text says what the path looks like and what to do.
        OptionError: not a path at all.
    """
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"{argument}={path!r}: expected a path, not a {type(path).__name__}")
    given = os.fsdecode(path)
    if not given:
        raise CheckpointError("the path is empty; give a directory, a .safetensors or .bin file, or an index")
    try:
        found = os.path.exists(given)
        if not found:
            os.stat(given)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name too long, or with a null byte
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CheckpointError(f"{given[:200]!r}: cannot be read: {reason}") from error
    if not found:
        raise CheckpointError(f"{Shown(given)}: {_missing(given)}")
    if not os.path.isdir(given):
        stamp(ShownPath(given))
    return ShownPath(given)


def existing_file(path: str | os.PathLike[str], function: str) -> Path:
    """The path of a regular ``.safetensors`` or ``.bin`` file, for a function that takes one.

    Raises:
        CheckpointError: there is none, or it is of another kind.
    """
    file = existing(path, "filename")
    if file.is_dir():
        raise CheckpointError(
            f"{file}: is a directory; {function} takes one .safetensors file, load_state_dict a directory"
        )
    require_format(file)
    return file


def require_format(file: Path) -> None:
    """Raise CheckpointError unless the name is that of a ``.safetensors`` or ``.bin`` file."""
    if file.suffix in (".safetensors", ".bin"):
        return
    other = _OTHER_FORMATS.get(file.suffix.lower())
    raise CheckpointError(
        f"{file}: {other or 'expected a directory, a .safetensors or .bin file, or an index (.index.json)'}"
    )


def refuse_stand_in(file: Path, begin: bytes) -> None:
    """Raise CheckpointError if a file that begins so is something else under the name of weights."""
    if begin.startswith(_LFS):
        raise CheckpointError(
            f"{file}: is a Git LFS pointer, not the weights; run `git lfs pull` where it was cloned, or "
            "`hf download` the model"
        )
    if begin.startswith(_GGUF) and file.suffix == ".safetensors":  # whose header would be 300 MB long
        raise CheckpointError(f"{file}: {_OTHER_FORMATS['.gguf']}")


def nothing_in(directory: Path) -> str:
    """What to say of a directory without a checkpoint."""
    snapshots = sorted(p for p in directory.glob("snapshots/*") if p.is_dir())
    if directory.name.startswith("models--") or snapshots:
        main = directory / "refs" / "main"
        try:
            current = directory / "snapshots" / main.read_text(encoding="utf-8").strip() if main.is_file() else None
        except (OSError, ValueError):
            current = None
        if snapshots:
            named = current if current in snapshots else max(snapshots, key=lambda p: p.stat().st_mtime)
            return f"is the root of a Hub cache; give the snapshot in it: {named}"
        return "is the root of a Hub cache without a snapshot; download the model again with `hf download`"
    for file in sorted(directory.iterdir()):
        other = _OTHER_FORMATS.get(file.suffix.lower())
        if other:
            return f"no checkpoint here; {Shown(file.name)} {other}"
    return "no checkpoint here; expected *.safetensors, *.safetensors.index.json or pytorch_model.bin"


def _missing(given: str) -> str:
    if _URL.match(given):
        return "is a URL, and only local files are read; download it first and give the directory"
    if _HUB_ID.fullmatch(given) and not os.path.exists(os.path.dirname(given)):
        return (
            "is neither a file nor a directory; it looks like a Hub id: download it first with "
            f"`hf download {Shown(given)} --local-dir DIR`, and give DIR"
        )
    return "no such file or directory"
