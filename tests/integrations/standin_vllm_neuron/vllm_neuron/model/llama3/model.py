"""Dense layers: fused qkv, column-parallel gate and up, row-parallel o and down, all stored transposed."""

import torch
from torch import nn

from vllm_neuron import parallel
from vllm_neuron.utils.checkpoints import SafetensorsCheckpoint
from vllm_neuron.utils.weight_loader import (
    fused_qkv_weight_loader,
    get_weight_loader,
    set_weight_loader,
    sharding_weight_loader,
)

from .quantization import QuantizationSpec, resolve_attention_mlp_classes

BF16 = torch.bfloat16


def _weight(rows, columns, loader=None):
    parameter = nn.Parameter(torch.empty(rows, columns, dtype=BF16), requires_grad=False)
    if loader is not None:
        set_weight_loader(parameter, loader)
    return parameter


class LlamaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        tp, size, hidden = parallel.world_size, config.head_dim, config.hidden_size
        q = config.num_attention_heads // tp * size
        kv = max(1, config.num_key_value_heads // tp) * size
        replicas = max(1, tp // config.num_key_value_heads)
        qkv = fused_qkv_weight_loader(q, kv, 1, tp, is_storage_transposed=True, num_kv_replicas=replicas)
        self.qkv_proj_weight = _weight(hidden, q + 2 * kv, qkv)
        self.o_proj_weight = _weight(q, hidden, sharding_weight_loader(0, q, tp, is_storage_transposed=True))


class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        tp, hidden = parallel.world_size, config.hidden_size
        each = -(-config.intermediate_size // tp // 128) * 128 if config.padded else config.intermediate_size // tp
        for name in ("gate", "up"):
            loader = sharding_weight_loader(1, each, tp, is_storage_transposed=True, pad_shard=True)
            setattr(self, f"{name}_proj_weight", _weight(hidden, each, loader))
        loader = sharding_weight_loader(0, each, tp, is_storage_transposed=True, pad_shard=True)
        self.down_proj_weight = _weight(each, hidden, loader)


class Layer(nn.Module):
    def __init__(self, config, classes):
        super().__init__()
        self.self_attn, self.mlp = (cls(config) for cls in classes)
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(self, name, nn.Module())
            getattr(self, name).weight = nn.Parameter(torch.empty(config.hidden_size, dtype=BF16), requires_grad=False)


class LlamaForCausalLM(nn.Module):
    SCALES = (
        ("self_attn", "qkv_weight_scale", [f"self_attn.{m}_proj.weight_scale" for m in "qkv"]),
        ("self_attn", "qkv_input_scale", [f"self_attn.{m}_proj.input_scale" for m in "qkv"]),
        ("self_attn", "o_weight_scale", ["self_attn.o_proj.weight_scale"]),
        ("self_attn", "o_input_scale", ["self_attn.o_proj.input_scale"]),
        *(("mlp", f"{m}_weight_scale", [f"mlp.{m}_proj.weight_scale"]) for m in ("gate", "up", "down")),
        ("mlp", "gate_up_input_scale", ["mlp.gate_proj.input_scale"]),
        ("mlp", "down_input_scale", ["mlp.down_proj.input_scale"]),
    )

    def __init__(self, config):
        super().__init__()
        self.config = config
        classes = resolve_attention_mlp_classes(config.quant_spec, 0)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Module()
        self.model.embed_tokens.weight = _weight(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config, classes) for _ in range(config.num_hidden_layers))
        self.model.norm = nn.Module()
        self.model.norm.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=BF16), requires_grad=False)
        self.lm_head = nn.Module()
        self.lm_head.weight = _weight(config.vocab_size, config.hidden_size)

    @classmethod
    def from_configs(cls, hf_config, neuron_config=None):
        hf_config.quant_spec = QuantizationSpec.from_hf_quantization_config(
            getattr(hf_config, "quantization_config", None)
        )
        hf_config.padded = bool((neuron_config or {}).get("padded"))
        if getattr(hf_config, "head_dim", None) is None:
            hf_config.head_dim = hf_config.hidden_size // hf_config.num_attention_heads
        return cls(hf_config)

    def load_weights(self, checkpoint_path, device, cache_dir):
        mappings = {}
        for n in range(self.config.num_hidden_layers):
            at = f"model.layers.{n}"
            mappings[f"{at}.self_attn.qkv_proj_weight"] = [f"{at}.self_attn.{m}_proj.weight" for m in "qkv"]
            mappings[f"{at}.self_attn.o_proj_weight"] = f"{at}.self_attn.o_proj.weight"
            for m in ("gate", "up", "down"):
                mappings[f"{at}.mlp.{m}_proj_weight"] = f"{at}.mlp.{m}_proj.weight"
        if getattr(self.config, "tie_word_embeddings", False):
            mappings["lm_head.weight"] = "model.embed_tokens.weight"
        checkpoint = SafetensorsCheckpoint(checkpoint_path, cache_dir)
        self.result = checkpoint.load_sharded_pipelined(parallel.rank, parallel.world_size, self, mappings, device)
        if self.config.quant_spec is not None:
            self._load_static_fp8_scales(checkpoint, device)
        wanted = dict(self.named_parameters())
        state_dict = {
            name: t.to(BF16) if wanted[name].dtype == BF16 != t.dtype else t
            for name, t in self.result.state_dict.items()
        }
        self._load_kv_cache_scales(checkpoint, device)
        self.load_state_dict(state_dict, strict=False, assign=True)

    def _load_static_fp8_scales(self, checkpoint, device):
        for n, layer in enumerate(self.model.layers):
            for owner, name, suffixes in self.SCALES:
                keys = [f"model.layers.{n}.{suffix}" for suffix in suffixes]
                for key in keys:
                    if key not in checkpoint._tensor_name_to_file:
                        raise KeyError(f"Missing static-FP8 scale in checkpoint: {key!r}.")
                holder = getattr(layer, owner)
                loader = get_weight_loader(getattr(holder, name))
                tensor = loader.load([checkpoint._get_slice(key) for key in keys], parallel.rank)
                setattr(holder, name, tensor.to(device))

    def _load_kv_cache_scales(self, checkpoint, device):
        from vllm.config import get_current_vllm_config

        if get_current_vllm_config().cache_config.cache_dtype not in ("fp8", "fp8_e4m3"):
            return
        for n, layer in enumerate(self.model.layers):
            for name in ("k_scale", "v_scale"):
                key = f"model.layers.{n}.self_attn.{name}"
                if key in checkpoint._tensor_name_to_file:
                    value = 1.0 / checkpoint._get_slice(key)[:].to(dtype=BF16, device=device)
                else:
                    value = torch.ones(1, dtype=BF16)
                setattr(layer.self_attn, name, value.reshape(1, 1))
