"""Where zinf's processes find modules: where they are installed, never in the folder that somebody happens to be in.

A recipe may lie among any files; a socket.py beside it must not be run in place of Python's own. `python -m` searches
the working directory first, and so does PYTHONPATH where it has relative or empty entries.

As a script, `python .../search_path.py MODULE ...` runs a module as `python -m` does, without the working directory
(which `python -P` does from Python 3.11 on). It imports nothing before it has put the path right.
"""

from __future__ import annotations

import os
import sys


def module_command(module: str, *arguments: str) -> list[str]:
    """What runs a module of zinf, here or on a host that has zinf in the same place."""
    return [sys.executable, os.path.abspath(__file__), module, *arguments]  # noqa: PTH100


def leave_out_working_directory() -> None:
    """For this process and those it starts. What PYTHONPATH names by an absolute path is wanted, and stays."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    named = leave_out_relative(os.environ)  # for what other libraries start
    unwanted = {os.path.abspath(entry) for entry in ("", *entries)} - {_home(), *named}  # noqa: PTH100
    sys.path[:] = [path for path in sys.path if os.path.isabs(path) and path not in unwanted]  # noqa: PTH117


def leave_out_relative(environment: dict[str, str] | os._Environ[str]) -> list[str]:
    """Of an environment for Python: of PYTHONPATH the absolute entries, which are returned, are left."""
    environment["PYTHONSAFEPATH"] = "1"
    entries = environment.pop("PYTHONPATH", "").split(os.pathsep)
    named = [entry for entry in entries if os.path.isabs(entry)]  # noqa: PTH117
    if named:
        environment["PYTHONPATH"] = os.pathsep.join(named)
    return named


def _home() -> str:
    """The folder that zinf_cli itself was found in. Only asked where there is one: a supervisor has no files."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 (pathlib imports more)


def _run() -> None:
    """MODULE, with the arguments that follow. zinf is the one that this file is of, installed or not."""
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):  # noqa: PTH100, PTH120
        del sys.path[0]
    leave_out_working_directory()
    home = _home()
    sys.path.insert(0, home)
    import zinf_cli  # noqa: F401 (its modules are found by it from here on)

    sys.path.remove(home)
    import runpy

    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run()
