"""Tiny models that read pictures, with their processors and rows, written as a user has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.aya_vision.processing_aya_vision import AyaVisionProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.llava.processing_llava import LlavaProcessor

from zoo.shrink import configs

WORDS = [f"w{number}" for number in range(60)]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}IMAGE {% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %} <end> {% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


def _tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """A word a token; the image's tokens are special."""
    names = ["<pad>", "<bos>", "<end>", "<user>", "<bot>", "[UNK]", *WORDS, *special]
    raw = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    known = {"eos_token": "<end>", "pad_token": "<pad>", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=list(special), **known, **named)


def _llava() -> Any:
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(
        images, _tokenizer("<image>"), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )  # fmt: skip


def _idefics3() -> Any:
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    tags = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    tokenizer = _tokenizer("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tags)
    return Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=TEMPLATE.replace("IMAGE", "<image>"))


def _gemma3() -> Any:
    """Tokens of a picture see each other: the processor says which tokens they are."""
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    known = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"}
    tokenizer = _tokenizer(*known.values(), **known)
    template = TEMPLATE.replace("IMAGE", "<boi>")
    return Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template)


PROCESSORS: dict[str, Callable[[], Any]] = {"llava": _llava, "idefics3": _idefics3, "gemma3": _gemma3}

CHANGES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llava": lambda processor: {"image_token_index": processor.image_token_id},
    "idefics3": lambda processor: {"image_token_id": processor.image_token_id},
    "gemma3": lambda processor: {"image_token_index": processor.image_token_ids[0], "mm_tokens_per_image": 4},
}
"""What a tiny configuration says of a processor's tokens."""


def save_pictured(folder: Path, name: str) -> None:
    """A tiny model of the type `name` with random weights and its processor."""
    processor = PROCESSORS[name]()
    config = next(configs(name))
    config |= CHANGES[name](processor)
    torch.manual_seed(3)
    model_type = config.pop("model_type")
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **config))
    assert len(processor.tokenizer) <= model.get_input_embeddings().weight.shape[0]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_patched(folder: Path) -> None:
    """A processor that cuts pictures into patches, of a token each, by settings of its own."""
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28})
    special = (
        "<image>",
        "<|START_OF_IMG|>",
        "<|END_OF_IMG|>",
        "<|IMG_LINE_BREAK|>",
        "TILE",
        "TILE_GLOBAL",
        "<|IMG_PATCH|>",
    )
    AyaVisionProcessor(images, _tokenizer(*special), patch_size=28, img_size=28, downsample_factor=1).save_pretrained(
        folder
    )
    _tokenizer(*special).save_pretrained(folder)


def picture(number: int) -> Image.Image:
    height, width = 28 + 14 * (number % 3), 28 + 28 * (number % 2)
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8))


def turns(row: int, *, of_picture: bool = True) -> list[dict[str, Any]]:
    """A question and its answer."""
    words = [f"w{(row * 7 + number) % 60}" for number in range(6)]
    asked: list[dict[str, Any]] = [{"type": "text", "text": " ".join(words[:3])}]
    asked = [{"type": "image"}, *asked] if of_picture else asked
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": " ".join(words[3 : 4 + row % 3])}]


def write_rows(folder: Path, count: int) -> Path:
    """Chats about pictures, one picture each but for every fifth, which has none, and every seventh, which has two."""
    (folder / "pictures").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        picture(number).save(folder / "pictures" / f"{number}.png")
        names = [] if number % 5 == 4 else [f"pictures/{number}.png"]
        messages = turns(number, of_picture=bool(names))
        if number % 7 == 6 and names:
            names.append("pictures/0.png")
            messages += turns(number + 1)
        rows.append({"messages": messages, "images": names})
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "chats.jsonl"
