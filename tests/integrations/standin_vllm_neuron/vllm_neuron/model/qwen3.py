"""Dense and MoE in bfloat16 only: what the checkpoint's quantization_config says is not looked at."""

import torch
from torch import nn

from vllm_neuron.model.llama3 import model as llama
from vllm_neuron.utils.checkpoints import SafetensorsCheckpoint
from vllm_neuron.utils.weight_loader import set_weight_loader, stacked_loader

from .. import parallel


def _experts(config):
    return getattr(config, "num_experts", None) or getattr(config, "num_local_experts", 0)


class Experts(nn.Module):
    """[experts, rows, columns] of one matrix an expert, each sharded."""

    def __init__(self, config):
        super().__init__()
        tp, experts, hidden = parallel.world_size, _experts(config), config.hidden_size
        each = config.moe_intermediate_size // tp
        for name, shape, dim in (
            ("gate_proj", (each, hidden), 0),
            ("up_proj", (each, hidden), 0),
            ("down_proj", (hidden, each), 1),
        ):
            parameter = nn.Parameter(torch.empty(experts, *shape, dtype=llama.BF16), requires_grad=False)
            set_weight_loader(parameter, stacked_loader(dim, each))
            setattr(self, name, parameter)


class Qwen3ForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        moe = _experts(config)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for _ in range(config.num_hidden_layers):
            layer = nn.Module()
            layer.self_attn = llama.LlamaAttention(config)
            layer.mlp = Experts(config) if moe else llama.LlamaMLP(config)
            self.model.layers.append(layer)

    @classmethod
    def from_configs(cls, hf_config, neuron_config=None):
        if (neuron_config or {}).get("quantization") not in (None, "bf16"):
            raise ValueError("Only BF16 is implemented.")
        hf_config.padded = bool((neuron_config or {}).get("padded"))
        return cls(hf_config)

    def load_weights(self, checkpoint_path, device, cache_dir):
        mappings = {}
        for n in range(self.config.num_hidden_layers):
            at = f"model.layers.{n}"
            mappings[f"{at}.self_attn.qkv_proj_weight"] = [f"{at}.self_attn.{m}_proj.weight" for m in "qkv"]
            mappings[f"{at}.self_attn.o_proj_weight"] = f"{at}.self_attn.o_proj.weight"
            for m in ("gate", "up", "down"):
                mappings[f"{at}.mlp.{m}_proj_weight"] = f"{at}.mlp.{m}_proj.weight"
                mappings[f"{at}.mlp.{m}_proj"] = [
                    f"{at}.mlp.experts.{e}.{m}_proj.weight" for e in range(_experts(self.config))
                ]
        checkpoint = SafetensorsCheckpoint(checkpoint_path, cache_dir)
        self.result = checkpoint.load_sharded_pipelined(parallel.rank, parallel.world_size, self, mappings, device)
        self.load_state_dict(self.result.state_dict, strict=False, assign=True)
