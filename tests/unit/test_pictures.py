"""Models that read pictures: the losses of plain transformers with their processor, and pictures that are none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image

from forked_ranks import ForkedRanks
from pictured_models import PROCESSORS, picture, save_patched, save_pictured, turns, write_rows
from tiny_models import WORDS, save_word_tokenizer
from workshop import Workshop
from zinf_cli.batches.collator import Sample
from zinf_cli.errors import ZinfError
from zinf_cli.recipe.recipe_file import load_recipe
from zinf_cli.text.chats import PICTURES
from zinf_cli.text.documents import Document
from zinf_cli.text.pictures import KINDS, Processor, open_picture
from zinf_cli.text.token_stream import MASKED
from zinf_cli.train.export import export
from zinf_cli.train.figures import find_figures
from zinf_cli.train.setup import open_model, open_text
from zinf_cli.train.surveyed import first_micro_batch

ROWS, STEPS = 16, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictured")
    write_rows(folder, ROWS)
    save_word_tokenizer(folder / "plain", WORDS)
    for name in PROCESSORS:
        save_pictured(folder / name, name)
    return folder


def workshop_of(name: str, data: Path, folder: Path) -> Workshop:
    workshop = Workshop(folder)
    workshop.content["model"] = {"name_or_path": str(data / name)}
    workshop.content["dataset"] = {
        "path": str(data / "chats.jsonl"), "messages_field": "messages", "images_field": "images"
    }  # fmt: skip
    workshop.content["train"] = {
        "seq_len": 52, "micro_batch_size": 2, "global_batch_size": 4, "max_steps": STEPS
    }  # fmt: skip
    workshop.content["optimizer"]["lr"] = 1e-3
    workshop.content["checkpoint"] = {"interval": STEPS}
    workshop.write()
    return workshop


def plain(workshop: Workshop, data: Path, folder: Path) -> tuple[list[float], nn.Module]:
    """The losses of the model with its processor, a row after another, and the model."""
    recipe = load_recipe(workshop.recipe)
    processor = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder).train()
    rows = [json.loads(line) for line in recipe.dataset.paths[0].read_text().splitlines()]
    order = open_text(recipe, open_model(recipe, "fp32"), 1).order
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        batches = []
        for row in (rows[window] for window in order.windows(step)):
            images = [Image.open(data / name).convert("RGB") for name in row["images"]]
            text = processor.apply_chat_template(row["messages"], tokenize=False)
            batch = processor(
                text=[text], images=[images] if images else None, return_tensors="pt", add_special_tokens=False
            )
            labels, learned = torch.full_like(batch["input_ids"], MASKED), False
            for place, word in enumerate(processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])):
                if learned:
                    labels[0, place] = batch["input_ids"][0, place]
                learned = word == "<bot>" or (learned and word != "<end>")
            batches.append((batch, labels))
        total = sum(int((labels[:, 1:] != MASKED).sum()) for _, labels in batches)
        losses.append(0.0)
        for batch, labels in batches:
            loss = model(**batch, labels=labels).loss * (int((labels[:, 1:] != MASKED).sum()) / total)
            loss.backward()
            losses[-1] += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses, model


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_losses_are_those_of_the_model_with_its_processor(
    name: str, data: Path, forked: ForkedRanks, tmp_path: Path
) -> None:
    workshop = workshop_of(name, data, tmp_path)
    one = workshop.fork(forked, "one")
    losses, model = plain(workshop, data, data / name)
    assert one.losses == pytest.approx(losses, abs=1e-6)
    assert "note: " not in one.err
    assert workshop.fork(forked, "two", ranks=2).losses == pytest.approx(losses, abs=1e-6)
    export(one.run_dir, tmp_path / "exported")
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported")
    AutoProcessor.from_pretrained(tmp_path / "exported")
    trained = dict(model.named_parameters())
    for path, ours in exported.named_parameters():
        assert torch.allclose(ours, trained[path], atol=1e-5), path


def test_a_text_has_the_token_of_a_picture(data: Path, forked: ForkedRanks, tmp_path: Path) -> None:
    """All of it is learned but what stands for the picture; one that does not end within seq_len is left out."""
    rows = [{"text": f"w1 w2 <image> w3 w{number}", "images": ["pictures/1.png"]} for number in range(8)]
    rows.append({"text": " ".join(["w1"] * 30 + ["<image>"]), "images": ["pictures/1.png"]})
    write(data / "texts.jsonl", rows)
    workshop = workshop_of("llava", data, tmp_path)
    workshop.content["dataset"] = {"path": str(data / "texts.jsonl"), "images_field": "images"}
    workshop.content["train"]["seq_len"] = 16
    workshop.write()
    recipe = load_recipe(workshop.recipe)
    text = open_text(recipe, open_model(recipe, "fp32"), 1)
    assert text.lines == ("left out: 1 texts, with nothing to learn or half a picture in train.seq_len=16",)
    assert text.train.num_windows(16) == 8
    run = workshop.fork(forked, "run")
    assert run.metrics[0]["tokens"] == 4 * (5 + 4)  # four words and the end, and four places for a picture


def test_a_picture_that_has_changed_is_read_again(data: Path, tmp_path: Path) -> None:
    own = data / "own.png"
    own.write_bytes((data / "pictures" / "1.png").read_bytes())
    write(data / "rows.jsonl", [chat("own.png")] * 8)
    workshop = workshop_of("idefics3", data, tmp_path)
    workshop.content["dataset"]["path"] = str(data / "rows.jsonl")
    workshop.write()
    recipe = load_recipe(workshop.recipe)
    model = open_model(recipe, "fp32")
    before = len(open_text(recipe, model, 1).train)
    own.write_bytes((data / "pictures" / "2.png").read_bytes())
    assert len(open_text(recipe, model, 1).train) < before


FORMS: list[Any] = [
    lambda path: {"type": "image", "image": path},
    lambda path: {"type": "image", "path": path, "text": None},
    lambda path: {"type": "image_url", "image_url": {"url": path}},
    lambda path: {"type": "image_url", "image_url": path},
    lambda path: {"type": "image", "url": f"file://{path}"},
]


@pytest.mark.sampled
@pytest.mark.parametrize("form", range(len(FORMS)))
def test_parts_of_a_chat_name_their_pictures(form: int, data: Path, tmp_path: Path) -> None:
    """Tokens, places and pixels are those of paths in a field; one of two parts may take its path from there."""
    pictures = [str(data / "pictures" / name) for name in ("1.png", "2.png")]
    named = [FORMS[form](pictures[0]), {"type": "image"}]
    written = [chat(*pictures), {**of_parts(*named), "images": [pictures[1]]}, of_parts(*map(FORMS[form], pictures))]
    written[0]["messages"] = of_parts({"type": "image"}, {"type": "image"})["messages"]
    found = []
    for number, row in enumerate(written):
        write(data / f"form-{number}.jsonl", [row] * 4)
        workshop = workshop_of("idefics3", data, tmp_path)
        workshop.content["dataset"]["path"] = str(data / f"form-{number}.jsonl")
        workshop.write()
        recipe = load_recipe(workshop.recipe)
        text = open_text(recipe, open_model(recipe, "fp32"), 1)
        found.append(text.collator.collate(text.train, [Sample(0, 0), Sample(1, 1)], 0).inputs(torch.device("cpu")))
    assert found[0].keys() == found[1].keys() == found[2].keys()
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in found[0])
    assert "pixel_values" in found[0]


def test_texts_without_pictures_beside_those_with_them(data: Path, forked: ForkedRanks, tmp_path: Path) -> None:
    """Some micro-batches call nothing that sees; the plan is made for those that do."""
    workshop = workshop_of("llava", data, tmp_path)
    workshop.content["train"] |= {"micro_batch_size": 1}
    workshop.content["dataset"]["shuffle"] = False
    rows = [json.loads(line) for line in (data / "chats.jsonl").read_text().splitlines()]
    rows = [*rows[4::5], *rows[:4]]  # the first have none
    assert not rows[0]["images"]
    write(data / "mixed.jsonl", rows)
    workshop.content["dataset"]["path"] = str(data / "mixed.jsonl")
    workshop.write()
    recipe = load_recipe(workshop.recipe)
    looked_at = first_micro_batch(open_text(recipe, open_model(recipe, "fp32"), 1), recipe, 0)
    assert "pixel_values" in looked_at.beside
    run = workshop.fork(forked, "one")
    losses, _ = plain(workshop, data, data / "llava")
    assert run.losses == pytest.approx(losses, abs=1e-6)


def test_a_picture_is_upright_as_its_camera_says(tmp_path: Path) -> None:
    path = tmp_path / "turned.png"
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned.save(path, exif=exif)
    assert open_picture(path, "").size == (2, 4)
    assert open_picture(path, "").tobytes() == load_image(str(path)).tobytes()


def test_pixels_are_made_with_the_settings_of_tokens(tmp_path: Path) -> None:
    """Of a processor that has its pictures cut into patches, whose part for pictures alone would not cut them."""
    save_patched(tmp_path)
    picture(1).resize((112, 28)).save(tmp_path / "wide.png")
    processor = Processor(tmp_path)
    document = Document("here", "w1 <image> w2", beside={PICTURES: ["wide.png"]})
    found = processor.encode(document, tmp_path / "rows.jsonl", ("assistant",))
    seen = found.ids.count(AutoProcessor.from_pretrained(tmp_path).image_token_id)
    pixels = processor.beside([[str(tmp_path / "wide.png")]], *2 * [torch.tensor([found.ids])])["pixel_values"]
    assert seen == len(pixels) > 1  # a token for each patch


def test_a_text_begins_as_its_tokenizer_begins_it(tmp_path: Path) -> None:
    processor = PROCESSORS["llava"]()
    begins = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    processor.tokenizer.backend_tokenizer.post_processor = begins
    processor.save_pretrained(tmp_path)
    picture(1).save(tmp_path / "1.png")
    expected = processor(text=["w1 <image> w2"], images=[[picture(1)]])["input_ids"][0]
    document = Document("here", "w1 <image> w2", beside={PICTURES: ["1.png"]})
    found = Processor(tmp_path).encode(document, tmp_path / "rows.jsonl", ("assistant",))
    assert processor.tokenizer.convert_ids_to_tokens(found.ids[:2]) == ["<bos>", "w1"]
    assert found.ids == [*expected, processor.tokenizer.eos_token_id]
    image = processor.image_token_id
    assert found.mask == [token != image for token in found.ids]


def test_what_a_processor_makes_beside_all_that_is_known_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(AutoProcessor.from_pretrained(data / "llava"))
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda *given, **more: call(*given, **more) | {"cross_attention_mask": [[1]]})
    document = Document("here", "w1 <image> w2", beside={PICTURES: ["pictures/1.png"]})
    with pytest.raises(ZinfError, match="here: LlavaProcessor makes cross_attention_mask of a text as well, which"):
        Processor(data / "llava").encode(document, data / "rows.jsonl", ("assistant",))


def test_tokens_behind_a_prompt_are_of_another_kind(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor says so by kinds and labels, as PaliGemma's does: 0 of what is read, 1 of what is learned."""
    kind = type(AutoProcessor.from_pretrained(data / "llava"))
    monkeypatch.setattr(kind, "model_input_names", property(lambda self: ["pixel_values", *2 * [KINDS], "labels"]))
    labels = torch.tensor([[MASKED, MASKED, 5, 6, MASKED]])
    found = Processor(data / "llava").beside([], torch.tensor([[3, 4, 5, 6, 0]]), labels)
    assert found.keys() == {KINDS}
    assert found[KINDS].tolist() == [[0, 0, 1, 1, 0]]


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_template_that_marks_answers_decides_what_is_learned(name: str, tmp_path: Path) -> None:
    """The tokens and the mask are those of the processor. Not the end of a turn; and earlier turns are rewritten."""
    processor = PROCESSORS[name]()
    words = "{% if m.content is string %}{{ m.content }}"
    said = "{{ m.content if loop.last else m.content + ' w59' }}"
    marked = (
        "{% if m.role == 'assistant' %}{% generation %}" + said + "{% endgeneration %}{% elif m.content is string %}"
    )
    processor.chat_template = processor.chat_template.replace(words, marked + "{{ m.content }}")
    processor.save_pretrained(tmp_path)
    picture(1).save(tmp_path / "1.png")
    question, answer = turns(0)
    question["content"][0] |= {"path": str(tmp_path / "1.png")}
    messages = [question, answer, *turns(1, of_picture=False)]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    expected = processor.apply_chat_template(messages, **options)
    document = Document("here", messages, beside={PICTURES: []})
    found = Processor(tmp_path).encode(document, tmp_path / "rows.jsonl", ("assistant",))
    assert found.ids == list(expected["input_ids"][0])
    assert found.mask == [bool(one) for one in expected["assistant_masks"][0]]
    learned = processor.tokenizer.convert_ids_to_tokens(
        [i for i, own in zip(found.ids, found.mask, strict=True) if own]
    )
    assert learned == [*answer["content"].split(), "w59", *messages[-1]["content"].split()]


def write(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat(*names: Any) -> dict[str, Any]:
    return {"messages": turns(0), "images": list(names)}


def of_parts(*parts: dict[str, Any]) -> dict[str, Any]:
    """A chat whose pictures are in its parts."""
    question, answer = turns(0, of_picture=False)
    return {"messages": [{**question, "content": [*parts, *question["content"]]}, answer]}


@pytest.mark.parametrize(
    ("row", "changes", "said"),
    [
        (chat("pictures/none.png"), [], "rows.jsonl:1: no such picture: FOLDER/pictures/none.png (paths are relative"),
        (chat("rows.jsonl"), [], "rows.jsonl:1: not a picture, or none that Pillow reads: FOLDER/rows.jsonl"),
        (chat("cut.png"), [], "rows.jsonl:1: a damaged picture: FOLDER/cut.png: "),
        (
            chat("pictures/0.png", "pictures/1.png"),
            [],
            "rows.jsonl:1: 1 parts {type: image} have no path of their own, a",
        ),
        (chat(), [], "rows.jsonl:1: 1 parts {type: image} have no path of their own, and 0 paths are beside the chat"),
        (
            chat(),
            ["dataset.images_field=null"],
            "rows.jsonl:1: a turn has a part that is no text (image), and text alone",
        ),
        (chat(), ["dataset.images_field=null"], "(set dataset.images_field for chats with pictures)"),
        (
            chat("https://a.org/b.png"),
            [],
            "rows.jsonl:1: a picture is somewhere else, and nothing is downloaded: https:",
        ),
        (
            of_parts({"type": "image_url", "image_url": {"url": "http://a.org/b.png"}}),
            [],
            "(download it beside the text",
        ),
        (
            of_parts({"type": "image", "image": "data:image/png;base64,iVBORw0KGgo"}),
            [],
            "a picture stands in the text it",
        ),
        (
            of_parts({"type": "image_url", "image_url": {}}),
            [],
            "expected the path of a picture, got {'type': 'image_url'",
        ),
        (
            of_parts({"type": "image", "image": "pictures/none.png"}),
            [],
            "rows.jsonl:1: no such picture: FOLDER/pictures/no",
        ),
        (of_parts({"type": "image", "image": "cut.png"}), [], "rows.jsonl:1: a damaged picture: FOLDER/cut.png: "),
        (of_parts({"type": "text", "text": "<image>"}), [], "rows.jsonl:1: 0 pictures and 1 places for them"),
        (chat(3), [], "rows.jsonl:1: expected a list of paths of pictures, got [3]"),
        (chat("pictures/0.png"), ["dataset.packing=documents"], "dataset.packing: a text may have pictures"),
        (chat("pictures/0.png"), ["dataset.tokenizer=FOLDER/plain"], "FOLDER/plain: no processor of pictures here"),
    ],
)
def test_what_is_no_picture(row: Any, changes: list[str], said: str, data: Path, tmp_path: Path) -> None:
    workshop = workshop_of("llava", data, tmp_path)
    (data / "cut.png").write_bytes((data / "pictures" / "1.png").read_bytes()[:200])
    write(data / "rows.jsonl", [row])
    workshop.content["dataset"]["path"] = str(data / "rows.jsonl")
    workshop.write()
    with pytest.raises(ZinfError) as caught:
        find_figures(load_recipe(workshop.recipe, [change.replace("FOLDER", str(data)) for change in changes]), 1)
    assert said.replace("FOLDER", str(data)) in caught.value.line()
