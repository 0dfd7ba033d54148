"""Bytes on their way: fetches, gathers, updates, checkpoints in passing."""
