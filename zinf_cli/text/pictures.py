"""A model's processor: it turns texts with pictures into tokens, and pictures into what the model takes of them.

What stands for a picture in a text becomes as many tokens as the processor gives it, which depends on its size. So all
pictures are read once, when a text becomes tokens, and a picture that is missing or broken is found before a run.
Their pixels are computed anew whenever a batch is made: they would take more room than the files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zinf_cli.custom_code import custom_code_refused, names_custom_code
from zinf_cli.errors import DatasetError
from zinf_cli.text.cache import identity
from zinf_cli.text.chats import ANSWERS, marked_spans, marks_answers, render_chat
from zinf_cli.text.documents import Document, refuse_halves
from zinf_cli.text.picture_parts import PROCESSOR_FILES, with_pictures
from zinf_cli.text.special_tokens import around, begun
from zinf_cli.text.token_stream import MASKED, Seen
from zinf_cli.version import version_of

KINDS = "token_type_ids"
"""What processors call kinds of tokens, and what nearly all tokenizers make too."""


class Pictured(NamedTuple):
    """A text with pictures, as tokens."""

    ids: list[int]
    mask: list[bool]
    """Where there is a loss: not at what stands for a picture."""
    pictures: tuple[Seen, ...]


class Processor:
    """The processor of a checkpoint, opened with transformers. DatasetError if there is none, or no Pillow."""

    def __init__(self, directory: Path) -> None:
        if find_spec("PIL") is None:
            raise DatasetError(
                "pictures are read by Pillow, which is not installed", hint="pip install 'zinf[pictures]'"
            )
        from transformers import AutoProcessor

        try:
            self._processor: Any = AutoProcessor.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # a damaged file, or a missing library, may raise anything
            for name in PROCESSOR_FILES:
                if names_custom_code(directory, name):
                    raise custom_code_refused(directory, name, DatasetError) from error
            raise DatasetError(
                f"no usable processor of pictures: {_first_line(error)}", where=str(directory), hint=_WITHOUT
            ) from error
        if getattr(self._processor, "image_processor", None) is None:
            raise DatasetError("no processor of pictures here", where=str(directory), hint=_WITHOUT)
        self._tokenizer: Any = self._processor.tokenizer
        self._directory = directory
        self._known = False
        """Whether all that it makes of a text with pictures is known here."""

    @staticmethod
    def fingerprint(directory: Path) -> list[str]:
        """What its tokens follow from, beside the tokenizer: hashes of its files, and a version."""
        there = (directory / name for name in PROCESSOR_FILES if (directory / name).is_file())
        hashes = [f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in there]
        return [*hashes, f"pillow {version_of('pillow')}"]

    @property
    def pad(self) -> int:
        """The token that fills a sequence up."""
        found = (self._tokenizer.pad_token_id, self.end)
        return next((int(token) for token in found if token is not None), 0)

    @property
    def end(self) -> int | None:
        """The end-of-text token."""
        end: int | None = self._tokenizer.eos_token_id
        return end

    @cached_property
    def _head(self) -> list[int]:
        """The special tokens that its tokenizer puts before a text."""
        return around(lambda special: self._tokenizer("a", add_special_tokens=special)["input_ids"])[0]

    @property
    def stand_ins(self) -> list[int]:
        """The tokens in whose place the model puts what it sees of a picture."""
        several = getattr(self._processor, "image_token_ids", None)
        return [
            int(token) for token in (several or [getattr(self._processor, "image_token_id", None)]) if token is not None
        ]

    def encode(self, document: Document, file: Path, roles: Sequence[str]) -> Pictured:
        """The tokens of a text, or of chat messages of which `roles` are learned. `file` is the one it stands in.

        A text begins with what its tokenizer puts before one, ends with the end-of-text token, and all of it is
        learned. DatasetError if it is neither, or a picture can't be read or has no place in it.
        """
        document, paths = with_pictures(document, file)
        marked = isinstance(document.content, list) and tuple(roles) == (ANSWERS,) and marks_answers(self._template)
        text, said = self._text_of(document, roles, marked=marked)
        pictures = [open_picture(path, document.where) for path in paths]
        ids, offsets, spans = self._encoded(text, pictures, document)
        moved = [tuple(_moved(place, spans) for place in span) for span in said] if said is not None else None
        stand_in = set(self.stand_ins)
        inside = [(first, last) for _, (first, last) in spans]
        mask = [
            token not in stand_in
            and not _within(first, inside)
            and (moved is None or (_over(first, last, moved) if marked else _within(first, moved)))
            for token, (first, last) in zip(ids, offsets, strict=True)
        ]
        if said is None:
            whole, tail = begun(ids, self._head), [] if self.end is None else [self.end]
            mask = [True] * (len(whole) - len(ids)) + mask + [True] * len(tail)
            ids = whole + tail
        if not ids:
            raise DatasetError("a text has no tokens", where=document.where)
        return Pictured(ids, mask, tuple(Seen(str(path), identity(path)) for path in paths))

    def beside(
        self, rows: Sequence[Sequence[str]], input_ids: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What the model takes beside the tokens of texts, by its argument's name.

        That is of the pictures at the paths in `rows`, one a text, and of the tokens (`input_ids` and `labels`, int64
        [texts, length]). DatasetError if a picture can't be read.
        """
        opened = [[open_picture(Path(path), path) for path in row] for row in rows if row]
        found: Any = self._processor.image_processor(opened, **self._settings) if opened else {}
        taken = {name: value for name, value in found.items() if name in self._processor.model_input_names}
        return taken | self._of_tokens(input_ids, labels)

    def _of_tokens(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """What kind of token each is, if the model takes that: int64 [texts, length], by its argument's name."""
        names, kinds = self._processor.model_input_names, {}
        for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
            if name in names:
                kinds[name] = torch.tensor(getattr(self._processor, f"create_{name}")(input_ids.tolist()))
        if self._names_kinds:  # of a prompt and its answer (PaliGemma), or of pictures (Gemma 3)
            of_answers = "labels" in names
            kinds[KINDS] = labels != MASKED if of_answers else torch.isin(input_ids, torch.tensor(self.stand_ins))
        return {name: kind.to(torch.int64) for name, kind in kinds.items()}

    @property
    def _names_kinds(self) -> bool:
        """Whether the processor itself, and not its tokenizer, says what kind of token each is."""
        both = (self._processor.model_input_names, self._tokenizer.model_input_names)
        own, its = (list(names).count(KINDS) for names in both)
        return own > its

    @property
    def _settings(self) -> dict[str, Any]:
        """What the processor tells its part for pictures when it makes tokens of a text, such as to cut them."""
        options = {"tokenizer_init_kwargs": self._tokenizer.init_kwargs, "return_tensors": "pt"}
        merged = self._processor._merge_kwargs(self._processor.valid_processor_kwargs, **options)
        settings: dict[str, Any] = merged["images_kwargs"]
        return settings

    @property
    def _template(self) -> str:
        """The chat template as it is written; empty if there is none."""
        found = self._processor.chat_template or self._tokenizer.chat_template or ""
        return str(found.get("default", "") if isinstance(found, dict) else found)

    def _text_of(
        self, document: Document, roles: Sequence[str], *, marked: bool
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """(the text, the spans that are learned; None: all of it). `marked`: those that the template marks."""
        if isinstance(document.content, str):
            refuse_halves(document.content, document.where)
            return document.content, None
        if not isinstance(document.content, list):
            raise DatasetError(f"expected text, got {type(document.content).__name__}", where=document.where)
        if not self._template:
            raise DatasetError(
                "this processor has no chat template", where=str(self._directory), hint="use dataset.text_field"
            )
        template = self._processor.apply_chat_template
        return marked_spans(document, template, self._marked) if marked else render_chat(document, template, roles)

    def _marked(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> list[tuple[int, int]]:
        """The spans that the chat template marks as what the assistant says."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, found = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return [(first, last) for first, last in found[0]]

    def _encoded(
        self, text: str, pictures: Sequence[Any], document: Document
    ) -> tuple[list[int], list[tuple[int, int]], list[tuple[tuple[int, int], tuple[int, int]]]]:
        """(tokens, the span of each, (span in the text, span once pictures are put in) of each picture's place)."""
        options = {"add_special_tokens": False, "return_offsets_mapping": True}
        try:
            if not pictures:
                found = self._tokenizer([text], verbose=False, **options)
                spans: list[Any] = []
            else:
                found = self._processor(
                    text=[text], images=[list(pictures)], return_text_replacement_offsets=True, **options
                )
                spans = [
                    (tuple(place["span"]), tuple(place["new_span"])) for place in found["text_replacement_offsets"][0]
                ]
        except Exception as error:  # foreign code
            raise DatasetError(f"the processor fails: {_first_line(error)}", where=document.where) from error
        if pictures and not self._known:
            self._refuse_more(found, pictures, document.where)
            self._known = True
        ids, stand_ins = list(found["input_ids"][0]), set(self.stand_ins)
        places = len(spans) if pictures else sum(token in stand_ins for token in ids)
        if places != len(pictures):
            raise DatasetError(
                f"{len(pictures)} pictures and {places} places for them", where=document.where,
                hint=f"write {self._processor.image_token} where a picture stands, or a part {{type: image}} in a chat",
            )  # fmt: skip
        return ids, [(first, last) for first, last in found["offset_mapping"][0]], spans

    def _refuse_more(self, found: Any, pictures: Sequence[Any], where: str) -> None:
        """DatasetError if what the processor makes of a text with pictures, `found`, has more than `beside` gives.

        A model that takes it would compute something else without it.
        """
        tokens = torch.tensor(found["input_ids"])
        given = {*self._processor.image_processor([list(pictures)], **self._settings), *self._of_tokens(tokens, tokens)}
        if more := set(found) - given - _OF_TEXT:
            raise DatasetError(
                f"{type(self._processor).__name__} makes {', '.join(sorted(more))} of a text as well, which is not "
                "carried to the model",
                where=where,
                hint=_WITHOUT,
            )


_OF_TEXT = {"input_ids", "attention_mask", "offset_mapping", "text_replacement_offsets", "labels", KINDS}
"""What a processor makes of the text alone. It makes the last two of what stands behind a prompt, which is learned."""
_WITHOUT = "give a model that takes pictures, with its processor's files, or leave dataset.images_field out"


def open_picture(path: Path, where: str) -> Any:
    """A picture, in RGB and upright, as transformers loads it. DatasetError if it is missing, or none."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError as error:
        raise DatasetError(f"no such picture: {path}", where=where, hint="paths are relative to the file") from error
    except UnidentifiedImageError as error:
        raise DatasetError(f"not a picture, or none that Pillow reads: {path}", where=where) from error
    except Exception as error:  # damaged bytes raise errors of many kinds
        raise DatasetError(f"a damaged picture: {path}: {_first_line(error)}", where=where) from error


def _within(place: int, spans: Sequence[tuple[int, ...]]) -> bool:
    return any(first <= place < last for first, last in spans)


def _over(first: int, last: int, spans: Sequence[tuple[int, ...]]) -> bool:
    """Whether a token at [first, last) has some of the spans, as transformers counts it into its mask."""
    return any(first < span[1] and last > span[0] for span in spans)


def _moved(place: int, spans: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> int:
    """A place in a text, once pictures have been put in before it."""
    before = [(old, new) for old, new in spans if old[1] <= place]
    return place + (before[-1][1][1] - before[-1][0][1] if before else 0)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
