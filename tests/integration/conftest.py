"""What tests of whole launches share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from workshop import Workshop


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    from workshop import Workshop  # not above: pytest's own process, which runs no test, would import torch

    return Workshop(tmp_path)
