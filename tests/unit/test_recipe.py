"""Recipes as people write them: YAML, overrides, sizes, and every problem with its place."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from zinf_cli.amounts import format_bytes, format_count, parse_bytes, parse_count
from zinf_cli.errors import RecipeError
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.recipe.recipe_file import dump_recipe, filled_in, load_recipe

MINIMAL = """\
model:
  config: {model_type: llama, hidden_size: 64}
dataset:
  path: TEXT
"""
BOMB = "a: &a0 [x]\n" + "".join(f"b{n}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(12))
"""Aliases in aliases: 10^12 values."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a text")
    return path


def write(folder: Path, text: Path, content: str = MINIMAL) -> Path:
    path = folder / "my-run.yaml"
    path.write_text(content.replace("TEXT", str(text)))
    return path


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return [problem.replace(f"{path.parent}/", "") for problem in caught.value.problems]


def test_a_minimal_recipe_has_every_default(tmp_path: Path, text: Path) -> None:
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.model.init == "random"
    assert recipe.dataset.path == (text,)
    assert recipe.train.precision == "auto"
    assert recipe.offload.params == "auto"
    assert recipe.output_dir == Path.cwd() / "runs" / "my-run"
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_what_is_written_out_is_the_same_recipe(tmp_path: Path, text: Path) -> None:
    path = write(tmp_path, text)
    recipe = load_recipe(path, ["offload.cpu_memory=3GiB", "offload.nvme_path=[a, b]", "optimizer.betas=[0.8, 0.9]"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_recipe(recipe))
    assert load_recipe(resolved) == recipe
    assert yaml.safe_load(resolved.read_text())["offload"]["cpu_memory"] == "3GiB"


@pytest.mark.parametrize(("written", "value"), [("auto", "auto"), ("on", True), ("off", False)])
def test_checksums_are_on_or_off(written: str, value: str | bool, tmp_path: Path, text: Path) -> None:
    path = write(tmp_path, text)
    assert load_recipe(path, [f"offload.verify={written}"]).offload.verify == value
    assert problems_of(path, "offload.verify=twice")


def test_overrides_win_and_are_no_defaults(tmp_path: Path, text: Path) -> None:
    path = write(tmp_path, text)
    overrides = ["train.max_steps=20", "optimizer.lr=5e-5", "offload.nvme_path=~/nvme", "seed=7"]
    recipe = load_recipe(path, overrides)
    assert (recipe.train.max_steps, recipe.optimizer.lr, recipe.seed) == (20, 5e-5, 7)
    assert recipe.offload.nvme_path == (Path.home() / "nvme",)
    filled = filled_in(path, overrides)
    assert "train.micro_batch_size=1" in filled
    assert not {line.split("=")[0] for line in filled} & {line.split("=")[0] for line in overrides}


def test_every_problem_comes_with_its_line(tmp_path: Path, text: Path) -> None:
    content = MINIMAL + (
        "train:\n  seq_len: long\n  max_step: 3\n  max_steps: 3\n  epochs: 2\n"
        "offload:\n  params: disk\n  nvme_space: 3 apples\nseed: -1\nofload: {}\n"
    )
    problems = problems_of(write(tmp_path, text, content), "optimizer.beta=3", "seed")
    for problem in (
        "my-run.yaml:6: train.seq_len: expected a whole number, got 'long'",
        "my-run.yaml:7: train.max_step: unknown key, did you mean max_steps?",
        "my-run.yaml:11: offload.params: expected 'auto', 'device', 'cpu' or 'nvme', got 'disk'",
        "my-run.yaml:12: offload.nvme_space: expected a size such as 48GiB or 500MB, got '3 apples'",
        "my-run.yaml:13: seed: expected at least 0, got -1",
        "my-run.yaml:14: ofload: unknown key, did you mean offload?",
        "command line: optimizer.beta=3: optimizer.beta: unknown key, did you mean betas?",
        "command line: seed: expected KEY=VALUE, such as train.max_steps=20",
    ):
        assert problem in problems
    assert len(problems) == 8


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: [", "not valid YAML"),
        ("- 1\n- 2\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        (MINIMAL + "seed: 1\nseed: 2\n", "my-run.yaml:6: seed stands twice (first at"),
        (MINIMAL.replace("config:", "name_or_path: nowhere\n  config:"), "no such directory: "),
        ("dataset: {path: TEXT}", "model is missing"),
        ("model: 3\ndataset: {path: TEXT}", "model: expected a section with keys, got 3"),
        (MINIMAL.replace("model_type: llama, ", ""), "config needs a model_type"),
        (MINIMAL.replace("TEXT", "[]"), "dataset.path"),
        (MINIMAL + "optimizer: {lr: yes}\n", "optimizer.lr: expected a number, got True"),
        (MINIMAL + "train: {max_steps: 3, epochs: 1}\n", "give either max_steps or epochs"),
        (MINIMAL + "offload: {nvme_path: 3}\n", "offload.nvme_path: expected a list, got 3"),
        (MINIMAL + "output_dir: !env OUT\n", "my-run.yaml:5: output_dir: tags such as !env are not read"),
        (MINIMAL + "seed: !!python/name:os.system ''\n", "my-run.yaml:5: seed: tags such as !!python/name:os.system"),
        (MINIMAL + "seed: !!int word\n", "my-run.yaml:5: seed: 'word' is no int"),
        (MINIMAL + "seed: !!timestamp 2024-02-30\n", "my-run.yaml:5: seed: tags such as !!timestamp are not read"),
        (MINIMAL + "seed: 2024-02-30\n", "my-run.yaml:5: seed: expected a whole number, got '2024-02-30'"),
        (MINIMAL + "train: &a\n  b: *a\n", "my-run.yaml:5: train.b: contains itself"),
        (MINIMAL + "train: &a [*a]\n", "my-run.yaml:5: train: contains itself"),
        (MINIMAL + "train: &a {<<: *a}\n", "my-run.yaml:5: train.<<: expected an alias to another section"),
        (MINIMAL + "train: {<<: 3}\n", "my-run.yaml:5: train.<<: expected an alias to another section"),
        (MINIMAL + "? [a, b]\n: 1\n", "my-run.yaml:5: a key is a word, and a list or a mapping is none"),
        (MINIMAL + "on: 1\n", "my-run.yaml:5: a key is a word, and 'on' is none"),
        (MINIMAL + "train: {3: 4}\n", "my-run.yaml:5: train: a key is a word, and '3' is none"),
        (MINIMAL + "---\nseed: 1\n", "my-run.yaml:5: not valid YAML: a second document"),
        (MINIMAL + "train:\n\tseq_len: 3\n", "my-run.yaml:6: not valid YAML: a tab"),
        (MINIMAL + "seed: 9223372036854775808\n", "my-run.yaml:5: seed: 9223372036854775808 is too large"),
        (MINIMAL + f"seed: {'9' * 5000}\n", "is no int"),
        (MINIMAL + f"offload: {{cpu_memory: {'9' * 400}.5GiB}}\n", "offload.cpu_memory: expected a size"),
        (MINIMAL + "optimizer: {lr: .inf}\n", "optimizer.lr: expected a finite number, got inf"),
        (MINIMAL + "optimizer: {lr: nan}\n", "optimizer.lr: expected a finite number, got 'nan'"),
        (MINIMAL + "a: *nothing\n", "my-run.yaml:5: not valid YAML: found undefined alias"),
        (MINIMAL + "a\0: 1\n", "my-run.yaml:5: not valid YAML: a character that is not text, #x0000"),
        ("[" * 3000, "my-run.yaml:1: not valid YAML: brackets in brackets"),
        (MINIMAL + "a: " + "[" * 80 + "]" * 80, "my-run.yaml:5: a: more than a recipe has"),
        (BOMB, "more than a recipe has"),
        (MINIMAL.replace("TEXT", "''"), "dataset.path: '' is no path"),
        (MINIMAL.replace("TEXT", "x" * 5000), "File name too long"),
        (MINIMAL + 'output_dir: "a\\0b"\n', "output_dir: 'a\\x00b' is no path"),
        (MINIMAL + "output_dir: ~nobody-of-this-name/x\n", "output_dir: ~nobody-of-this-name/x: "),
        (MINIMAL + "output_dir: $NOT_SET/x\n", "my-run.yaml:5: output_dir: $NOT_SET is not set in the environment"),
        (MINIMAL + "offload: {nvme_path: [/a, '${NOT_SET}/x']}\n", "offload.nvme_path: ${NOT_SET} is not set"),
        (MINIMAL + "output_dir: '${NOT:-x}'\n", "output_dir: ${NOT:-x} is not set"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: Path, content: str, said: str) -> None:
    assert any(said in problem for problem in problems_of(write(tmp_path, text, content)))


def test_variables_in_paths_are_expanded(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVE", str(tmp_path / "drive"))
    monkeypatch.setenv("TEXTS", str(text.parent))
    path = write(tmp_path, Path("${TEXTS}") / text.name)
    recipe = load_recipe(path, ["offload.nvme_path=[$DRIVE/zinf, ~/$$money]", "checkpoint.resume=${TEXTS}"])
    assert recipe.dataset.path == (text,)
    assert recipe.offload.nvme_path == (tmp_path / "drive" / "zinf", Path.home() / "$money")
    assert recipe.checkpoint.resume == text.parent
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_recipe(recipe))
    assert load_recipe(resolved) == recipe
    odd = path.rename(tmp_path / "$DRIVE.yaml")  # the run's folder is named by the recipe's file
    assert load_recipe(odd).output_dir == Path.cwd() / "runs" / "$DRIVE"
    odd.rename(path)
    monkeypatch.setenv("DRIVE", "")
    assert "DRIVE is not set" in problems_of(path, "output_dir=$DRIVE/run")[0]


def test_a_date_is_a_folder_like_others(tmp_path: Path, text: Path) -> None:
    for date in ("2024-05-01", "2024-02-30"):
        path = write(tmp_path, text, MINIMAL + f"output_dir: {date}\n")
        assert load_recipe(path).output_dir == Path.cwd() / date
        assert load_recipe(path, [f"output_dir=other/{date}"]).output_dir == Path.cwd() / "other" / date
        recipe = load_recipe(path, [f"output_dir={date}"])
        path.write_text(dump_recipe(recipe))
        assert load_recipe(path) == recipe


def test_sections_may_be_merged(tmp_path: Path, text: Path) -> None:
    content = (
        MINIMAL.replace("config: {", "config: &base {") + "train: {<<: {seq_len: 16, max_steps: 3}, seq_len: 32}\n"
    )
    train = load_recipe(write(tmp_path, text, content)).train
    assert (train.seq_len, train.max_steps) == (32, 3)


def test_a_models_own_configuration_may_have_what_a_recipe_has_not(tmp_path: Path, text: Path) -> None:
    content = MINIMAL.replace("hidden_size: 64", f"model_max_length: {10**30}, id2label: {{0: a}}")
    config = load_recipe(write(tmp_path, text, content)).model.config
    assert config == {"model_type": "llama", "model_max_length": 10**30, "id2label": {0: "a"}}


def test_a_mark_at_the_start_is_no_text(tmp_path: Path, text: Path) -> None:
    path = write(tmp_path, text)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_recipe(path).dataset.path == (text,)
    path.write_bytes(b"model:\n  \xff")
    assert problems_of(path) == ["my-run.yaml:2: not UTF-8 text"]


@pytest.mark.parametrize(("in_file", "given"), [("epochs: 2", "max_steps=20"), ("max_steps: 3", "epochs=2.0")])
def test_steps_on_the_command_line_take_the_place_of_epochs_in_the_file(
    tmp_path: Path, text: Path, in_file: str, given: str
) -> None:
    path = write(tmp_path, text, MINIMAL + f"train: {{{in_file}}}\n")
    train = load_recipe(path, [f"train.{given}"]).train
    assert {f"max_steps={train.max_steps}", f"epochs={train.epochs}"} >= {given}
    assert None in (train.max_steps, train.epochs)
    with pytest.raises(RecipeError, match="either max_steps or epochs"):
        load_recipe(path, ["train.max_steps=3", "train.epochs=2.0"])


@pytest.mark.parametrize(
    "override", ["seed=!env X", "seed=&a [*a]", "seed={[a]: 1}", "seed=*a", "seed=1\n---\n2", "=", "seed=\t"]
)
def test_an_override_that_is_no_value_is_named(tmp_path: Path, text: Path, override: str) -> None:
    assert problems_of(write(tmp_path, text), override)[0].startswith(f"command line: {override}: ")


PIECES = [
    "model", "config", "train", "dataset", "path", "offload", "nvme_path", "seq_len", "optimizer", "betas", "resume",
    "checkpoint", "output_dir", "seed", "cpu_memory", ":", ": ", "\n", "\n  ", "- ", "? ", "[", "]", "{", "}", ", ",
    "&a ", "*a", "<<: *a", "!!int ", "!x ", "!!binary ", "'", '"', "|\n", ">\n", "---\n", "...\n", "#", "%YAML 1.1\n",
    "1", "0x_", "1:30", "-.inf", ".nan", "null", "yes", "2024-02-30", "9" * 30, "9" * 5000, "1e999", "$X", "${", "~",
    "~x", "/", "\t", "\0", "\ufeff", "\ud800", "é", "\u2028", "\x85", "@", "`", "=", "48GiB", "[" * 40,
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.booleans())
def test_whatever_a_recipe_is_there_is_an_answer(
    tmp_path_factory: pytest.TempPathFactory, content: str, whole: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "r.yaml"
    begin = MINIMAL.replace("TEXT", str(path)) if whole else ""
    path.write_bytes((begin + content).encode(errors="surrogatepass"))
    override = content.replace("\0", "")
    for overrides in ((), (override,), (f"train.seq_len={override}", f"output_dir={override}", "model.config={a: 1}")):
        with contextlib.suppress(RecipeError):
            recipe = load_recipe(path, overrides)
            path.write_text(dump_recipe(recipe), encoding="utf-8")
            assert load_recipe(path) == recipe
            filled_in(path, ())


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(content: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_text(content, encoding="utf-8", errors="ignore")
        with pytest.raises(RecipeError):
            load_recipe(path)


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = path.read_text()
    monkeypatch.chdir(tmp_path)
    for name in ("smollm2-135m", "bert", "t5", "llava", "minilm"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "config.json").write_text("{}")
    (tmp_path / "data/kjv").mkdir()
    for name in ("train.txt", "held_out.txt"):
        (tmp_path / "data/kjv" / name).write_text("text")
    (tmp_path / "data/chats").mkdir()
    for name in ("coding", "tech_support", "trivia"):
        (tmp_path / f"data/chats/{name}.jsonl").write_text("{}")
    (tmp_path / "data/text").mkdir()
    (tmp_path / "data/pictured").mkdir()
    for name in ("preferences", "reviews", "pairs", "queries", "pictured/chats"):
        (tmp_path / f"data/{name}.jsonl").write_text("{}")
    copy = tmp_path / path.name
    copy.write_text(content)
    assert isinstance(load_recipe(copy), Recipe)


@pytest.mark.parametrize(
    ("written", "num_bytes"),
    [("48GiB", 48 << 30), ("1.5 GB", 1_500_000_000), ("500MB", 500_000_000), ("4096", 4096), ("2kib", 2048), (7, 7)],
)
def test_sizes(written: str | int, num_bytes: int) -> None:
    assert parse_bytes(written) == num_bytes


@pytest.mark.parametrize(("written", "count"), [("135M", 135_000_000), ("7B", 7 * 10**9), ("1.01T", 1_010_000_000_000)])
def test_counts(written: str, count: int) -> None:
    assert parse_count(written) == count
    assert parse_count(format_count(count)) == count


@given(st.integers(0, 2**60))
def test_sizes_survive_being_shown(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.006)


@pytest.mark.parametrize("written", ["", "GiB", "3 apples", "-1GB", "1e9", "1,5GB"])
def test_what_is_no_size(written: str) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_bytes(written)
