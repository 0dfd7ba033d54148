"""Prints a checksum of the weights that are drawn for a tiny mamba."""

from __future__ import annotations

import hashlib

from tiny_models import random_source
from zinf_cli.models.model import build_model
from zinf_cli.models.weights import open_weights


def digest() -> str:
    source = random_source("mamba")
    model = build_model(source)
    values = open_weights(model, source).read([name for name, _ in model.named_parameters()])
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in values.values())).hexdigest()


if __name__ == "__main__":
    print(digest())
