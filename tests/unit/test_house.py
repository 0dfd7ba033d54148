"""The house: imports go one way, and what has to be light imports no torch."""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from programs import command

ROOT = Path(__file__).parents[2] / "zinf_cli"
TESTS = Path(__file__).parents[1]

FLOORS = (
    {
        "errors",
        "amounts",
        "checksum",
        "command_line",
        "custom_code",
        "durable",
        "file_names",
        "model_state",
        "screen",
        "search_path",
        "stand_ins",
        "told",
        "trace",
        "unfailing_stream",
        "version",
    },
    {"checkpoint"},
    {"recipe"},
    {"machine"},
    {"plan", "tiers"},
    {
        "engine",
        "engine.clips",
        "engine.precision",
        "engine.eight_bits",
        "engine.packed",
        "engine.split_masters",
        "engine.meeting",
        "run_folder",
    },
    {"engine.ranks"},
    {"engine.units"},
    {"engine.traffic"},
    {"engine.compute"},
    {"engine.options"},
    {"engine.engine", "launch", "tracking"},
    {"bench", "text"},
    {"models"},
    {"batches"},
    {"train", "screens", "report"},
    {"commands"},
    {"cli"},
)
"""A room imports from floors above its own in this list; of the first one, from its own as well.

The engine is three rooms, with what they share below them and engine.py on top.
"""

APART = {
    "text": {"launch", "engine", "plan", "recipe"},
    "models": {"launch", "plan"},
    "batches": {"launch", "plan"},
    "train": {"launch"},
    "bench": {"launch", "recipe", "plan"},
    "launch": {"engine", "tiers"},
    "run_folder": {"engine", "tiers"},
    "tiers": {"recipe", "checkpoint"},
    "engine": {"recipe", "checkpoint", "plan"},
    "report": {"launch", "engine", "tiers"},
    "tracking": {"launch", "engine", "tiers"},
}


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def modules() -> dict[str, set[str]]:
    """Each module and those it imports, anywhere in its file: also for types alone."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        names: set[str] = set()
        for node in nodes_of(path):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[module] = {name.removeprefix("zinf_cli.") for name in names if name.startswith("zinf_cli.")}
    return {module: imported & found.keys() for module, imported in found.items()}


def rooms() -> dict[str, set[str]]:
    """Room to the rooms it imports."""
    found: dict[str, set[str]] = {}
    for module, imported in modules().items():
        found.setdefault(room_of(module), set()).update(map(room_of, imported))
    return found


def room_of(module: str) -> str:
    return ".".join(module.split(".")[: 2 if module.startswith("engine.") else 1])


def test_no_module_imports_itself_by_way_of_others() -> None:
    TopologicalSorter(modules()).prepare()  # raises CycleError, which names the circle


def test_imports_go_one_way() -> None:
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    for room, imported in rooms().items():
        for other in imported - {room}:
            assert floor_of[other] < (floor_of[room] or 1), f"{room} imports {other}"
        apart = APART.get(room.split(".")[0], set())
        assert not {other.split(".")[0] for other in imported} & apart, f"{room} imports some of {apart}"


def test_the_launcher_imports_no_torch() -> None:
    modules = "zinf_cli.cli,zinf_cli.commands.launch,zinf_cli.commands.estimate,zinf_cli.plan.plan,zinf_cli.screens.run"
    modules += ",zinf_cli.report.page"
    done = subprocess.run(command("imported", modules), capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(done.stderr.splitlines()[-1].split())


def test_an_agent_leaves_the_device_alone_until_it_has_forked() -> None:
    done = subprocess.run(command("leaves_devices_alone"), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "forked"


def test_files_fit_in_a_sitting_and_functions_on_a_screen() -> None:
    for path in (*ROOT.rglob("*.py"), *TESTS.rglob("*.py")):
        assert len(path.read_text().splitlines()) < 400, path
    for path in ROOT.rglob("*.py"):
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno + 1 < 60, f"{path}: {node.name}"


def test_no_test_imports_another() -> None:
    """What tests share is in a conftest.py, or in a module of tests/ that holds no test."""
    paths = list(TESTS.rglob("test_*.py"))
    names = {path.stem for path in paths}
    for path in paths:
        for node in nodes_of(path):
            imported = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not names.intersection(name.split(".")[-1] for name in imported), path.name


def test_no_program_lives_in_a_string() -> None:
    """One line is no program. What a test starts is a file in tests/programs/, which is linted and typed."""
    for path in TESTS.rglob("*.py"):
        for node in nodes_of(path):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "_" for part in parts)
            if "import " in text and ("\n" in text.strip() or len(text) > 100):
                assert not parses(text), f"{path.name}: {text}"


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
