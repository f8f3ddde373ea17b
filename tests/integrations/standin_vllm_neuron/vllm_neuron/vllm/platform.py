from vllm.platforms import Platform


class NeuronPlatform(Platform):
    supported_quantization = ["neuron_quant", "compressed-tensors", "modelopt"]  # noqa: RUF012

    @classmethod
    def check_and_update_config(cls, vllm_config):
        cls._validate_quantization_config(vllm_config)

    @classmethod
    def _validate_quantization_config(cls, vllm_config):
        config = getattr(vllm_config.model_config.hf_config, "quantization_config", None)
        if not config or config.get("quant_method") != "compressed-tensors":
            return
        for name, group in config.get("config_groups", {}).items():
            if group.get("weights"):
                raise ValueError(
                    "Neuron only supports compressed-tensors for KV cache quantization (q_scale/k_scale/v_scale). "
                    f"Weight quantization in config_groups['{name}'] is not supported."
                )
