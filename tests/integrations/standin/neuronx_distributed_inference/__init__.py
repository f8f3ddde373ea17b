"""A small stand-in for NxD Inference: the modules, names and signatures that the hook meets, and the ways in which
they call each other. Written for these tests, for where the real sources are not at hand."""
