"""Models: classes, weights, adapters, and what they are trained to do."""
