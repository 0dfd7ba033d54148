"""Finds what a model is trained to do, from its class: the labels, and which of them its own loss averages over.

    objective          input_ids      labels                          the loss at position t compares
    NEXT_TOKEN         the text       the text                        logits t with label t + 1
    NEXT_TOKEN_GIVEN   the text       the text, moved by one          logits t with label t
    MASKED_TOKENS      some masked    what was masked                 logits t with label t
    TARGET_OF_SOURCE   the source     the target                      logits t of the decoder with label t
    PREFERENCE         both answers   the answers                     logits t with label t + 1, of both answers
    LABEL_OF_TEXT      the text       [sequences]                     logits of the text with its label
    SIMILARITY         see compared.py  [rows]                        the embedding of a query with those of all texts

A micro-batch has the weight of its targets, so that a step is the same however it is dealt. They are counted here.
"""

from __future__ import annotations

import inspect
import re
from enum import Enum, auto
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto_classes
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED_LMS

from zinf_cli.errors import ModelError
from zinf_cli.models.headers import CLASSIFIER
from zinf_cli.text.token_stream import MASKED

GIVEN = {
    "BartForCausalLM",
    "BigBirdPegasusForCausalLM",
    "BlenderbotForCausalLM",
    "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM",
    "FlaubertWithLMHeadModel",
    "MBartForCausalLM",
    "MarianForCausalLM",
    "MvpForCausalLM",
    "PLBartForCausalLM",
    "PegasusForCausalLM",
    "ProphetNetForCausalLM",
    "TrOCRForCausalLM",
    "WhisperForCausalLM",
    "XLMWithLMHeadModel",
}
"""Causal models that compare logits with the label of the same position. A test finds them in transformers' sources."""

REFUSED = {
    "GitForCausalLM": "predicts what follows the tokens of an image, which text has not",
    "XLNetLMHeadModel": "predicts in permuted orders, which zinf does not draw: it would see what it is to predict",
    "MusicgenForCausalLM": "predicts sound, in several codebooks at once",
    "MusicgenMelodyForCausalLM": "predicts sound, in several codebooks at once",
}


_LANGUAGE_MODELS = {
    name
    for mapping in (
        auto_classes.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto_classes.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto_classes.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto_classes.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto_classes.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    for names in mapping.values()
    for name in (names if isinstance(names, tuple | list) else (names,))
}
_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")
"""Ends of the names of other language models."""
_HEADLESS = {
    name
    for names in auto_classes.MODEL_MAPPING_NAMES.values()
    for name in (names if isinstance(names, tuple | list) else (names,))
    if name.endswith("Model")
}


class Objective(Enum):
    """An objective: see the table above."""

    NEXT_TOKEN = auto()
    NEXT_TOKEN_GIVEN = auto()
    MASKED_TOKENS = auto()
    TARGET_OF_SOURCE = auto()
    PREFERENCE = auto()
    LABEL_OF_TEXT = auto()
    SIMILARITY = auto()

    @property
    def is_of_tokens(self) -> bool:
        """Whether the loss is that of telling tokens, so that it has a perplexity."""
        return self not in (Objective.PREFERENCE, Objective.LABEL_OF_TEXT, Objective.SIMILARITY)

    def num_targets(self, labels: torch.Tensor) -> int:
        """How many `labels` (int64 [sequences, length]) the loss averages over; of preferences, how many pairs.

        The labels of preferences are [pairs, 2, length], those of texts [sequences], those of queries [rows].
        """
        if not self.is_of_tokens:
            return labels.shape[0]
        compared = labels[:, 1:] if self is Objective.NEXT_TOKEN else labels
        return int((compared != MASKED).sum())


def is_headless(model_class: type[nn.Module]) -> bool:
    """Whether what a class of transformers gives are hidden states."""
    return model_class.__name__ in _HEADLESS


def check_trainable(model_class: type[PreTrainedModel], where: str) -> None:
    """ModelError if the loss of `model_class` is that of neither a language model nor a classifier of texts."""
    name = model_class.__name__
    if name in REFUSED:
        raise ModelError(f"{name} {REFUSED[name]}", where=where, hint="train a causal or a masked language model")
    if name not in _LANGUAGE_MODELS and not name.endswith((*_ENDINGS, CLASSIFIER)):
        raise ModelError(
            f"{name} is not a language model: it has no loss over tokens",
            where=where,
            hint="train the language model it is made of, whose class ends in ForCausalLM, ForConditionalGeneration or "
            f"ForMaskedLM, or a classifier, whose class ends in {CLASSIFIER}",
        )
    if missing := {"input_ids", "labels"} - inspect.signature(model_class.forward).parameters.keys():
        raise ModelError(f"{name} takes no {' and no '.join(sorted(missing))}: its loss is not its own", where=where)


_WANTS = (
    r"forward\(\) missing \d+ required|\b(specify|provide|pass|required|has to be not-None|(can't|cannot) be None)\b"
)
"""What an error says if an argument is missing: Python's own words, or those of a model's checks."""


def wants_more_than_text(model: nn.Module, error: Exception) -> ModelError | None:
    """The error to raise if `error`, from a model's forward, asks for a missing argument: pixel_values, bbox.

    None for any other error, even if it names arguments.
    """
    said = " ".join(str(error).split())
    if not re.search(_WANTS, said) or (isinstance(error, TypeError) and "forward() missing" not in said):
        return None
    words = set(re.findall(r"\w+", said.lower()))
    if words & {*inspect.signature(model.forward).parameters} - {"input_ids", "labels", "attention_mask", "use_cache"}:
        return ModelError(f"{type(model).__name__} can't be trained on text alone: {said}")
    return None


def sees_both_ways(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration attends to later tokens: its type has a masked language model."""
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)  # the latter is XLM's word
    return config.model_type in MASKED_LMS and not causal and not config.is_encoder_decoder


def objective_of(model: nn.Module) -> Objective:
    """The objective of a model, from its class and configuration. ModelError if its loss trains no language model."""
    name = type(model).__name__
    config: Any = model.config
    if name.endswith(CLASSIFIER):
        return Objective.LABEL_OF_TEXT
    if is_headless(type(model)):
        return Objective.SIMILARITY
    if config.is_encoder_decoder:
        return Objective.TARGET_OF_SOURCE
    if name in MASKED_LMS.values() and (sees_both_ways(config) or name not in GIVEN):
        return Objective.MASKED_TOKENS
    if (setting := _sees_ahead(config)) is not None:
        raise ModelError(
            f"{name} sees what it is to predict: its configuration has {setting[0]}",
            hint=f"set {setting[1]}, or train a masked language model",
        )
    return Objective.NEXT_TOKEN_GIVEN if name in GIVEN else Objective.NEXT_TOKEN


def _sees_ahead(config: PreTrainedConfig) -> tuple[str, str] | None:
    """If a causal model's attention is not causal: the setting that makes it so, and the setting that it needs."""
    if sees_both_ways(config) or (config.model_type == "bert-generation" and not config.is_decoder):
        return "is_decoder: false", "is_decoder: true"
    text = config.get_text_config()
    if getattr(text, "is_causal", True) is False:
        return "is_causal: false", "is_causal: true"
    if (both := getattr(text, "use_bidirectional_attention", None)) in (True, "all"):
        return f"use_bidirectional_attention: {both}", "it to false" if both is True else "it to null"
    return None
