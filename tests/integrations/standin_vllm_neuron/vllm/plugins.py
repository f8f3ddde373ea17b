from importlib.metadata import entry_points


def load_general_plugins():
    """In every process, as often as it comes up."""
    for plugin in entry_points(group="vllm.general_plugins"):
        if plugin.name == "neuron_fp8_loader":  # those of other packages are not the tests' business
            plugin.load()()
