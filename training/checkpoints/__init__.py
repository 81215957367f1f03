"""The files in a run's output folder: checkpoints, metrics and the lock."""
