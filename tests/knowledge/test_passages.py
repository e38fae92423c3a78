"""Passages in files: read strictly, written and read back the same, cut from documents with stable ids."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trilithon.errors import InvalidArgument
from trilithon_server.knowledge import passages as module
from trilithon_server.knowledge.passages import (
    MAX_LINE_BYTES,
    Passage,
    check_passages,
    parse_passage,
    passage_line,
    passages_of,
    read_passages,
    write_passages,
)

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
PASSAGES = st.lists(
    st.builds(
        Passage,
        id=st.text("abc:/ \u00e9", min_size=1, max_size=8),
        title=TEXT,
        text=TEXT.filter(lambda text: bool(text.strip())),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda passage: passage.id,
)


@given(PASSAGES)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, passages: list[Passage]) -> None:
    """Any passages come back the same, and the offsets tell each line; U+2028 and its like end no line."""
    path = tmp_path_factory.mktemp("passages") / "p.jsonl"
    offsets = write_passages(path, passages)
    content = path.read_bytes()

    assert read_passages(path) == passages
    assert [parse_passage(content[a:b]) for a, b in itertools.pairwise(offsets)] == passages
    assert offsets[-1] == len(content)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"id": "a", "title": "", "text": ', "must be JSON. Given: Expecting value at line 1, column 34."),
        ('["a"]', 'must be a JSON object. Given: ["a"].'),
        ('{"id": "a", "id": "b", "title": "", "text": "x"}', 'the key "id" must come once. Given: twice.'),
        ('{"id": "a", "text": "x"}', 'must have the field "title". Given: "id", "text".'),
        (
            '{"id": "a", "title": "", "text": "x", "txt": 1}',
            'must not have the field "txt". Allowed: id, title, text. Did you mean "text"?',
        ),
        ('{"id": 7, "title": "", "text": "x"}', "id must be a string. Given: 7."),
        ('{"id": "a", "title": null, "text": "x"}', "title must be a string. Given: null."),
        ('{"id": "", "title": "", "text": "x"}', 'id must have 1 to 256 bytes, all printable. Given: "".'),
        ('{"id": "a\\n", "title": "", "text": "x"}', 'all printable. Given: "a\\n".'),
        ('{"id": "a", "title": "", "text": " \\n"}', "text must not be blank."),
        ('{"id": "a", "title": "", "text": "\\ud800"}', "text must be Unicode text."),
        ('{"id": "a", "title": "", "text": "x\\u0000"}', "text must be Unicode text."),
        ('{"id": "a", "title": "", "text": NaN}', "numbers must be finite. Given: NaN."),
        ("", "must be JSON. Given: Expecting value at line 1, column 1."),
    ],
)
def test_a_malformed_line_is_named(line: str, says: str, tmp_path: Path) -> None:
    """File, line, rule and value; nothing is skipped."""
    path = tmp_path / "p.jsonl"
    path.write_text(passage_line(Passage("first", "", "x")).decode() + line + "\n")
    with pytest.raises(InvalidArgument) as caught:
        read_passages(path)

    assert caught.value.code == "passages_invalid"
    assert caught.value.message.startswith("p.jsonl:2 ")
    assert says in caught.value.message


def test_all_findings_are_said_at_once(tmp_path: Path) -> None:
    """A repeated id names both lines; of many findings the first are listed and the others counted."""
    path = tmp_path / "p.jsonl"
    good = passage_line(Passage("a", "", "x"))
    path.write_bytes(good + b"{}\n" + good + b"\xff\n" + b"[]\n" * 30)
    with pytest.raises(InvalidArgument) as caught:
        read_passages(path)

    lines = caught.value.message.split("\n")
    assert lines[0] == 'p.jsonl:2 must have the field "id". Given: no field.'
    assert lines[1] == 'p.jsonl:3 id must not repeat. Given: "a", as in p.jsonl:1.'
    assert lines[2] == "p.jsonl:4 must be UTF-8. Given: byte 0 is not."
    assert lines[-1] == "... and 13 more."


def test_R11_findings_are_counted_not_kept(tmp_path: Path) -> None:
    """A file of nothing but newlines is told in as little memory as one with twenty of them."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n" * 20_000)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument, match=r"\.\.\. and 19980 more\.$"):
            read_passages(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 500_000


def test_R11_a_file_with_too_many_lines_is_not_read_to_its_end(tmp_path: Path) -> None:
    """What is behind the last that may be is not looked at: it would be a finding, too."""
    path = tmp_path / "p.jsonl"
    lines = [passage_line(Passage(f"p{i}", "", "x")) for i in range(3)]
    path.write_bytes(b"".join(lines))
    assert len(read_passages(path, most=3)) == 3
    path.write_bytes(b"".join([*lines, b"\n" * 10]))
    with pytest.raises(InvalidArgument) as caught:
        read_passages(path, name="file-1", most=3)

    assert caught.value.code == "passages_invalid"
    assert caught.value.message == "file-1 must hold at most 3 passages. Given: more lines. Make several files."


def test_a_line_without_end_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line over the limit is refused, and reading goes on behind it."""
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 100)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b" " * 250 + b"\n" + passage_line(Passage("a", "", "x")) + passage_line(Passage("a", "", "y")))
    with pytest.raises(InvalidArgument) as caught:
        read_passages(path)

    assert caught.value.message.split("\n") == [
        "p.jsonl:1 must have at most 100 bytes.",
        'p.jsonl:3 id must not repeat. Given: "a", as in p.jsonl:2.',
    ]
    assert MAX_LINE_BYTES == 64 << 10


@pytest.mark.parametrize("char", ["x", "\u00e9", "\U0001f600", "\x01", "\n", '"', "\u2028"])
def test_R11_a_passage_that_could_not_be_read_again_is_refused(char: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes count as they are written: the longest line that is accepted is read, one more character is refused."""
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 200)
    empty, size = len(passage_line(Passage("a", "", "."))), len(passage_line(Passage("a", "", "." + char)))
    fits = (200 - empty) // (size - empty)
    longest = Passage("a", "", "." + char * fits)
    check_passages([longest])
    with pytest.raises(InvalidArgument, match=r"passages\[0\] must have at most 200 bytes as JSON"):
        check_passages([Passage("a", "", "." + char * (fits + 1))])

    assert parse_passage(passage_line(longest)) == longest


def test_no_passage_is_no_index(tmp_path: Path) -> None:
    """An empty file, and an empty list."""
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"")
    with pytest.raises(InvalidArgument, match=r"p\.jsonl must hold at least one passage"):
        read_passages(path)
    with pytest.raises(InvalidArgument, match="an index must hold at least one passage"):
        check_passages([])


def test_passages_made_in_memory_are_checked_alike() -> None:
    """What a file may not hold, a list may not either."""
    with pytest.raises(InvalidArgument) as caught:
        check_passages([Passage("a", "", "x"), Passage("a", "", "y"), Passage("b", "", "")])

    assert caught.value.message.split("\n") == [
        'passages[1] id must not repeat. Given: "a", as in passages[0].',
        "passages[2] text must not be blank.",
    ]


@example({"a": 11, "a1": 1})
@given(st.dictionaries(st.text("a1:", min_size=1, max_size=3), st.integers(0, 12), max_size=5))
def test_ids_are_stable_and_never_shared(sizes: dict[str, int]) -> None:
    """
    The pieces of different documents have different ids, whatever the documents are called; the same anew each time.

    Inverse check: seen to fail without the colon, when piece 10 of `a` is piece 0 of `a1`.
    """
    made = [piece for name, size in sizes.items() for piece in passages_of(name, "T", "word " * size, words=1)]
    again = [piece for name, size in sizes.items() for piece in passages_of(name, "T", "word " * size, words=1)]

    assert len(made) == sum(sizes.values())
    assert len({piece.id for piece in made}) == len(made)
    assert made == again
    assert all((piece.title, piece.text) == ("T", "word") for piece in made)


def test_a_line_is_plain_json() -> None:
    """Other readers read it: one object, UTF-8, the text as it is."""
    line = passage_line(Passage("a", "T", "caf\u00e9 \u2028 x"))

    assert json.loads(line) == {"id": "a", "title": "T", "text": "caf\u00e9 \u2028 x"}
    assert line.count(b"\n") == 1
