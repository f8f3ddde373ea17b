"""The machine that loads: fresh memory, threads, and tensors that share memory."""
