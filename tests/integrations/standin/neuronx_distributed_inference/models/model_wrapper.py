def convert(module, q_config=None, inplace=False, mapping=None, include=None, modules_to_not_convert=None):
    """Swaps every layer for a quantized one, all by one configuration."""
    for name, layer in module.layers.items():
        module.layers[name] = mapping[type(layer)].from_float(mod=layer, q_config=q_config)
    return module


class DecoderModelInstance:
    def __init__(self, model_cls, config):
        self.model_cls, self.config, self.neuron_config = model_cls, config, config.neuron_config

    def load_module(self):
        self.module = self.model_cls(self.config)
