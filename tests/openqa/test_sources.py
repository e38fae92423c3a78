"""Documents on their way to passages, which repeat their ids and titles: what may come, and how many are made of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trilithon.errors import InvalidArgument
from trilithon_server import index_builds
from trilithon_server.knowledge import passages as passages_module
from trilithon_server.knowledge.local import Document
from trilithon_server.knowledge.passages import MAX_ID_BYTES, Passage, check_passages, write_passages
from trilithon_server.retrieval import MAX_CUT, MAX_DOCUMENT_ID_BYTES, MAX_TITLE_CHARS, check_sources, cut_documents
from trilithon_server.validation import Violations


def found(document: Document) -> list[str]:
    """The fields that are wrong with a document."""
    violations = Violations()
    check_sources("documents", [document], violations)
    try:
        violations.raise_if_any()
    except InvalidArgument as error:
        return [detail.field for detail in error.details]
    return []


@pytest.mark.parametrize(
    ("document", "field"),
    [
        (Document(id="i" * (MAX_DOCUMENT_ID_BYTES + 1), text="x"), "id"),
        (Document(id="\u00e9" * (MAX_DOCUMENT_ID_BYTES // 2 + 1), text="x"), "id"),
        (Document(id="a\nb", text="x"), "id"),
        (Document(id="a\0b", text="x"), "id"),
        (Document(id="a\ud800", text="x"), "id"),
        (Document(id="a", text="x", title="t" * (MAX_TITLE_CHARS + 1)), "title"),
        (Document(id="a", text="x", title="t\ud800"), "title"),
    ],
)
def test_R11_what_no_passage_may_be_called_is_refused_before_it_is_cut(document: Document, field: str) -> None:
    """Too long an id or title would be copied into each passage, and half a character is no text for an encoder."""
    assert set(found(document)) == {f"documents[0].{field}"}


def test_the_longest_names_are_names_of_passages() -> None:
    """An id has room for the number of the last passage."""
    document = Document(id="i" * MAX_DOCUMENT_ID_BYTES, title="t" * MAX_TITLE_CHARS, text="a\n\n" * MAX_CUT)
    passages = cut_documents([document])
    check_passages(passages)

    assert found(document) == []
    assert len(passages) == MAX_CUT
    assert len(passages[-1].id) == MAX_ID_BYTES


def test_R11_more_passages_than_may_be_are_refused_while_they_are_cut() -> None:
    """The sum over documents counts, and what comes behind is not looked at: this page would be refused, too."""
    most = Document(id="a", text="a\n\n" * MAX_CUT)
    more = [most, Document(id="b", text="b"), Document(id="c", text="\0")]
    with pytest.raises(InvalidArgument, match=r"at most 16,384 passages. Given: more, in documents\[1\]") as refused:
        cut_documents(more)

    assert refused.value.code == "passages_invalid"


def test_a_page_s_own_title_is_cut() -> None:
    """It is a stranger's, and no reason to refuse the page."""
    (passage,) = cut_documents([Document(id="a", html=f"<title>{'t ' * 5000}</title><body><p>A mill stands here.</p>")])

    assert passage.title == ("t " * 5000)[:MAX_TITLE_CHARS]
    assert passage.text == "A mill stands here."


def test_R11_a_passage_that_no_index_can_hold_is_refused_as_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document may be one long word, or of characters that grow in JSON."""
    monkeypatch.setattr(passages_module, "MAX_LINE_BYTES", 600)
    long = [Document(id="good", text="a mill"), Document(id="long", text="word " + "\x01" * 100)]
    with pytest.raises(InvalidArgument, match=r"documents\[1\]: a passage must have at most 600 bytes as JSON"):
        cut_documents(long)

    check_passages(cut_documents([Document(id="good", text="word " + "x" * 500)]))


async def test_R11_a_build_reads_no_more_lines_than_an_index_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may be as large as an upload, and its passages lie in the server's memory."""
    monkeypatch.setattr(index_builds, "MAX_PASSAGES", 2)
    write_passages(tmp_path / "p", [Passage(f"p{i}", "", "x") for i in range(3)])

    async def find_file(_id: str, _tenant: str) -> Path:
        return tmp_path / "p"

    service: Any = SimpleNamespace(find_file=find_file)
    read = await index_builds._file_reader(service, "file-1", "acme")
    with pytest.raises(InvalidArgument, match="file-1 must hold at most 2 passages"):
        read()
