"""Batches: windows of tokens, mixed, packed and dealt into what a model's loss takes."""
