"""Every model type that zinf packs keeps documents apart."""

from __future__ import annotations

from contextlib import suppress

import pytest

from zinf_cli.batches.apart import why_not_apart
from zinf_cli.errors import ZinfError
from zinf_cli.models.model import ModelSource, build_model
from zoo.apart import SAME, difference, with_weights
from zoo.shrink import class_names, configs, model_types


@pytest.mark.parametrize("model_type", model_types())
@pytest.mark.filterwarnings("ignore")  # of models, about their configurations
def test_documents_are_kept_apart_where_zinf_says_so(model_type: str) -> None:
    tried = 0
    for name in class_names(model_type):
        for config in configs(model_type, name):
            source = ModelSource(None, config, "random", 0)
            with suppress(ZinfError):
                if why_not_apart(build_model(source)) is None:
                    try:
                        found = difference(with_weights(source))
                    except Exception:  # whatever a model does at sizes that it was not made for
                        continue
                    assert found < SAME, name
                    tried += 1
    if not tried:
        pytest.skip("zinf does not pack it")
