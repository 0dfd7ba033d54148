"""The nth call of every kind fails, n = 1, 2, 3, ... until a run passes: `make test-storage`."""

from __future__ import annotations

import pytest

from storage import Lab, all_kinds, every_fault


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize("scenario", ["export", "train", "resume"])
@pytest.mark.parametrize(("kind", "how"), all_kinds())
def test_whatever_fails_is_named_or_makes_no_difference(scenario: str, kind: str, how: str, lab: Lab) -> None:
    assert every_fault(lab, scenario, kind, how) > 0 or kind in ("link", "fallocate", "unlink")
