"""Files become passages: nothing is lost, each knows where it stands, and what can't be read is said."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.engine.indices import read
from ftkit.engine.indices._passages import MOST_BYTES, PASSAGE_CHARACTERS, cut
from ftkit.errors import InputError

pytestmark = pytest.mark.unit


@given(
    st.lists(
        st.tuples(st.text("aé🙂 .", max_size=40), st.sampled_from([" ", "\n", "\n\n", ". "]), st.integers(1, 40)),
        max_size=12,
    )
)
def test_pieces_are_the_text_and_know_their_lines(parts: list[tuple[str, str, int]]) -> None:
    text = "".join((words + mark) * times for words, mark, times in parts)
    pieces = list(cut(text))
    assert "".join("".join(piece.split()) for _, piece in pieces) == "".join(text.split())
    assert all(0 < len(piece) <= PASSAGE_CHARACTERS and piece == piece.strip() for _, piece in pieces)
    place = 0
    for line, piece in pieces:
        place = text.index(piece, place)
        assert line == 1 + text.count("\n", 0, place)
        place += len(piece)


def test_cuts_are_between_paragraphs_then_sentences_then_words() -> None:
    for mark, kept in (("\n\n", 0), (". ", 1), (" ", 0)):
        text = ("x" * 600 + mark + "y" * 600).replace("xy", "x y")
        first, second = cut(text)
        assert first == (1, "x" * 600 + mark[:kept])
        assert second == (1 + mark.count("\n"), "y" * 600)
    assert [len(piece) for _, piece in cut("z" * 2500)] == [1000, 1000, 500]


def test_a_folder_s_texts_and_rows(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("\n\nSecond.", encoding="utf-8")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.TXT").write_bytes("\ufeffFïrst.".encode())
    (tmp_path / "a" / "photo.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / ".hidden.md").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.md").write_text("no")
    rows: list[dict[str, object]] = [
        {"text": "plain"},
        {"text": "of a book", "title": "Moby-Dick"},
        {"text": "of the net", "title": "Page", "source": "https://example.org", "more": 1},
        {"text": "plain"},
        {"text": " "},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = read(tmp_path)
    assert [(passage.source, passage.text) for passage in found.passages] == [
        ("b.md:3", "Second."),
        ("rows.jsonl:1", "plain"),
        ("Moby-Dick", "Moby-Dick\nof a book"),
        ("https://example.org", "Page\nof the net"),
        ("a/one.TXT:1", "Fïrst."),
    ]
    assert found.notes == (
        "1 files are not .txt, .md, .markdown, .rst, .jsonl and were left out",
        "1 passages are there more than once",
    )
    assert [passage.source for passage in read(tmp_path / "b.md").passages] == ["b.md:3"]


def test_what_is_wrong_is_said_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "rows.jsonl").write_text('{"text": 1}\n{"text": "ok"}\n[1]\n{"text": "\\ud800"}\n{broken\n{}\n')
    with pytest.raises(InputError) as error:
        read(tmp_path)
    lines = error.value.message.replace(f"{tmp_path}/", "").split("\n")
    assert [line.partition(": expected")[0] for line in lines] == [
        "latin.txt",
        "rows.jsonl:1",
        "rows.jsonl:3",
        "rows.jsonl:4",
        "rows.jsonl:5",
        "rows.jsonl:6",
    ]
    assert "0xe9 at 3" in lines[0]


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got nothing there"):
        read(tmp_path / "none")
    with pytest.raises(InputError, match="got an empty one"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text(" \n ")
    with pytest.raises(InputError, match="1 files without any"):
        read(tmp_path)
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(InputError, match="1 files of other kinds"):
        read(tmp_path)
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # takes no room on the disk
    with pytest.raises(InputError, match="at most 1,073,741,824 bytes of text, got 1,073,741,825"):
        read(tmp_path)
