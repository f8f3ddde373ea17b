import json
import os

import torch
from safetensors.torch import load_file


def load_state_dict(state_dict_dir):
    for name, load in (
        ("model.safetensors", "load_safetensors"),
        ("diffusion_pytorch_model.safetensors", "load_diffusers_safetensors"),
        ("model.safetensors.index.json", "load_safetensors_sharded"),
        ("diffusion_pytorch_model.safetensors.index.json", "load_safetensors_sharded_diffusers_model"),
        ("pytorch_model.bin", "load_pytorch_model_bin"),
        ("pytorch_model.bin.index.json", "load_pytorch_model_bin_sharded"),
    ):
        if os.path.isfile(os.path.join(state_dict_dir, name)):
            return globals()[load](state_dict_dir)
    raise FileNotFoundError(f"Can not find model.safetensors or pytorch_model.bin in {state_dict_dir}")


def load_safetensors(state_dict_dir):
    return load_file(os.path.join(state_dict_dir, "model.safetensors"))


def load_diffusers_safetensors(state_dict_dir):
    return load_file(os.path.join(state_dict_dir, "diffusion_pytorch_model.safetensors"))


def _load_from_files(filenames, state_dict_dir, load_func):
    state_dict = {}
    for name in set(filenames):
        state_dict.update(load_func(os.path.join(state_dict_dir, name)))
    return state_dict


def _listed(state_dict_dir, index):
    with open(os.path.join(state_dict_dir, index)) as file:
        return json.load(file)["weight_map"].values()


def load_safetensors_sharded(state_dict_dir):
    return _load_from_files(_listed(state_dict_dir, "model.safetensors.index.json"), state_dict_dir, load_file)


def load_safetensors_sharded_diffusers_model(state_dict_dir):
    index = "diffusion_pytorch_model.safetensors.index.json"
    return _load_from_files(_listed(state_dict_dir, index), state_dict_dir, load_file)


def _torch_load(file_path):
    return torch.load(file_path, mmap=True, map_location="cpu")


def load_pytorch_model_bin(state_dict_dir):
    return _torch_load(os.path.join(state_dict_dir, "pytorch_model.bin"))


def load_pytorch_model_bin_sharded(state_dict_dir):
    return _load_from_files(_listed(state_dict_dir, "pytorch_model.bin.index.json"), state_dict_dir, _torch_load)


def save_state_dict_safetensors(state_dict, state_dict_dir, max_shard_size="10GB"):
    from safetensors.torch import save_file

    save_file(state_dict, os.path.join(state_dict_dir, "model.safetensors"))
