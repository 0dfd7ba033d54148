"""What unit tests share."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from in_process import Closed
    from zinf_cli.tiers.nvme import NvmeTier


settings.register_profile("on any machine", deadline=None)
settings.load_profile("on any machine")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves every third case of a test that is marked as sampled; all of them with ZINF_TEST_ALL (make test-zoo).

    Of each three in a row it is another one, so that each value of each parameter has its turn.
    """
    if "ZINF_TEST_ALL" in os.environ:
        return
    places: Counter[str] = Counter()
    tried = []
    for item in items:
        test = item.nodeid.partition("[")[0]
        group, place = divmod(places[test], 3)
        if item.get_closest_marker("sampled") is None or place == group % 3:
            tried.append(item)
        places[test] += 1
    items[:] = tried


FLOPS = 1e13
"""What a machine computes a second where `stated_speed` is used; drives hold up each step then."""


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a word of WORDS a token, saved as checkpoints have it."""
    from tiny_models import WORD_TEMPLATE, WORDS, save_word_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_word_tokenizer(folder, WORDS, eos_token="<end>", template=WORD_TEMPLATE)
    return folder


@pytest.fixture
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What zinf keeps in the user's folders, for one test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def stated_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan follows no measurement."""
    from zinf_cli.train import figures

    monkeypatch.setattr(figures, "_flops", lambda *_: FLOPS)


@pytest.fixture
def looked_at_here(stated_speed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, which has torch, looks at the model; another one would import it first."""
    from zinf_cli.launch import question
    from zinf_cli.train.question import Question

    def answered(asked: str, _: object) -> object:
        return question._figures(json.dumps(Question(asked, sys.stderr)._looked_at()), "", 0)

    monkeypatch.setattr(question, "_ask", answered)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[Closed]:
    """All tiers on drives that are closed, in this process."""
    from in_process import Closed
    from zinf_cli.tiers.nvme import NvmeTier

    tiers: list[Closed] = []
    close = NvmeTier.close

    def note_and_close(tier: NvmeTier) -> None:
        length = sum(os.fstat(file).st_size for file in tier._files)
        tiers.append(Closed(length, tier.write_bytes, tier.read_bytes))
        close(tier)

    monkeypatch.setattr(NvmeTier, "close", note_and_close)
    return tiers
