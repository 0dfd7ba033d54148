"""What a rank runs: model, data, the loop, metrics."""
