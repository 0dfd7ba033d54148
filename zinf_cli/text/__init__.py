"""Texts: files into tokens."""
