"""A stand-in of the vLLM Neuron plugin without NxD Inference."""


def register():
    return "vllm_neuron.vllm.platform.NeuronPlatform"
