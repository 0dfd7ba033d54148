"""Infinity offload for unmodified modules: units, tape, slices, fetches, deferred update."""
