"""Benchmarks of neuron_fp8_loader against its rivals, side by side in one run. ``python -m benchmarks`` runs them."""
