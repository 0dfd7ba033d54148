"""Names of files as files of others give them, an index or a manifest: what they name lies beside them.

A name that leads elsewhere (`../x`, `/etc/x`, `a/b`) would have zinf read, copy or write what nobody meant. A plain
name may be a link to wherever the one who owns the folder has put the file.
"""

from __future__ import annotations


def is_plain(name: object) -> bool:
    """Whether `name` is that of a file in the folder it is looked for in."""
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and name.isprintable()
