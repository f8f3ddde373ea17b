"""What the bytes mean: FP8 formats and their tables, scales, granularity, and the kernel that translates them."""
