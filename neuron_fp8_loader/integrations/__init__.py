"""Neuron's own loaders: NxD Inference, ModelBuilder, vLLM; and plain torch modules. None of them is imported here."""
