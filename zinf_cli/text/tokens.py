"""The model's tokenizer: it turns documents and chats into tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from zinf_cli.custom_code import custom_code_refused, names_custom_code
from zinf_cli.errors import DatasetError
from zinf_cli.stand_ins import stand_in
from zinf_cli.text.chats import (
    ANSWERS,
    Template,
    marked_tokens,
    marks_answers,
    render_chat,
    render_prompt,
    render_whole,
)
from zinf_cli.text.documents import Document, refuse_halves
from zinf_cli.text.masking import Masking
from zinf_cli.text.special_tokens import around, begun
from zinf_cli.version import version_of

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
    "tokenizer.model", "sentencepiece.model", "sentencepiece.bpe.model", "spiece.model", "spm.model", "spm_char.model",
    "source.spm", "target.spm", "tekken.json", "prophetnet.tokenizer",
    "vocab.txt", "vocab.json", "vocab.bpe", "merges.txt", "bpe.codes", "dict.txt", "emoji.json", "normalizer.json",
    "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json", "byte_maps.json",
    "word_shape.json", "word_pronunciation.json",
)  # fmt: skip
"""The files that transformers' tokenizers read. A test compares."""
TOKENIZER_LIBRARIES = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "mistral_common", "jinja2")
"""The libraries that tokenise. Another version may make other tokens of the same text."""


class Tokenizer:
    """A tokenizer directory of a checkpoint, opened with transformers."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # a file of a newer version, or a damaged one, may raise anything
            if names_custom_code(directory, TOKENIZER_CONFIG):
                raise custom_code_refused(directory, TOKENIZER_CONFIG, DatasetError) from error
            for name in TOKENIZER_FILES:
                if found := stand_in(directory / name):
                    raise DatasetError(found[0], where=str(directory / name), hint=found[1]) from error
            raise DatasetError(
                f"no usable tokenizer: {_first_line(error)}",
                where=str(directory),
                hint=f"set dataset.tokenizer to a directory with a tokenizer.json that tokenizers "
                f"{version_of('tokenizers') or 'here'} reads, or install the version that wrote it",
            ) from error
        self._tokenizer.model_max_length = int(1e30)  # windows are cut later: no warning about long texts
        self._directory = directory

    @staticmethod
    def fingerprint(directory: Path) -> list[str]:
        """What a tokenizer's tokens follow from: hashes of its files, and versions of the libraries."""
        try:
            files = [
                f"{name}:{hashlib.sha256((directory / name).read_bytes()).hexdigest()}"
                for name in TOKENIZER_FILES
                if (directory / name).is_file()
            ]
        except OSError as error:
            raise DatasetError(f"can't read the tokenizer: {error.strerror}", where=str(error.filename)) from error
        return files + [f"{name} {version_of(name)}" for name in TOKENIZER_LIBRARIES]

    def masking(self, vocabulary: int, seed: int) -> Masking:
        """The masking of a masked language model's text, with the tokenizer's mask token and special tokens.

        DatasetError if the tokenizer has no mask token, or one that the model's `vocabulary` does not have.
        """
        if self._tokenizer.mask_token_id is None:
            raise DatasetError(
                "this tokenizer has no mask token, and the model is trained on masked tokens",
                where=str(self._directory),
                hint="set dataset.tokenizer to the tokenizer of this model",
            )
        if self._tokenizer.mask_token_id >= vocabulary:
            raise DatasetError(
                f"the mask token {self._tokenizer.mask_token_id} is outside the model's embedding of {vocabulary} rows",
                where=str(self._directory),
                hint="set dataset.tokenizer to the tokenizer of this model",
            )
        special = np.array(self._tokenizer.all_special_ids, dtype=np.int64)
        return Masking(self._tokenizer.mask_token_id, special, min(len(self._tokenizer), vocabulary), seed)

    @property
    def end(self) -> int | None:
        """The end-of-text token."""
        end: int | None = self._tokenizer.eos_token_id
        return end

    def encode_prompt(self, text: str, *, chat: bool) -> list[int]:
        """The tokens of a text to go on with; of a `chat`, the user's turn and what the template puts before an answer.

        DatasetError if the tokenizer fails, or has no chat template.
        """
        document = Document("samples.prompts", text)
        if not chat:
            return begun(self._encode(text, document)["input_ids"], self._head)
        turn = Document("samples.prompts", [{"role": "user", "content": text}])
        return list(self._encode(render_prompt(turn, self._templated()), document)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def encode_texts(self, documents: Sequence[Document]) -> list[list[int]]:
        """The tokens of texts. A document begins with the special tokens that the tokenizer puts before a text, unless
        it has them already; where it ends, the end-of-text token is the last.

        A tokenizer of the tokenizers library takes all cores for them.
        """
        for document in documents:
            if not isinstance(document.content, str):
                raise DatasetError(f"expected text, got {type(document.content).__name__}", where=document.where)
        encoded = self._encode_all([document.content for document in documents], documents)["input_ids"]
        end = self._tokenizer.eos_token_id
        if end is None:
            end = self._tokenizer.sep_token_id  # BERT's
        tail = [] if end is None else [end]
        return [
            [*(begun(ids, self._head) if document.begins else ids), *(tail if document.ends else [])]
            for ids, document in zip(encoded, documents, strict=True)
        ]

    @property
    def pad(self) -> int:
        """The token that fills a sequence up: the tokenizer's, or else its end-of-text token, or else 0."""
        found = (self._tokenizer.pad_token_id, self.end)
        return next((int(token) for token in found if token is not None), 0)

    def tail(self, name: str = "text") -> int:
        """How many special tokens it puts behind a text, which is passed as argument `name`."""
        return self._around(name)[1]

    @cached_property
    def _head(self) -> list[int]:
        """The special tokens that it puts before a text."""
        return self._around("text")[0]

    def _around(self, name: str) -> tuple[list[int], int]:
        """See around()."""
        probe = Document(str(self._directory), "a")
        return around(lambda special: self._encode("a", probe, name, add_special_tokens=special)["input_ids"])

    def encode_whole(self, documents: Sequence[Document]) -> list[list[int]]:
        """The tokens of texts with their special tokens, as classifiers and embedding models read them.

        DatasetError for an empty one.
        """
        for document in documents:
            if not isinstance(document.content, str) or not document.content:
                raise DatasetError(f"expected text, got {document.content!r:.40}", where=document.where)
        encoded = self._encode_all([document.content for document in documents], documents, add_special_tokens=True)
        for ids, document in zip(encoded["input_ids"], documents, strict=True):
            if not ids:
                raise DatasetError("a text has no tokens", where=document.where)
        if any(map(any, encoded.get("token_type_ids", ()))):
            raise DatasetError(
                f"{type(self._tokenizer).__name__} gives tokens of a text kinds (token_type_ids), which do not reach "
                "the model: it would read another text",
                where=str(self._directory),
                hint="train a model of another type",
            )
        return list(encoded["input_ids"])

    def encode_pair(self, document: Document, target_field: str) -> tuple[list[int], list[bool]]:
        """(tokens, mask) of a source and its target, with their special tokens. The mask is True for the target's."""
        source, target = document.content, document.beside.get(target_field)
        for text in (source, target):
            if not isinstance(text, str) or not text:
                raise DatasetError(
                    f"expected a source and a target, got {source!r:.40} and {target!r:.40}",
                    where=document.where,
                    hint="set dataset.source_field and dataset.target_field to fields that hold text",
                )
        read = self._encode(source, document, add_special_tokens=True)["input_ids"]
        written = self._encode(target, document, "text_target", add_special_tokens=True)["input_ids"]
        if not read or not written:
            raise DatasetError("a source or a target has no tokens", where=document.where)
        return [*read, *written], [False] * len(read) + [True] * len(written)

    def encode_answers(
        self, document: Document, fields: tuple[str, str, str]
    ) -> Iterator[tuple[list[int], list[bool]]]:
        """(tokens, mask) of the chosen answer and of the rejected one, each behind the prompt.

        They are tokenised together, as SentencePiece puts a space before a text that is tokenised alone. The mask is
        that of the answer: it begins with the first token that the prompt alone does not have. `fields` are those of
        chosen, rejected and prompt. A text begins and ends as in encode_texts, a chat as its template has it.
        DatasetError if the document has no two answers.
        """
        chosen, rejected, prompt = document.content, document.beside.get(fields[1]), document.beside.get(fields[2])
        if not all(isinstance(answer, str | list) and answer for answer in (chosen, rejected)):
            raise DatasetError(
                f"expected two answers, got {chosen!r:.40} and {rejected!r:.40}",
                where=document.where,
                hint="set dataset.chosen_field and dataset.rejected_field to fields that hold them",
            )
        if isinstance(chosen, str) != isinstance(rejected, str) or (
            isinstance(chosen, str) and not isinstance(prompt, str)
        ):
            raise DatasetError(
                "the prompt and both answers have to be of one kind, text or chat messages",
                where=document.where,
                hint=f"see what {fields[0]!r}, {fields[1]!r} and {fields[2]!r} hold there",
            )
        if isinstance(chosen, str):
            asked = (str(prompt), str(prompt))
            texts = (asked[0] + chosen, asked[1] + str(rejected))
        else:
            assert isinstance(rejected, list)
            asked, texts = self._answered(document, chosen, rejected, prompt)
        for begin, text in zip(asked, texts, strict=True):
            before = list(self._encode(begin, document)["input_ids"])
            ids = list(self._encode(text, document)["input_ids"])
            if isinstance(chosen, str):
                before, ids = begun(before, self._head), begun(ids, self._head)
            same = next(
                (n for n, (one, other) in enumerate(zip(before, ids, strict=False)) if one != other), len(before)
            )
            if isinstance(chosen, str) and self.end is not None:
                ids.append(self.end)
            if not before or not ids[same:]:
                raise DatasetError("a prompt or an answer has no tokens", where=document.where)
            if not same:
                raise DatasetError(
                    f"the first token of {begin!r:.40} is another one once it is answered, so nothing is before it",
                    where=document.where,
                )
            yield ids, [False] * same + [True] * (len(ids) - same)

    def _answered(
        self, document: Document, chosen: list[Any], rejected: list[Any], prompt: Any
    ) -> tuple[tuple[str, str], tuple[str, str]]:
        """(what stands before each answer, all of each chat) as the chat template writes it."""
        template = self._templated()
        if prompt is None:
            same = 0
            while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
                same += 1
            asked, answers = chosen[:same], (chosen[same:], rejected[same:])
        else:
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            answers = (chosen, rejected)
        begin = render_prompt(replace(document, content=asked), template)
        texts = [render_whole(replace(document, content=[*asked, *answer]), template) for answer in answers]
        for text in texts:
            if not text.startswith(begin):
                raise DatasetError(
                    "the chat template writes a prompt otherwise once it is answered, so the answer can't be told",
                    where=document.where,
                    hint="use a template that only appends, or give prompt and answers as text",
                )
        return (begin, begin), (texts[0], texts[1])

    def encode_chats(self, documents: Sequence[Document], roles: Sequence[str]) -> list[tuple[list[int], list[bool]]]:
        """(tokens, mask) of each dialog in the chat template.

        The mask is True for what `roles` say, and for the ends of their turns. If the template marks what the assistant
        says, and nothing else is learned, the mask is the template's.
        """
        if not self._tokenizer.is_fast:
            raise DatasetError(
                f"{type(self._tokenizer).__name__} is written in Python and can't tell where in a chat a token stands, "
                "so the assistant's part can't be told",
                where=str(self._directory),
                hint="use a tokenizer with tokenizer.json, or dataset.text_field with rendered dialogs",
            )
        template = self._templated()
        marked = tuple(roles) == (ANSWERS,) and marks_answers(self._tokenizer.get_chat_template())
        masked, rendered = [], []
        for document in documents:
            try:
                if marked:
                    masked.append(marked_tokens(document, template))
                else:
                    rendered.append(render_chat(document, template, roles))
            except RecursionError as error:
                raise DatasetError("lists in lists, more than can be read", where=document.where) from error
        if marked:
            return masked
        encoded = self._encode_all([text for text, _ in rendered], documents, return_offsets_mapping=True)
        spans = zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True)
        return [
            (ids, [any(first <= start < last for first, last in said) for start, _ in offsets])
            for ids, offsets, (_, said) in spans
        ]

    def _templated(self) -> Template:
        """The tokenizer's way to write a chat. DatasetError if it has none."""
        if not self._tokenizer.chat_template:
            raise DatasetError(
                "this tokenizer has no chat template",
                where=str(self._directory),
                hint="use an instruct model's tokenizer, or dataset.text_field",
            )
        template: Template = self._tokenizer.apply_chat_template
        return template

    def _encode_all(self, texts: Sequence[str], documents: Sequence[Document], **options: Any) -> Any:
        """What the tokenizer returns for the texts of `documents`. DatasetError if it fails for one."""
        for text, document in zip(texts, documents, strict=True):
            refuse_halves(text, document.where)
        try:
            return self._tokenizer(**{"text": texts, "add_special_tokens": False, "verbose": False, **options})
        except Exception as error:  # foreign code; which of them is it?
            for text, document in zip(texts, documents, strict=True):
                self._encode(text, document, **options)
            where = documents[0].where
            raise DatasetError(f"the tokenizer fails: {_first_line(error)}", where=where) from error

    def _encode(self, text: Any, document: Document, name: str = "text", **options: Any) -> Any:
        """What the tokenizer returns for a text, which is passed as argument `name`. DatasetError if it fails."""
        refuse_halves(text, document.where)
        try:
            return self._tokenizer(**{name: text, "add_special_tokens": False, "verbose": False, **options})
        except Exception as error:  # foreign code
            raise DatasetError(f"the tokenizer fails: {_first_line(error)}", where=document.where) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
