"""The stand-in of vLLM and its Neuron plugin, imported afresh for every test, and loads through it."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from tests.support import save

PACKAGES = ("vllm", "vllm_neuron", "libtorch_neuronx_lite")
STANDIN = Path(__file__).parent / "standin_vllm_neuron"


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
        del sys.modules[name]


class Plugin:
    """What a user does, and what can be looked at."""

    def module(self, name: str) -> Any:
        return importlib.import_module(name)

    @property
    def checkpoints(self) -> Any:
        return self.module("vllm_neuron.utils.checkpoints")

    def configure(self, path: str | Path, **kwargs: Any) -> Any:
        """As the API server does: plugins, ModelConfig, VllmConfig."""
        return self.module("vllm.config").create_engine_config(str(path), **kwargs)

    def load(self, path: str | Path, *, rank: int = 0, tp: int = 1, **kwargs: Any) -> Any:
        """The model of one rank, loaded by its worker."""
        config = self.configure(path, **kwargs)
        return self.worker(config, rank, tp).load_model().model

    def worker(self, config: Any, rank: int = 0, tp: int = 1) -> Any:
        return self.module("vllm_neuron.vllm.worker.neuron_worker").NeuronWorker(config, rank, tp)

    def read(self, path: str | Path, parameters: dict[str, Any], *, tp: int = 1, rank: int = 0) -> Any:
        """Load parameters that are given as name -> (dtype, loader, keys)."""
        model = torch.nn.Module()
        mappings = {}
        for name, (dtype, loader, keys) in parameters.items():
            parameter = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            self.module("vllm_neuron.utils.weight_loader").set_weight_loader(parameter, loader)
            setattr(model, name, parameter)
            mappings[name] = keys
        checkpoint = self.checkpoints.SafetensorsCheckpoint(str(path))
        return checkpoint.load_sharded_pipelined(rank, tp, model, mappings, torch.device("cpu"))


class Hub:
    """A hub whose files lie in a directory, and come into the cache one by one, without the index."""

    def __init__(self, remote: Path, cache: Path, plugin: Plugin) -> None:
        self.remote, self.cache = remote, cache
        cache.mkdir()
        hub = plugin.module("vllm_neuron.utils.hub")
        hub.list_repo_files = lambda name: sorted(f.name for f in remote.iterdir())
        hub.hf_hub_download = self.download
        self.downloaded: list[str] = []
        self.last_may_come = threading.Event()
        """A file numbered 3 waits for this."""

    def download(self, name: str, file: str, cache_dir: Any = None, local_files_only: bool = False) -> str:
        target = self.cache / file
        if not target.is_file():
            if local_files_only:
                raise OSError(f"{file} is not in the cache")
            if "-00003-of" in file:
                assert self.last_may_come.wait(20)
            self.downloaded.append(file)
            part = target.with_name(
                f"{file}.{threading.get_ident()}.incomplete"
            )  # as the real one: all of it or nothing
            part.write_bytes((self.remote / file).read_bytes())
            part.replace(target)
        return str(target)


def static_llama(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    """A Llama of one layer, hidden 128, 2 heads of 64, 1 KV head, with these tensors instead or on top."""
    directory.mkdir(parents=True, exist_ok=True)
    base = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 32, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps({**base, **config}))
    save(directory / "model.safetensors", tensors)
    return directory


def vocabulary(hidden: int = 128, size: int = 32) -> dict[str, torch.Tensor]:
    """What a Llama of one layer has that is not FP8."""
    names = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    norms = {f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in names}
    table = torch.randn(size, hidden, generator=torch.Generator().manual_seed(1)).bfloat16()
    return {**norms, "model.embed_tokens.weight": table, "lm_head.weight": table.clone()}


SHAPES = {
    "self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128), "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128),
    "mlp.gate_proj": (256, 128), "mlp.up_proj": (256, 128), "mlp.down_proj": (128, 256),
}  # fmt: skip
"""Of such a Llama's projections."""


def in_a_worker(path: str, pipe: Any) -> None:
    """A process of a worker, which vLLM starts by fork or by spawn: its plugins, then its model."""
    plugin = Plugin()
    plugin.module("vllm.plugins").load_general_plugins()
    loader = plugin.module("vllm_neuron.utils.weight_loader").SafetensorsWeightLoader()
    result = plugin.read(path, {"a": (torch.bfloat16, loader, "a.weight")}).state_dict["a"]
    pipe.send(result.view(torch.int16).tolist())
