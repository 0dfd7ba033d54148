"""The sizes of a batch, in the words of the field."""

from __future__ import annotations

from zinf_cli.errors import UsageError


def sequences_per_step(micro: int, accumulated: int | None, whole: int | None, ranks: int) -> int:
    """Sequences that all ranks together take in a step: `whole`, or `micro` × `accumulated` × `ranks`.

    `micro` is a recipe's micro_batch_size, `accumulated` its gradient_accumulation_steps (those of each rank), and
    `whole` its global_batch_size. UsageError if they disagree, or if there is not a sequence for each rank.
    """
    product = micro * (accumulated or 1) * ranks
    sequences = whole or product
    if accumulated is not None and sequences != product:
        raise UsageError(
            f"global_batch_size {sequences} is not micro_batch_size {micro} × "
            f"gradient_accumulation_steps {accumulated} × {ranks} ranks = {product}",
            hint="leave one of the two out",
        )
    if sequences < ranks:
        raise UsageError(
            f"{sequences} sequences per step can't be dealt to {ranks} ranks",
            hint="raise global_batch_size, or use fewer ranks",
        )
    return sequences
