"""The platform is resolved when it is first asked for."""

_current = None


class Platform:
    supported_quantization = []  # noqa: RUF012

    @classmethod
    def verify_quantization(cls, quant):
        if cls.supported_quantization and quant not in cls.supported_quantization:
            raise ValueError(f"{quant} quantization is currently not supported in neuron.")

    @classmethod
    def check_and_update_config(cls, vllm_config):
        pass


def __getattr__(name):
    global _current
    if name != "current_platform":
        raise AttributeError(name)
    if _current is None:
        from vllm_neuron import register

        module, _, cls = register().rpartition(".")
        _current = getattr(__import__(module, fromlist=[cls]), cls)
    return _current
