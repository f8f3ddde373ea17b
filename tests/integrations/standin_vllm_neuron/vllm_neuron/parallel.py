"""Which rank this is: the test says."""

rank, world_size = 0, 1
