"""What a folder of text gives: every file that is text, once, and a word about all others."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from zinf_cli.errors import DatasetError
from zinf_cli.text.documents import read_documents
from zinf_cli.text.text_files import find_texts, kind_of


def put(path: Path, content: str | bytes = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path) -> list[str]:
    """The documents below a path, pieces joined."""
    (texts,) = find_texts([path])
    found = [""]
    for file in texts.files:
        for document in read_documents(file, "text"):
            found[-1] += document.content
            if document.ends:
                found.append("")
    return found[:-1]


def test_packed_files_and_capitals_are_read(tmp_path: Path) -> None:
    line = json.dumps({"text": "one"}) + "\n"
    put(tmp_path / "a.JSONL", line)
    put(tmp_path / "b.jsonl.gz", gzip.compress(line.replace("one", "two").encode()))
    put(tmp_path / "c.Txt.GZ", gzip.compress("drei ü".encode()) + gzip.compress(b" vier"))  # two members
    put(tmp_path / "d.TXT", "five")
    assert read(tmp_path) == ["one", "two", "drei ü vier", "five"]


def test_what_is_no_text_is_left_out_and_said(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "some text")
    for name in (".ipynb_checkpoints/a-checkpoint.txt", ".git/x.txt", "sub/__pycache__/x.txt", "sub/._a.txt", ".b.txt"):
        put(tmp_path / name)
    put(tmp_path / "sub" / "README.md")
    put(tmp_path / "tokens.json.gz")
    put(tmp_path / "sub" / "b.txt", "")
    os.mkfifo(tmp_path / "pipe.txt")
    (texts,) = find_texts([tmp_path])
    assert [file.name for file in texts.files] == ["a.txt"]
    line = texts.line()
    assert line.startswith(f"{tmp_path}: 1 file, 9 B; left out: ")
    for said in ("5 hidden (", ".ipynb_checkpoints", "1 empty (b.txt)", "1 no regular file (pipe.txt)"):
        assert said in line
    assert "2 not text (tokens.json.gz, README.md)" in line or "2 not text (README.md, tokens.json.gz)" in line


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    put(tmp_path / "real" / "b.txt", "behind the link")
    put(tmp_path / "texts" / "a.txt", "here")
    (tmp_path / "texts" / "sub").symlink_to("../real")
    (tmp_path / "texts" / "c.txt").symlink_to("../real/b.txt")
    (tmp_path / "real" / "back").symlink_to("../texts")
    (tmp_path / "real" / "self").symlink_to(".")
    assert read(tmp_path / "texts") == ["here", "behind the link", "behind the link"]
    (texts,) = find_texts([tmp_path / "texts"])
    assert sorted(texts.left_out["read already"]) == ["back", "self"]


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to("/nowhere/b.txt")
    with pytest.raises(DatasetError, match=r"b\.txt: a link that leads nowhere"):
        find_texts([tmp_path])


def test_a_folder_with_the_name_of_a_file_is_a_folder(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / "out.parquet").mkdir(exist_ok=True)
        pa.parquet.write_table(pa.table({"text": [f"part {number}"]}), tmp_path / "out.parquet" / f"{number}.parquet")
    put(tmp_path / "out.parquet" / "_SUCCESS", "")
    put(tmp_path / "x.txt" / "y.txt", "inside")
    assert read(tmp_path) == ["part 0", "part 1", "inside"]
    assert read(tmp_path / "out.parquet") == ["part 0", "part 1"]


def test_a_folder_of_nothing_says_what_was_there(tmp_path: Path) -> None:
    put(tmp_path / "notes.md")
    with pytest.raises(DatasetError, match=r"no \.txt.* file in this folder; left out: 1 not text \(notes\.md\)"):
        find_texts([tmp_path])


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    mark = "\ufeff"
    put(tmp_path / "a.jsonl", f'{mark}{{"text": "one"}}\r\n{mark}{{"text": "{mark}two"}}\n')
    put(tmp_path / "b.txt", f"{mark}three\r\n{mark}four")
    put(tmp_path / "c.txt.gz", gzip.compress(f"{mark}five".encode()))
    pa.parquet.write_table(pa.table({"text": [f"{mark}six"]}), tmp_path / "d.parquet")
    assert read(tmp_path) == ["one", "two", "three\nfour", "five", "six"]


def test_a_very_long_line_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zinf_cli.text.documents.PIECE", 10)
    monkeypatch.setattr("zinf_cli.text.documents.LONGEST_PIECE", 7)
    monkeypatch.setattr("zinf_cli.text.documents.LONGEST_RECORD", 1 << 20)
    content = "äöüß" * 20 + "\nshort\n"
    pieces = list(read_documents(put(tmp_path / "a.txt", content), "text"))
    assert "".join(piece.content for piece in pieces) == content
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece.content) for piece in pieces) < 20
    put(tmp_path / "a.jsonl", '{"text": "short"}\n{"text": "' + "x" * (1 << 20) + '"}\n')
    with pytest.raises(DatasetError, match=r"a\.jsonl:2: a line of more than 1 MiB"):
        list(read_documents(tmp_path / "a.jsonl", "text"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.b.txt", ".txt"), ("a.txt.gz", ".txt"), ("A.NPY", ".npy"), ("a.parquet.gz", ""), ("a.gz", ""), ("gz", "")],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(Path(name)) == kind
