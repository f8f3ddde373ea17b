"""The Hugging Face Hub: ``org/name[@revision]`` or ``hf://org/name[@revision]``, by huggingface_hub (extra ``hub``).

What lies in the local cache is taken from there, without the network; a download happens only where it is asked for.
Headers alone can be read from the Hub itself, by requests for ranges.

Facts, read and tried in huggingface_hub 0.36, 1.33 and 2.4: ``snapshot_download(local_files_only=True)`` gives what
there is in the first, and in the others refuses a snapshot of which a part was asked for. HF_HOME, HF_HUB_CACHE,
HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are read by the library.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError
from .remote import USUAL, Entry, RemotePath, register

_ID = re.compile(r"(?:hf:/+)?(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?/?")
_TELLING = ("config.json", *USUAL, "params.json", "consolidated.safetensors", "pytorch_model.bin")
_BESIDE = ("*.json", "tokenizer*", "*.model", "*.jinja", "*.txt")


class Repository(NamedTuple):
    """A name on the Hub, and a branch, tag or commit of it; None: main."""

    name: str
    revision: str | None = None

    @classmethod
    def of(cls, given: str) -> Repository | None:
        """What a text names, if it looks like one."""
        match = _ID.fullmatch(given)
        return cls(match["name"], match["revision"]) if match else None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def snapshot(repository: Repository, *, download: bool = False) -> Path:
    """The directory of a repository in the local cache.

    Args:
        repository: which.
        download: fetch what is missing, with the library's progress bars.

    Raises:
        CheckpointError: it is not there as a whole, or cannot be fetched; what to do is in the text.
    """
    hub = _library(repository)
    reason = ""
    found = _cached(hub, repository)
    if found is not None:
        reason = _what_is_missing(found)
        if not reason:
            return found
        reason = f" (what is in the cache is not whole: {reason})"
    if not download:
        at = f" --revision {repository.revision}" if repository.revision else ""
        raise CheckpointError(
            f"{repository}: is neither a path nor a repository in the Hub cache{reason}. Nothing is downloaded unless "
            f"asked: --download, download=True, or `hf download {repository.name}{at}`. To look before: "
            f"`neuron-fp8 inspect {repository} --headers-only`"
        )
    with _worded(repository):
        files = hub.HfApi().list_repo_files(repository.name, revision=repository.revision)
        wanted = [*_BESIDE, *_weights(files)]
        return Path(hub.snapshot_download(repository.name, revision=repository.revision, allow_patterns=wanted))


def on_the_hub(repository: Repository) -> RemotePath:
    """The repository as it is on the Hub, for its headers alone. Raises CheckpointError if it cannot be had."""
    path = RemotePath(f"hf://{repository}")
    path.store.forget()
    return path


class HubFiles:
    """The files of one repository at the commit that its revision names now."""

    lists = True

    def __init__(self, root: str) -> None:
        repository = Repository.of(root)
        assert repository is not None
        self._repository, hub = repository, _library(repository)
        with _worded(repository):
            commit = hub.HfApi().model_info(repository.name, revision=repository.revision).sha
            self._files = hub.HfFileSystem(skip_instance_cache=True)
        self._root = f"{repository.name}@{commit}"

    def listed(self, directory: str) -> tuple[list[Entry], list[str]]:
        with _worded(self._repository):
            found = self._files.ls(f"{self._root}/{directory}".rstrip("/"), detail=True)
        files = [_entry(f) for f in found if f["type"] == "file"]
        return files, sorted(f["name"].rpartition("/")[2] for f in found if f["type"] == "directory")

    def entry(self, key: str) -> Entry:
        with _worded(self._repository):
            return _entry(self._files.info(f"{self._root}/{key}"))

    def get(self, key: str, known: Entry, start: int, end: int) -> bytes:
        with _worded(self._repository), self._files.open(f"{self._root}/{key}", "rb", cache_type="none") as file:
            file.seek(start)
            return bytes(file.read(end - start))


def _entry(info: dict[str, Any]) -> Entry:
    lfs = info.get("lfs") or {}
    tag = str(lfs.get("sha256") or info.get("blob_id") or "")
    return Entry(info["name"].rpartition("/")[2], int(info["size"]), tag)


def _library(repository: Repository) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"{repository}: is neither a path nor, without the extra 'hub', looked for in the Hub cache: "
            f"pip install 'neuron-fp8-loader[hub]'; or `hf download {repository.name} --local-dir DIR`, and give DIR"
        ) from error
    return huggingface_hub


def _cached(hub: Any, repository: Repository) -> Path | None:
    """The snapshot of a repository in the cache, of which some files may be missing."""
    for name in _TELLING:
        try:
            found = hub.try_to_load_from_cache(repository.name, name, revision=repository.revision)
        except ValueError:  # no name that the library knows
            return None
        if isinstance(found, str):  # else None, or a mark that the repository has no such file
            return Path(found).parent
    return None


def _what_is_missing(directory: Path) -> str:
    from .find import find  # which finds what a path stands for, and asks here for paths

    try:
        index, _files = find(directory)
        if index is not None:
            index.check_files()
    except CheckpointError as error:
        return str(error).removeprefix(f"{directory}: ").splitlines()[-1].strip(" -")
    return ""


def _weights(files: Sequence[str]) -> list[str]:
    """The weights of a repository that may have them in several forms."""
    top = [name for name in files if "/" not in name]
    safetensors = [name for name in top if name.endswith(".safetensors")]
    named = [name for name in safetensors if not name.startswith("consolidated")]  # the same weights again
    return named or safetensors or [name for name in top if name.endswith(".bin")] or ["*.safetensors"]


@contextmanager
def _worded(repository: Repository) -> Iterator[None]:
    """The library's errors in our words."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{repository}: HF_HUB_OFFLINE is set, so the Hub is not asked")
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repository}: is gated: accept its terms on its page, and log in (`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repository}: the repository has no revision {repository.revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: is neither a path nor a repository on the Hub that you may see; if it is private, log in "
            "(`hf auth login`, or HF_TOKEN)"
        ) from error
    except FileNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise CheckpointError(f"{repository}: the Hub cannot be reached ({_short(error)})") from error
        raise
    except CheckpointError:
        raise
    except Exception as error:  # requests', httpx' or httpx2' own, as the library's version has it
        raise CheckpointError(f"{repository}: the Hub cannot be read: {_short(error)}") from error


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


register("hf", HubFiles)
