"""A sample of tests/zoo: what one of them does in particular, no other test has."""

from __future__ import annotations

import pytest

from tiny_models import skip_unless_known
from zoo.compare import verdict

SAMPLE = (
    "dbrx",  # parts of its configuration are configurations
    "dory",  # layers that a forward calls twice
    "gemma3n_text",  # layers share keys and values through an argument; weights are clamped in a forward
    "gpt_oss",  # sinks in attention
    "jamba",  # mamba, attention and experts
    "longcat_flash",  # two attentions a layer, experts that do nothing
    "mistral_large4",  # layers that take another's keys and values, and what it has indexed
    "mllama",  # a vision part that text never calls
    "qwen3_next",  # linear attention
    "recurrent_gemma",  # keeps tensors as attributes
    "reformer",  # makes its layers' graphs in a backward of its own
    "rwkv",  # keeps a state of its own
    "xlm",  # a cache in training
    "zamba",  # one block shared by many layers
)


@pytest.mark.sampled
@pytest.mark.parametrize("model_type", SAMPLE)
@pytest.mark.filterwarnings("ignore")
def test_agrees_with_plain_pytorch(model_type: str) -> None:
    skip_unless_known(model_type)
    found = verdict(model_type)
    assert found.kind == "agrees", found.why
