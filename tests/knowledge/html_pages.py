"""Ten pages in our own words, each with what a reader would take from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A page and its sentences."""

    name: str
    html: bytes
    title: str
    sentences: tuple[str, ...]


_MILL = (
    "The mill has stood by the river since 1820.",
    "It ground flour for the three villages of the valley.",
    "In 1954 the wheel was stopped, and the building became a museum.",
)
_ARTICLE = f"<main><h1>The river mill</h1><p>{_MILL[0]} {_MILL[1]}</p><p>{_MILL[2]}</p></main>"


def _page(body: str, *, head: str = "<title>The river mill</title>") -> bytes:
    return f"<!doctype html><html><head><meta charset='utf-8'>{head}</head><body>{body}</body></html>".encode()


PAGES = (
    Case(
        "navigation",
        _page(
            "<nav><ul><li><a href='/'>Home page of the valley museums</a></li>"
            "<li><a href='/about'>About us and our work here</a></li></ul></nav>"
            f"{_ARTICLE}<footer><p>Copyright 2020 The Mill Trust. All rights reserved.</p></footer>"
        ),
        "The river mill",
        _MILL,
    ),
    Case(
        "cookie bar",
        _page(
            "<div><p>We use cookies to make this site work for you.</p></div>"
            f"{_ARTICLE}<p>You can change your cookie settings here at any time.</p>"
        ),
        "The river mill",
        _MILL,
    ),
    Case(
        "script and style",
        _page(
            f"<script>var s = 'The script says <b>nothing at all</b> to a reader.';</script>{_ARTICLE}"
            "<style>p { color: red; } /* Nobody reads what a style sheet says. */</style>"
            "<!-- A comment is not for readers, whatever it may say here. -->"
        ),
        "The river mill",
        _MILL,
    ),
    Case(
        "anchors",
        _page(
            "<article><h2><a name='wheel'></a>The wheel</h2>"
            "<p>The wheel is made of <a href='#oak'>oak and iron</a>, as the records <a href='#r1'>say</a>.[1]</p>"
            "<h2 id='oak'>The wood</h2><p>The oak was cut in the forest above the mill.</p></article>"
        ),
        "The river mill",
        ("The wheel is made of oak and iron, as the records say.[1]", "The oak was cut in the forest above the mill."),
    ),
    Case(
        "Latin-1 as declared",
        "<html><head><meta http-equiv='Content-Type' content='text/html; charset=iso-8859-1'>"
        "<title>Caf\u00e9</title></head><body><main>"
        "<p>The caf\u00e9 in the old mill opens at nine o\u2019clock.</p></main></body></html>".encode("cp1252"),
        "Caf\u00e9",
        ("The caf\u00e9 in the old mill opens at nine o\u2019clock.",),
    ),
    Case(
        "Latin-1 undeclared",
        "<html><head><title>M\u00fchle</title></head><body><main>"
        "<p>The M\u00fchle was built by a family from Z\u00fcrich.</p></main></body></html>".encode("latin-1"),
        "M\u00fchle",
        ("The M\u00fchle was built by a family from Z\u00fcrich.",),
    ),
    Case("empty body", _page(""), "The river mill", ()),
    Case("no body", b"<html><head><title>The river mill</title></head></html>", "The river mill", ()),
    Case(
        "tags that never close",
        b"<title>The river mill</title><body><div><p>Dr. Hale of the <b>U.S. Mill Trust keeps the keys."
        b"<p>Visitors may turn the small wheel by hand.<div><p>Bread is baked here every Sunday morning.",
        "The river mill",
        (
            "Dr. Hale of the U.S. Mill Trust keeps the keys.",
            "Visitors may turn the small wheel by hand.",
            "Bread is baked here every Sunday morning.",
        ),
    ),
    Case(
        "repetitions and scraps",
        _page(
            f"<main><h1>The mill that has stood by the river</h1><p>{_MILL[0]}</p><p>Open daily.</p>"
            f"<p>{_MILL[0]}</p><p>{_MILL[1]} {'and so on ' * 30}</p><p>{_MILL[2]}</p></main>",
            head="<title>The mill that has stood by the river</title>",
        ),
        "The mill that has stood by the river",
        (_MILL[0], _MILL[2]),
    ),
)

SMALL_BOMBS = {
    "nested blocks": ("<div>" * 100_000, "document_too_complex"),
    "nested tables": ("<table><tr><td>" * 30_000, "document_too_complex"),
    "many elements": ("<p>A word." * 60_000, "document_too_complex"),
    "attributes": ("<p " + " ".join(f"a{i}=1" for i in range(80_000)) + ">", "document_too_complex"),
    "an archive": ("<p>PK\x03\x04\x00\x00</p>", "document_not_text"),
    "a megabyte": ("<p>A word.</p>" * 90_000, "invalid_value"),
}
"""Pages that a request has room for, or just not, and the code of their refusal."""

ENTITIES = (
    "<!DOCTYPE html [<!ENTITY e0 'The wheel was stopped for good that year.'>"
    + "".join(f"<!ENTITY e{n} '{f'&e{n - 1};' * 10}'>" for n in range(1, 10))
    + "]><html><head><title>The river mill</title></head><body><p>The mill has stood by the river since 1820.</p>"
    "<p>&e9;</p></body></html>"
)
"""Ten to the ninth sentences for a parser that expands what a page declares; no page of html may."""
