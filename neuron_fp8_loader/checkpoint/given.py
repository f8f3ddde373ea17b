"""The path that a user gives, and what is said where it leads to no checkpoint."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import CheckpointError, OptionError, Shown, ShownPath
from . import store  # whose schemes RemotePath opens
from .hub import Repository, on_the_hub, snapshot
from .regular import stamp
from .remote import URL, RemotePath

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

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


def existing(
    path: str | os.PathLike[str], argument: str = "path", *, download: bool = False, headers_only: bool = False
) -> Path:
    """The path, given as ``argument``, which leads to a directory or a regular file, here or in a store.

    Args:
        path: a path; the URL of a file or prefix in a store (``s3://``, ``gs://``, ``az://``, ``http(s)://``); or,
            where nothing lies at such a path, ``org/name[@revision]`` of the Hugging Face Hub, also as ``hf://...``.
        download: fetch a repository of the Hub that is not in its cache.
        headers_only: look at a repository on the Hub itself if it is not in the cache.

    Returns:
        a ``RemotePath`` for what lies in a store, as the store has it now; the root of a Hub cache leads to its
        snapshot.

    Raises:
        CheckpointError: there is none; the text says what the path looks like and what to do.
        OptionError: not a path at all.
    """
    for name, value in (("download", download), ("headers_only", headers_only)):
        if not isinstance(value, bool):
            raise OptionError(f"{name}={value!r}: expected True or False")
    if isinstance(path, RemotePath):
        return path
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"{argument}={path!r}: expected a path, not a {type(path).__name__}")
    given = os.fsdecode(path)
    if not given:
        raise CheckpointError("the path is empty; give a directory, a .safetensors or .bin file, or an index")
    if URL.match(given) and not given.lower().startswith("hf:"):
        return _in_store(given)
    try:
        found = os.path.exists(given)
        if not found:
            os.stat(given)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name too long, or with a null byte
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CheckpointError(f"{given[:200]!r}: cannot be read: {reason}") from error
    repository = None if found else Repository.of(given)
    if repository is not None and not os.path.exists(os.path.dirname(given) or "."):
        try:
            return snapshot(repository, download=download)
        except CheckpointError:
            if not headers_only or download:
                raise
            return on_the_hub(repository)
    if not found:
        raise CheckpointError(f"{Shown(given)}: {_missing(given)}")
    if not os.path.isdir(given):
        stamp(ShownPath(given))
    return _cached_snapshot(ShownPath(given)) or ShownPath(given)


def _in_store(given: str) -> RemotePath:
    path = RemotePath(given)
    if given.lower().startswith("http") and ("?" in given or "#" in given):
        raise CheckpointError(
            f"{given.partition('?')[0]}?...: is a URL with a query, as presigned ones are, which is for one file "
            "and a while; download it, or give credentials and the s3:// URL"
        )
    if len(path.parts) < 2:
        raise CheckpointError(f"{given}: names no bucket")
    store.require(given)
    path.store.forget()
    if not path.exists() or (not path.key and path.store.denied):
        denied = path.store.denied
        raise CheckpointError(denied or f"{given}: there is no such object, and nothing below such a prefix")
    return path


def _cached_snapshot(directory: Path) -> Path | None:
    """The current snapshot, if this is the root of a repository in a Hub cache (``models--org--name``)."""
    if not directory.resolve().name.startswith("models--"):
        return None
    try:
        current = directory / "snapshots" / (directory / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        snapshots = [found for found in directory.glob("snapshots/*") if found.is_dir()]
        return snapshots[0] if len(snapshots) == 1 else None
    return current if current.is_dir() else None


def existing_file(path: str | os.PathLike[str], function: str, *, download: bool = False) -> Path:
    """The path of a regular ``.safetensors`` or ``.bin`` file, for a function that takes one.

    Raises:
        CheckpointError: there is none, or it is of another kind.
    """
    file = existing(path, "filename", download=download)
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
        return (
            "is a URL of a kind that is not read (s3, gs, az, http and https are); download it and give the directory"
        )
    return "no such file or directory"
