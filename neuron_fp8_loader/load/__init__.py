"""Drivers: they carry a recipe out, on files, on tensors in memory, on slices, or a few tensors at a time."""
