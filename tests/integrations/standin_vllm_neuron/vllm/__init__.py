"""A stand-in of vLLM: plugins, configs, gates."""
