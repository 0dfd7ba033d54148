"""Which zinf this is."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path


def version_of(package: str) -> str | None:
    """The version of an installed package. None if it has no metadata: it is not there, or was put there by hand."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def code_digest() -> str:
    """The version and a digest of zinf's own files: hosts have to run the same."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return f"{version_of('zinf') or 'no version'} ({digest.hexdigest()[:8]})"
