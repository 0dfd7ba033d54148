"""The command line as ps shows it to everybody on the machine: without the values of variables.

Imports nothing at first that takes time, since until `hide_values` is done they can be seen.
"""

from __future__ import annotations

import sys

_HIDDEN = "*"


def hide_values(option: str) -> None:
    """Where this process was started with `option NAME=VALUE`, have the kernel show NAME=* from now on (Linux).

    sys.argv stays. The kernel reads the words of a process from its own memory, so they are written over there.
    """
    if not any(word.startswith(option) for word in sys.argv):
        return
    import ctypes
    from contextlib import suppress
    from pathlib import Path

    with suppress(OSError):  # without /proc there is no ps
        shown = Path("/proc/self/cmdline").read_bytes()
        start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
        # should the memory not be what is shown, something else has changed it: then it is left alone
        if end - start == len(shown) and ctypes.string_at(start, len(shown)) == shown:
            words = without_values(shown.split(b"\0"), option.encode())
            ctypes.memmove(start, b"\0".join(words).ljust(len(shown), b"\0"), len(shown))


def without_values(words: list[bytes], option: bytes) -> list[bytes]:
    """Each `option NAME=VALUE` or `option=NAME=VALUE` with a star for its value."""
    found, is_next = [], False
    for word in words:
        joined = word.startswith(option + b"=")
        prefix, assignment = (option + b"=", word[len(option) + 1 :]) if joined else (b"", word)
        name, equals, value = assignment.partition(b"=")
        hides = (joined or is_next) and value
        found.append(prefix + name + equals + _HIDDEN.encode() if hides else word)
        is_next = word == option
    return found
