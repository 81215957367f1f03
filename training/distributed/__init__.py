"""Several processes: who started them, what they share, and how weights are sharded."""
