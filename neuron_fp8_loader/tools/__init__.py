"""What the command line does, for use from Python: look into a checkpoint, verify, compare and export it."""
