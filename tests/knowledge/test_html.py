"""Pages: what is read from them, which are refused, and in which encoding they are."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from knowledge.html_pages import PAGES, Case

from trilithon.errors import InvalidArgument
from trilithon_server.knowledge.html import LIMITS, Page, PageLimits, decode, read_html, read_text
from trilithon_server.knowledge.sentences import sentences_of

BOMBS = {
    "five megabytes": (b"<p>A word.</p>" * 400_000, "document_too_large"),
    "nested blocks": (b"<div>" * 400_000, "document_too_complex"),
    "nested marks": (b"<b><i>" * 300_000, "document_too_complex"),
    "nested tables": (b"<table><tr><td>" * 100_000, "document_too_complex"),
    "many elements": (b"<p>" * 600_000, "document_too_complex"),
    "attributes": (b"<p " + b" ".join(b"a%d=1" % i for i in range(200_000)) + b">", "document_too_complex"),
    "an archive": (gzip.compress(b"<div>" * 10_000_000), "document_not_text"),
}


@pytest.mark.parametrize("case", PAGES, ids=lambda case: case.name)
def test_acc_B03_pages_give_their_sentences(case: Case) -> None:
    """
    Ten pages give the title and the sentences that a reader would take from them, and nothing of what stands around.

    Inverse check: without the stop phrases the page with the cookie bar has a sentence more; with all text of a page
    the one with the navigation has.
    """
    page = read_html(case.html)
    sentences = sentences_of(page.text, document_id="d", title=page.title)

    assert page.title == case.title
    assert tuple(sentence.text for sentence in sentences) == case.sentences


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", BOMBS)
def test_acc_B03_bombs_are_refused(name: str) -> None:
    """
    Pages that are too large, or made to be slow, are refused before they are parsed, and the message says what is
    allowed; `benchmarks/knowledge.py` says how fast.

    Inverse check: without the pass that counts, the page of attributes takes longer than a minute.
    """
    read_html("<p>Loads what reading takes.</p>")
    content, code = BOMBS[name]
    with pytest.raises(InvalidArgument, match=r"^documents\[3\]\.html must ") as caught:
        read_html(content, field="documents[3].html")

    assert caught.value.code == code
    assert caught.value.param == "documents[3].html"


@pytest.mark.parametrize(
    ("limit", "html"),
    [
        ("bytes", "<p>1234</p>" + " " * 89),
        ("depth", "<html><body>" + "<div>" * 97 + "<p>A word.</p>"),
        ("elements", "<html><body>" + "<p>A word.</p>" * 98),
        ("attributes", "<p " + " ".join(f"a{i}=1" for i in range(100)) + ">A word.</p>"),
    ],
)
def test_a_page_at_a_limit_is_read_and_one_beyond_is_not(limit: str, html: str) -> None:
    """Each limit holds to the last byte, level, element and attribute, and is named."""
    at = PageLimits(**{"bytes": 1 << 20, "depth": 500, "elements": 500, "attributes": 500, limit: 100})
    below = PageLimits(**{"bytes": 1 << 20, "depth": 500, "elements": 500, "attributes": 500, limit: 99})
    read_html(html, limits=at)
    with pytest.raises(InvalidArgument, match=r"at most 99 .*Given: 100"):
        read_html(html, limits=below)


def test_depth_is_what_is_open_at_once() -> None:
    """Elements that follow each other do not add up to depth, closed or not."""
    html = "<p>One word more." * 150 + "<div>Two words.</div>" * 150

    assert "One word more." in read_html(html, limits=PageLimits(depth=5)).text


@pytest.mark.parametrize(
    ("content", "charset", "expected"),
    [
        ("\u00e9\u20ac".encode(), "", "\u00e9\u20ac"),
        (b"\xef\xbb\xbf\xc3\xa9", "iso-8859-1", "\u00e9"),
        ("\u00e9".encode("utf-16"), "", "\u00e9"),
        (b"\xfe\xff\x00\xe9", "", "\u00e9"),
        (b"\xe9\x80", "", "\u00e9\u20ac"),
        (b"\xe9", "koi8-r", "\u0418"),
        (b"<meta charset='windows-1251'>\xe9", "", "<meta charset='windows-1251'>\u0439"),
        (b"<meta charset='windows-1251'>\xe9", "iso-8859-15", "<meta charset='windows-1251'>\u00e9"),
        (b"<meta charset=utf-8>\xe9t\xc3\xa9", "", "<meta charset=utf-8>\ufffdt\u00e9"),
        (b"<meta charset=utf-16>\xc3\xa9", "", "<meta charset=utf-16>\u00e9"),
        (b"<meta charset=punycode>\xc3\xa9", "", "<meta charset=punycode>\u00e9"),
        (b"<meta charset=nonsense>\xe9", "rot13", "<meta charset=nonsense>\u00e9"),
        (b'<?xml version="1.0" encoding="iso-8859-15"?>\xa4', "", '<?xml version="1.0" encoding="iso-8859-15"?>\u20ac'),
    ],
    ids=[
        "UTF-8", "mark before charset", "UTF-16", "UTF-16 BE", "Latin-1 of Windows", "charset", "declared",
        "charset before declared", "broken UTF-8", "UTF-16 declared in ASCII", "no encoding of pages", "unknown",
        "XML",
    ],
)  # fmt: skip
def test_encodings(content: bytes, charset: str, expected: str) -> None:
    """Mark, charset, declaration, UTF-8 and Latin-1 decide in this order."""
    assert decode(content, charset=charset) == expected


def test_texts_are_kept_as_they_are() -> None:
    """A plain text is no page: what looks like a tag is text, line ends become one kind, and limits hold too."""
    assert read_text("a < b\r\n\r\n<p>c\rd") == Page("", "a < b\n\n<p>c\nd")
    assert read_text("\ufeffa \ud800 b".encode("utf-8", "surrogatepass")) == read_text("a \ufffd\ufffd\ufffd b")
    assert read_text("a \ud800 b") == Page("", "a \ufffd b")
    with pytest.raises(InvalidArgument, match=r"^text must have at most 2,097,152 bytes\. Given: 2,097,154\."):
        read_text("\u00e9" * ((LIMITS.bytes >> 1) + 1))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.sampled_from(["<p>", "</p>", "<div class='a'>", "</div>", "<table>", "<td>", "<!--", "-->", "<script>"])
        | st.sampled_from(
            ["</script>", "<br>", "&amp;", "&#0;", "<", ">", "<title>", "</title>", "<ul><li>", "A word. "]
        )
        | st.text(max_size=8),
        max_size=40,
    ).map("".join)
)
def test_whatever_comes_is_read_or_refused(html: str) -> None:
    """However broken a page is, it is read: one line of title, and lines of text with an empty one between two."""
    page = read_html(html.replace("\0", ""))

    assert "\n\n\n" not in page.text
    assert "\n" not in page.title
    assert all(line == " ".join(line.split()) for line in page.text.split("\n\n"))
