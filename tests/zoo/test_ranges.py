"""Of every model type: random weights that are read in parts are those that are read whole."""

from __future__ import annotations

from contextlib import suppress

import pytest

from ranges import assert_parts_are_the_whole
from zinf_cli.errors import ZinfError
from zinf_cli.models import recorded
from zinf_cli.models.model import ModelSource, build_model
from zoo.shrink import configs, model_types


@pytest.mark.parametrize("model_type", model_types())
@pytest.mark.filterwarnings("ignore")  # of models, about their configurations
def test_parts_are_the_whole(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_PIECE", 512)
    for config in configs(model_type):
        with suppress(ZinfError):
            assert_parts_are_the_whole(build_model(ModelSource(None, config, "random", 0)))
            return
    pytest.skip("zinf refuses it")
