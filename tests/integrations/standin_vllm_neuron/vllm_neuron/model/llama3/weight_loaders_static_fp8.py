"""The plugin has what rescales twice: here, and where the layers are."""

from libtorch_neuronx_lite.compile.platform import get_platform_target


def _needs_downscale():
    return get_platform_target() == "trn2"
