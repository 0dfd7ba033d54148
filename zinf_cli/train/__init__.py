"""What a rank runs: setup, the loop, checkpoints, metrics."""
