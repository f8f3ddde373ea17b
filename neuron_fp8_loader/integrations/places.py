"""Checkpoints that do not lie where NxD Inference looks for them: in a store, or in the cache of the Hub.

Facts, read in NxD Inference 0.9 and 0.10: ``checkpoint_loader_fn`` raises FileNotFoundError for a
``quantized_checkpoints_path`` that does not exist, and ``load_state_dict`` reads what the names in the directory say.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint import URL, existing
from ..errors import CheckpointError

_PATH = "quantized_checkpoints_path"
_SHOWN = "model.safetensors"

_stores: dict[str, str] = {}


def is_store(path: Any) -> bool:
    """Is it the URL of a checkpoint in a store?"""
    return isinstance(path, str) and URL.match(path) is not None and not path.lower().startswith("hf:")


def here(path: Any) -> Any:
    """The snapshot in the Hub's cache for ``org/name``; anything else as it is."""
    if not isinstance(path, str) or os.path.exists(path) or is_store(path) or "/" not in path:
        return path
    try:
        return str(existing(path))
    except CheckpointError:
        return path  # NxD Inference says what it says of paths that do not exist


@contextmanager
def standing_in(neuron_config: Any) -> Iterator[None]:
    """Within the block a store is a directory, which shows the name of a checkpoint and no bytes: what NxD Inference
    wants to read there, ``behind`` leads to the store."""
    path = getattr(neuron_config, _PATH, None)
    if not isinstance(path, str) or not is_store(path):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="neuron-fp8-") as directory:
        (Path(directory) / _SHOWN).touch()  # empty: whoever read it by itself would fail
        _stores[directory] = path
        setattr(neuron_config, _PATH, directory)
        try:
            yield
        finally:
            setattr(neuron_config, _PATH, path)
            del _stores[directory]


def behind(directory: str, file_name: str) -> str:
    """The path of a file in a directory, or the URL that the directory stands for."""
    return _stores.get(directory.rstrip("/")) or os.path.join(directory, file_name)
