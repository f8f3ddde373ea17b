from vllm.platforms import current_platform

from .base_config import QuantizationConfig

QUANTIZATION_METHODS = ["fp8", "fbgemm_fp8", "modelopt", "compressed-tensors", "quark", "torchao"]
_CUSTOMIZED_METHOD_TO_QUANT_CONFIG = {}


def register_quantization_config(quantization):
    def _wrapper(quant_config_cls):
        if quantization not in QUANTIZATION_METHODS:
            QUANTIZATION_METHODS.append(quantization)
            if (supported := current_platform.supported_quantization) is not None:
                supported.append(quantization)
        if not issubclass(quant_config_cls, QuantizationConfig):
            raise ValueError("The quantization config must be a subclass of `QuantizationConfig`.")
        _CUSTOMIZED_METHOD_TO_QUANT_CONFIG[quantization] = quant_config_cls
        return quant_config_cls

    return _wrapper


class _BuiltIn(QuantizationConfig):
    """Any of vLLM's own, as far as they matter here."""

    get_name = get_min_capability = from_config = classmethod(lambda cls, *a: cls())
    get_supported_act_dtypes = get_quant_method = lambda self, *a: []
    get_config_filenames = staticmethod(lambda: [])


def get_quantization_config(quantization):
    return _CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(quantization, _BuiltIn)
