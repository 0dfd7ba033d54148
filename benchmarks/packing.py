"""`python -m benchmarks.packing`: how many tokens of a step are real, where chats are packed into windows.

The chats are those of recipes/smollm2-chats.yaml, with its tokenizer. The other tokens of a window are padding, which
is computed and not learned. Beside it: windows of one chat each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.results import add_save, report
from benchmarks.rows import Row
from zinf_cli.batches.packing import PackedStream
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.train.setup import open_model, open_text

RECIPE = Path(__file__).parents[1] / "recipes" / "smollm2-chats.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description="The real tokens of windows that chats are packed into.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="what recipes/fetch_smollm2.py has fetched")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[256, 512, 1024])
    add_save(parser)
    arguments = parser.parse_args()
    data = arguments.data.absolute()
    at = [f"model.name_or_path={data / 'smollm2-135m'}", f"dataset.path={data / 'chats'}"]
    recipes = [load_recipe(RECIPE, [*at, f"train.seq_len={seq_len}"]) for seq_len in arguments.seq_len]
    report("chats of recipes/smollm2-chats.yaml", [row_of(recipe) for recipe in recipes], arguments.save)


def row_of(recipe: Recipe) -> Row:
    """Over an epoch of windows."""
    seq_len = recipe.train.seq_len
    stream = open_text(recipe, open_model(recipe, "fp32"), 1).train
    assert isinstance(stream, PackedStream)
    windows = range(stream.num_windows(seq_len))
    real = [stream.num_real(window) for window in windows]
    return {
        "seq_len": seq_len,
        "chats": stream.num_documents,
        "windows": len(windows),
        "real_tokens": sum(real),
        "real_of_all": sum(real) / (len(windows) * seq_len),
        "real_of_the_least_full_window": min(real) / seq_len,
        "one_chat_a_window": len(stream) / (stream.num_documents * seq_len),
        "tokens_left_out": stream.left.behind,
    }


if __name__ == "__main__":
    main()
