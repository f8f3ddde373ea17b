"""Reading sharded weights: a page cache thread, a device thread, and two that make parameters."""

import concurrent.futures
import logging
import os
import queue
import threading
import time
from typing import NamedTuple

import torch
from safetensors import safe_open

from vllm_neuron.utils import hub
from vllm_neuron.utils.weight_loader import get_weight_loader

logger = logging.getLogger(__name__)


class CheckpointLoadResult(NamedTuple):
    state_dict: dict
    missing_keys: list
    unexpected_keys: list


class _LocalCheckpointSource:
    def __init__(self, checkpoint_dir, file_extension):
        self._dir, self._extension = checkpoint_dir, file_extension

    def get_file_names(self):
        return sorted(name for name in os.listdir(self._dir) if name.endswith(self._extension))

    def download_file(self, file_name):
        pass

    def get_file_path(self, file_name):
        return os.path.join(self._dir, file_name)


class _HFCheckpointSource:
    def __init__(self, model_name, file_extension, cache_dir):
        self._model, self._extension, self._cache = model_name, file_extension, cache_dir

    def get_file_names(self):
        return sorted(n for n in hub.list_repo_files(self._model) if n.endswith(self._extension) and "/" not in n)

    def download_file(self, file_name):
        hub.hf_hub_download(self._model, file_name, cache_dir=self._cache)

    def get_file_path(self, file_name):
        return hub.hf_hub_download(self._model, file_name, cache_dir=self._cache, local_files_only=True)


def new_store():
    """torch.distributed's default store, one a load here."""
    return torch.distributed.HashStore()


class SafetensorsCheckpoint:
    def __init__(self, model_name_or_path, cache_dir=None):
        if os.path.isdir(model_name_or_path):
            self._source = _LocalCheckpointSource(model_name_or_path, ".safetensors")
        else:
            self._source = _HFCheckpointSource(model_name_or_path, ".safetensors", cache_dir)
        self._safetensor_file_names = self._source.get_file_names()
        self._tensor_name_to_file = {}
        self._open_safetensor_files = {}

    def _open(self, file_name):
        path = self._source.get_file_path(file_name)
        self._open_safetensor_files[path] = safe_open(path, framework="pt", device="cpu")
        for key in self._open_safetensor_files[path].keys():  # noqa: SIM118
            self._tensor_name_to_file[key] = path

    def _ensure_indexed(self):
        for file_name in self._safetensor_file_names:
            self._source.download_file(file_name)
            if self._source.get_file_path(file_name) not in self._open_safetensor_files:
                self._open(file_name)

    def get_tensor_names(self):
        self._ensure_indexed()
        return set(self._tensor_name_to_file.keys())

    def get_num_files(self):
        return len(self._safetensor_file_names)

    @staticmethod
    def _keys(mappings, name):
        keys = mappings.get(name, name)
        return keys if isinstance(keys, list) else [keys]

    def _unexpected(self, model, mappings):
        asked = {key for name, _ in model.named_parameters() for key in self._keys(mappings, name)}
        return [key for key in self._tensor_name_to_file if key not in asked]

    def load_sharded(self, rank, world_size, model, mappings, device, strict=True):
        for file_name in self._safetensor_file_names:
            self._source.download_file(file_name)
            self._open(file_name)
        state_dict, missing = {}, []
        for name, param in model.named_parameters():
            keys = self._keys(mappings, name)
            absent = [key for key in keys if key not in self._tensor_name_to_file]
            if absent and strict:
                raise RuntimeError(f"Checkpoint key(s) not found for parameter '{name}': {absent}.")
            if absent:
                missing.append(name)
                continue
            loader = get_weight_loader(param)
            state_dict[name] = loader.load([self._get_slice(key) for key in keys], rank).to(device)
        return CheckpointLoadResult(state_dict, missing, self._unexpected(model, mappings))

    def load_sharded_pipelined(self, rank, world_size, model, mappings, device, dtype_override=None, strict=True):
        store = new_store()
        tensors, state_dict, missing = queue.Queue(), {}, []
        stop = threading.Event()
        params = list(model.named_parameters())
        executor = concurrent.futures.ThreadPoolExecutor(max_workers=4)
        futures = [
            executor.submit(self._load_to_page_cache, rank, world_size, store, stop),
            executor.submit(self._load_to_device, rank, tensors, state_dict, device, len(params), stop),
        ]
        seen, done = set(), set()
        try:
            while len(seen) < self.get_num_files():
                for file_name in self._safetensor_file_names:
                    if file_name not in seen and store.check([file_name]):
                        seen.add(file_name)
                        self._open(file_name)
                for name, param in params:
                    keys = self._keys(mappings, name)
                    if name in done:
                        continue
                    if not all(key in self._tensor_name_to_file for key in keys):
                        if len(seen) == self.get_num_files():
                            if strict:
                                raise RuntimeError(f"Checkpoint key(s) not found for parameter '{name}': {keys}.")
                            missing.append(name)
                            tensors.put((name, None))
                            done.add(name)
                        continue
                    target = (dtype_override or {}).get(name, param.dtype)
                    futures.append(
                        executor.submit(
                            self._process_param, name, keys, get_weight_loader(param), rank, target, tensors
                        )
                    )
                    done.add(name)
                for future in futures:
                    if future.done() and future.exception() is not None:
                        raise future.exception()
                time.sleep(0.001)
            finished, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
            for future in finished:
                future.result()
        except Exception:
            stop.set()
            tensors.put((None, None))
            raise
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
        return CheckpointLoadResult(state_dict, missing, self._unexpected(model, mappings))

    def _load_to_page_cache(self, rank, world_size, cached_files_store, shutdown_event):
        for file_name in self._source.get_file_names():
            if shutdown_event.is_set():
                return
            self._source.download_file(file_name)  # here one process reads the files of all ranks
            with open(self._source.get_file_path(file_name), "rb") as file:
                while file.read(4 << 20):
                    pass
            cached_files_store.add(file_name, 1)

    def _process_param(self, name, checkpoint_keys, weight_loader, rank, target_dtype, tensor_queue):
        tensor = weight_loader.load([self._get_slice(key) for key in checkpoint_keys], rank)
        if tensor.dtype != target_dtype:
            logger.warning("Mismatch between parameter %s ... casting to %s.", name, target_dtype)
            tensor = tensor.to(target_dtype)
        tensor_queue.put((name, tensor))

    def _load_to_device(self, rank, tensor_queue, state_dict, device, num_params, shutdown_event):
        for _ in range(num_params):
            name, tensor = tensor_queue.get()
            if name is None or shutdown_event.is_set():
                return
            if tensor is not None:
                state_dict[name] = tensor.to(device)

    def _get_slice(self, name):
        return self._open_safetensor_files[self._tensor_name_to_file[name]].get_slice(name)
