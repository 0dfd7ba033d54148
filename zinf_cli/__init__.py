"""zinf: train models that do not fit, from one recipe."""

__version__ = "0.1.0"
