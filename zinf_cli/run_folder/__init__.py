"""A run's folder: every name in it, with what writes and what reads it."""
