"""What tests of whole launches share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from workshop import Workshop


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    from workshop import Workshop  # not above: pytest's own process, which runs no test, would import torch

    workshop = Workshop(tmp_path)
    yield workshop
    workshop.end_all()
