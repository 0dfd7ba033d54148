"""What is trained on: which labels a model's own loss averages over, masked tokens, pairs, and what has no target."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tiny_classes import OTHERS, PAIR, SIZE, real
from tiny_models import CONFIGS, dialog_template, save_word_tokenizer, skip_unless_known
from zinf_cli.batches.batches import deal
from zinf_cli.batches.collator import Batch, Collator, Sample
from zinf_cli.batches.pairs import PairStream
from zinf_cli.engine.compute.survey import survey
from zinf_cli.errors import DatasetError, ModelError, ZinfError
from zinf_cli.models.model import ModelSource, build_model
from zinf_cli.models.objective import (
    GIVEN,
    REFUSED,
    Objective,
    check_trainable,
    objective_of,
    wants_more_than_text,
)
from zinf_cli.recipe.recipe import Recipe
from zinf_cli.text.masking import Masking
from zinf_cli.text.token_stream import MASKED, TokenStream
from zinf_cli.train.setup import Text, model_loss, open_text
from zoo.shrink import configs


def loss_of(model: Any, batch: Batch) -> float:
    with torch.no_grad():
        return float(model_loss(model, batch.input_ids, batch.labels, batch.attention_mask))


def stream(num_tokens: int, mask: np.ndarray[Any, Any] | None = None) -> TokenStream:
    tokens = np.random.default_rng(0).integers(3, 90, num_tokens).astype(np.int32)
    return TokenStream(tokens, mask, int(tokens.max()), "")


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_a_batch_weighs_as_much_as_the_targets_of_its_rows(name: str) -> None:
    torch.manual_seed(0)
    model = real(name)
    objective, length = objective_of(model), 12
    mask = np.ones(3 * length, dtype=np.bool_)
    mask[:4], mask[5:length], mask[length : length + 2] = False, False, False  # the first row has one target
    text: Any = stream(3 * length, mask)
    if objective is Objective.TARGET_OF_SOURCE:
        text = PairStream(text, 0, (1, 1))
    masking = Masking(95, np.arange(3), 96, seed=1) if objective is Objective.MASKED_TOKENS else None
    collator = Collator(objective, length, masking)
    samples = [Sample(window, window) for window in range(2)]
    whole = collator.collate(text, samples, 0)
    parts = [collator.collate(text, [sample], 0) for sample in samples]
    assert whole.num_targets == sum(part.num_targets for part in parts)
    shared = [loss_of(model, part) * part.num_targets for part in parts if part.num_targets]
    assert loss_of(model, whole) == pytest.approx(sum(shared) / whole.num_targets, rel=1e-5)
    if objective in (Objective.NEXT_TOKEN, Objective.NEXT_TOKEN_GIVEN):
        assert [part.num_targets for part in parts] == [1, length - 2]


def test_causal_models_whose_loss_does_not_shift_are_known() -> None:
    folder = Path(transformers.__file__).parent / "models"
    found = set()
    sources = {path: path.read_text() for path in folder.glob("*/modeling_*.py")}
    for name in {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), "FlaubertWithLMHeadModel"}:
        source = next((text for text in sources.values() if f"\nclass {name}(" in text), "")
        body = re.split(r"\n(?:class|@|def) ", source.partition(f"\nclass {name}(")[2])[0]
        if "labels" in body and "self.loss_function(" not in body and not re.search(r"labels\[\.\.\., 1:\]", body):
            found.add(name)
    assert found - REFUSED.keys() == GIVEN


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_what_comes_later_is_seen_by_masked_models_only(name: str) -> None:
    torch.manual_seed(0)
    model = real(name)
    ids = torch.arange(8)[None] + 3
    changed = torch.where(torch.arange(8) == 7, ids + 40, ids)
    objective = objective_of(model)
    if objective is not Objective.TARGET_OF_SOURCE:
        with torch.no_grad():
            first, second = (model(input_ids=given, use_cache=False).logits[:, :7] for given in (ids, changed))
        assert torch.allclose(first, second, atol=1e-6) == (objective is not Objective.MASKED_TOKENS)


def test_causal_models_see_no_label_that_they_are_to_predict() -> None:
    model = real("BartForCausalLM")
    batch = Collator(objective_of(model), 8).collate(stream(8), [Sample(0, 0)], 0)
    assert batch.labels[0, :-1].tolist() == batch.input_ids[0, 1:].tolist()
    assert batch.labels[0, -1] == MASKED


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("bert", {"architectures": ["BertLMHeadModel"]}, "BertLMHeadModel sees what it is to predict"),
        ("bert-generation", SIZE, "BertGenerationDecoder sees what it is to predict.*is_decoder: true"),
        ("llama", {"is_causal": False}, "LlamaForCausalLM sees what it is to predict.*is_causal: true"),
        ("gemma3_text", {"use_bidirectional_attention": True, **SIZE}, "Gemma3ForCausalLM sees what.*to false"),
        ("xlnet", {"d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}, "XLNetLMHeadModel"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification is not a lang"),
        ("llama", {"architectures": ["LlamaForQuestionAnswering"]}, "LlamaForQuestionAnswering is not a language"),
        ("electra", {"architectures": ["ElectraForPreTraining"]}, "ElectraForPreTraining is not a language model"),
    ],
)
def test_what_has_no_loss_of_a_language_model_is_refused(model_type: str, changes: dict[str, Any], said: str) -> None:
    size = SIZE if model_type in ("bert", "electra", "llama") else {}
    with pytest.raises(ModelError, match=said) as caught:
        objective_of(build_model(ModelSource(None, {"model_type": model_type, **size, **changes}, "random", 0)))
    assert caught.value.exit_code == 2


def test_models_without_labels_are_refused() -> None:
    with pytest.raises(ModelError, match="takes no labels"):
        check_trainable(transformers.Gemma4AssistantForCausalLM, "here")


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("gemma4_assistant", "Gemma4AssistantForCausalLM takes no labels"),  # its own default is no valid configuration
        ("git", "GitForCausalLM predicts what follows the tokens of an image"),
        ("musicgen", "MusicgenForCausalLM predicts sound"),
    ],
)
def test_the_reason_is_the_objective_and_not_the_configuration(model_type: str, said: str) -> None:
    for changes in ({}, {"text_encoder": 1}):  # transformers 5.17 takes no configuration of musicgen without one
        with pytest.raises(ModelError, match=said):
            build_model(ModelSource(None, {**next(configs(model_type)), **changes}, "random", 0))


@pytest.mark.parametrize(
    ("model_type", "said"),
    [("blip", "pixel_values"), ("kosmos-2", "image_embeds"), ("molmo2", "mm_token_type_ids"), ("udop", "Bbox")],
)
def test_what_wants_more_than_text_is_refused_by_the_survey(model_type: str, said: str) -> None:
    skip_unless_known(model_type)
    model = build_model(ModelSource(None, next(configs(model_type)), "random", 0))
    ids = torch.zeros((2, 12), dtype=torch.long, device="meta")
    with pytest.raises(ModelError, match=f"^{type(model).__name__} can't be trained on text alone: .*{said}"):
        survey(model, lambda: model_loss(model, ids, ids), 1)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("input_ids and labels differ in batch_size"),
        ValueError("position_ids of shape (2, 12) do not go with a table of 8"),
        ValueError("`labels` is required"),
        TypeError("unsupported operand type(s) for +: 'NoneType' and 'int', in past_key_values"),
        TypeError("rotated() missing 1 required positional argument: 'position_ids'"),
        TypeError("rotated() got an unexpected keyword argument 'inputs_embeds'"),
    ],
    ids=str,
)
def test_another_error_of_a_model_is_its_own(error: Exception) -> None:
    assert wants_more_than_text(real("llama"), error) is None


def test_a_type_alone_gives_a_model_that_learns_from_text() -> None:
    def class_of(model_type: str, **config: Any) -> str:
        return type(build_model(ModelSource(None, {"model_type": model_type, **config}, "random", 0))).__name__

    assert class_of("bert", **SIZE) == "BertForMaskedLM"
    assert class_of("bert", **SIZE, is_decoder=True) == "BertLMHeadModel"
    assert class_of("bart", **PAIR) == "BartForConditionalGeneration"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own cache is left alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


WORDS = ["<pad>", "</s>", "[MASK]", "[UNK]", *(f"w{number}" for number in range(60)), "<user>", "<bot>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word a token, an end after each text, and a chat template."""
    special = {"eos_token": "</s>", "pad_token": "<pad>", "mask_token": "[MASK]"}
    folder = tmp_path_factory.mktemp("tokenizer")
    save_word_tokenizer(folder, WORDS, template=dialog_template("</s>"), end="</s>", **special)
    return folder


def test_masking_is_that_of_transformers(tokenizer: Path) -> None:
    """The same shares, by their own collator; never a special token; the same for a sequence wherever it is dealt."""
    fast = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, len(WORDS), (2000, 64)))
    masking = Masking(fast.mask_token_id, np.array(fast.all_special_ids), len(WORDS), seed=3)

    def shares(input_ids: torch.Tensor, labels: torch.Tensor) -> list[float]:
        chosen = labels != MASKED
        assert not torch.isin(ids[chosen], torch.tensor(fast.all_special_ids)).any()
        assert torch.equal(input_ids[~chosen], ids[~chosen])
        assert torch.equal(labels[chosen], ids[chosen])
        candidates = ~torch.isin(ids, torch.tensor(fast.all_special_ids))
        hidden = input_ids[chosen] == fast.mask_token_id
        kept = input_ids[chosen] == ids[chosen]
        return [float(chosen.sum() / candidates.sum()), float(hidden.float().mean()), float(kept.float().mean())]

    ours = [torch.stack(part) for part in zip(*(masking.apply(row, row, n) for n, row in enumerate(ids)), strict=True)]
    torch.manual_seed(3)  # it draws from the global generator
    theirs = DataCollatorForLanguageModeling(fast).torch_mask_tokens(ids.clone())
    assert shares(*ours) == pytest.approx(shares(*theirs), abs=0.02)
    assert shares(*ours) == pytest.approx([0.15, 0.8, 0.1], abs=0.02)

    collator = Collator(Objective.MASKED_TOKENS, 16, masking)
    text, samples = stream(160), [Sample(window, 40 + window) for window in range(10)]
    whole = collator.collate(text, samples, 0)
    for world_size, size in ((1, 3), (2, 2), (3, 1)):
        dealt = [share for rank in range(world_size) for share in deal(samples, rank, world_size, size) if share]
        again = torch.cat([collator.collate(text, share, 0).input_ids for share in dealt])
        assert torch.equal(again, whole.input_ids)
    assert not torch.equal(collator.collate(text, [Sample(0, 0)], 0).input_ids, whole.input_ids[:1]), "another epoch"


def opened(model: dict[str, Any], dataset: dict[str, Any], **train: Any) -> Text:
    recipe = Recipe.model_validate({"model": {"config": model}, "dataset": dataset, "train": {"seq_len": 8, **train}})
    return open_text(recipe, build_model(ModelSource(None, model, "random", 0)), 1)


BART = {"model_type": "bart", **PAIR, "architectures": ["BartForConditionalGeneration"]}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_encoder_decoders_learn_the_target_of_a_source(suffix: str, tokenizer: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [("w1 w2", "w3"), ("w4", "w5 w6 w7"), (" ".join(f"w{n}" for n in range(12)), "w9"), ("w8", "w8")]
    records = [{"article": source, "summary": target} for source, target in rows]
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    dataset = {"path": str(path), "source_field": "article", "target_field": "summary", "tokenizer": str(tokenizer)}
    text = opened(BART, {**dataset, "eval_fraction": 0.25})
    assert isinstance(text.train, PairStream)
    assert (text.train.num_windows(8), text.held_out[""].num_windows(8)) == (3, 1)
    assert [*text.train.lines(8)] == ["1 pairs are longer than train.seq_len=8 and are cut there"]
    batch = text.collator.collate(text.train, [Sample(n, n) for n in range(3)], 0)
    assert batch.attention_mask is not None

    def said(ids: torch.Tensor) -> str:
        return " ".join(WORDS[token] for token in ids if token >= 0)

    assert [said(row[seen.bool()]) for row, seen in zip(batch.input_ids, batch.attention_mask, strict=True)] == [
        "w1 w2 </s>",
        "w4 </s>",
        "w0 w1 w2 w3 w4 w5 w6 </s>",
    ]
    assert list(map(said, batch.labels)) == ["w3 </s>", "w5 w6 w7 </s>", "w9 </s>"]
    assert batch.num_targets == 8
    empty = text.collator.collate(text.train, (), 0)
    assert empty.num_targets == 0
    assert np.isfinite(loss_of(real("BartForConditionalGeneration"), empty))


@pytest.mark.parametrize(
    ("name", "content", "changes", "said"),
    [
        ("a.txt", "w1 w2", {}, "BartForConditionalGeneration is an encoder-decoder"),
        ("a.jsonl", json.dumps({"messages": []}), {"messages_field": "messages"}, "encoder-decoder"),
        ("a.jsonl", json.dumps({"text": "w1"}), {}, "no field 'source', there is: text"),
        ("a.jsonl", json.dumps({"source": "w1"}), {}, "a.jsonl:1: expected a source and a target"),
        ("a.jsonl", json.dumps({"source": "w1", "target": ""}), {}, "a.jsonl:1: expected a source and a target"),
    ],
)
def test_what_is_no_pair_is_refused(
    name: str, content: str, changes: dict[str, Any], said: str, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError) as caught:
        opened(BART, {"path": str(tmp_path / name), "tokenizer": str(tokenizer), **changes})
    assert said in caught.value.line()
    assert "dataset.source_field" in caught.value.line()


def test_masked_models_need_a_token_that_masks(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(64))
    with pytest.raises(DatasetError, match=r"nothing says which token masks.*dataset\.tokenizer"):
        opened({"model_type": "bert", **SIZE}, {"path": str(tmp_path / "a.npy")})


@pytest.mark.parametrize(
    ("role", "content", "said"),
    [
        ("model", "w1 w2", r"has the role 'assistant'.* roles there: user \(2\), model \(2\)"),
        ("Assistant", "w1 w2", r"roles there: user \(2\), Assistant \(2\)"),
        ("assistant", "w1 w2 w3 w4 w5 w6", None),
    ],
)
def test_chats_without_an_answer_are_refused(
    role: str, content: str, said: str | None, tokenizer: Path, tmp_path: Path
) -> None:
    chat = {"messages": [{"role": "user", "content": "w9"}, {"role": role, "content": content}]}
    path = tmp_path / "chat.jsonl"
    path.write_text((json.dumps(chat) + "\n") * 2)
    model = {"model_type": "llama", **SIZE}
    dataset = {"path": str(path), "messages_field": "messages", "tokenizer": str(tokenizer)}
    if said is None:
        assert opened(model, dataset).train.num_windows(8) == 2
        return
    with pytest.raises(ZinfError, match=said) as caught:
        opened(model, dataset)
    assert caught.value.exit_code == 2
    assert str(path) in caught.value.line()


def test_windows_without_a_target_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    """The answer lies behind the last whole window."""
    chat = {"messages": [{"role": "user", "content": "w9 " * 7}, {"role": "assistant", "content": "w1"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat))
    dataset = {"path": str(tmp_path / "chat.jsonl"), "messages_field": "messages", "tokenizer": str(tokenizer)}
    with pytest.raises(DatasetError, match="nothing to train on"):
        opened({"model_type": "llama", **SIZE}, dataset)
