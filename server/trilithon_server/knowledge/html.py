"""
Pages in, title and clean text out: what a reader would read, without navigation, scripts and cookie bars.

A page comes from a stranger. Neither the parser nor the extraction can be stopped once they run, so what they are given
is bounded first: a pass that builds no tree counts depth, elements and attributes as the parser itself sees them. (A
tree of one tag with 100,000 attributes takes half a minute to build, counting them a tenth of a second.) Within the
limits the slowest page that we could think of takes three seconds on one core. Nothing is fetched, no date is looked
for, and compressed bytes are not expanded.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lxml import etree
from lxml import html as lxml_html

from trilithon.errors import InvalidArgument, Violation


@dataclass(frozen=True, slots=True)
class PageLimits:
    """
    What a page may be.

    Attributes:
        bytes: of the page as it came; of one that came as a string, of its UTF-8.
        depth: of nested elements, the root counted; browsers' own pages stay below 50.
        elements: in all; they bound the time that the extraction takes.
        attributes: of one element.
    """

    bytes: int = 2 << 20
    depth: int = 100
    elements: int = 20_000
    attributes: int = 256


LIMITS = PageLimits()


@dataclass(frozen=True, slots=True)
class Page:
    """
    What a page says.

    Attributes:
        title: one line; empty where the page has none.
        text: paragraphs, list items and headings with an empty line between two; empty where there is nothing to read.
    """

    title: str
    text: str


def read_html(content: bytes | str, *, charset: str = "", field: str = "html", limits: PageLimits = LIMITS) -> Page:
    """
    Title and text of an html page, broken or not.

    >>> read_html("<title>A mill</title><body><p>It stands on the river.</p>")
    Page(title='A mill', text='It stands on the river.')

    Args:
        content: bytes are decoded as `decode` says.
        charset: that the page was delivered with, if any.
        field: what the caller calls the page, for messages.
    Raises:
        InvalidArgument: `document_too_large`, `document_too_complex`, or `document_not_text`.
    """
    text = _checked(content, charset, field, limits)
    if not text.strip():
        return Page("", "")
    data = text.encode()
    _count(data, field, limits)
    try:
        tree = lxml_html.document_fromstring(data, parser=_parser())
    except etree.ParserError:
        return Page("", "")  # nothing but comments
    title = tree.findtext(".//title") or tree.findtext(".//h1") or ""
    return Page(" ".join(title.split()), _extract(tree))


def read_text(content: bytes | str, *, charset: str = "", field: str = "text", limits: PageLimits = LIMITS) -> Page:
    """
    A plain text as a page without a title: the text as it is, with `\\n` for every line end.

    Raises:
        InvalidArgument: `document_too_large` or `document_not_text`.
    """
    text = _checked(content, charset, field, limits)
    return Page("", text.replace("\r\n", "\n").replace("\r", "\n"))


def decode(content: bytes, *, charset: str = "") -> str:
    """
    Text of bytes. The first that is there decides: a byte order mark, `charset`, a declaration in the first 1,024
    bytes, being UTF-8 throughout; else Latin-1 in its Windows form.

    Bytes that the deciding encoding lacks become U+FFFD: one broken byte doesn't make a whole page another language.
    A declared encoding that is unknown, or not one of `ENCODINGS`, decides nothing.

    Source: the order and the labels of the WHATWG encoding standard.
    """
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding, "replace")
    declared = _DECLARED.search(content[:_SNIFFED_BYTES])
    for label in (charset, declared.group(1).decode("ascii") if declared else ""):
        if encoding := _known(label):
            return content.decode(encoding, "replace")
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode(_LATIN_1, "replace")


ENCODINGS = re.compile(
    r"utf-8|cp125[0-8]|iso8859-(?:[2-8]|10|1[3-6])|koi8-[ru]|mac-roman|gbk|gb18030|big5|euc_jp|shift_jis|iso2022_jp|euc_kr"
)
"""What a page may declare, by Python's names: some of Python's others are slow, or no encodings."""

_LATIN_1 = "cp1252"
_AS_BROWSERS = {"iso8859-1": _LATIN_1, "ascii": _LATIN_1, "utf-16": "utf-8", "utf-16-le": "utf-8", "utf-16-be": "utf-8"}
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_SNIFFED_BYTES = 1024
_DECLARED = re.compile(
    rb"<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE
)
_BULLET = re.compile(r"^- ", re.MULTILINE)


def _known(label: str) -> str:
    """Python's name of a declared encoding; empty where it is none that a page may have."""
    try:
        name = codecs.lookup(label.strip()).name
    except (LookupError, ValueError):
        return ""
    name = _AS_BROWSERS.get(name, name)
    return name if ENCODINGS.fullmatch(name) else ""


def _checked(content: bytes | str, charset: str, field: str, limits: PageLimits) -> str:
    """The text of what came, if it is not too long and is a text."""
    given = len(content) if isinstance(content, bytes) else len(content.encode("utf-8", "surrogatepass"))
    if given > limits.bytes:
        raise _refusal(
            field, "document_too_large", "bytes", limits.bytes, given, "Give the part that matters, or several pages."
        )
    text = decode(content, charset=charset) if isinstance(content, bytes) else content.removeprefix("\ufeff")
    if (place := text.find("\0")) >= 0:
        message = (
            f"{field} must be text. Given: a NUL character at {place}, as images and archives have. Expand it first."
        )
        details = (Violation(field=field, code="document_not_text", message=message),)
        raise InvalidArgument(message, code="document_not_text", details=details)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a surrogate pair is no character


class _Counter:
    """The parser's target: told of each tag, keeps nothing but counts."""

    def __init__(self, field: str, limits: PageLimits) -> None:
        self._field, self._limits = field, limits
        self._depth = self._elements = 0

    def start(self, _tag: str, attributes: Mapping[str, str]) -> None:
        self._depth += 1
        self._elements += 1
        self._at_most("levels of nested elements", self._limits.depth, self._depth)
        self._at_most("elements", self._limits.elements, self._elements)
        self._at_most("attributes of one element", self._limits.attributes, len(attributes))

    def end(self, _tag: str) -> None:
        self._depth -= 1

    def data(self, _text: str) -> None:
        pass

    def close(self) -> None:
        pass

    def _at_most(self, what: str, limit: int, given: int) -> None:
        if given > limit:
            raise _refusal(
                self._field, "document_too_complex", what, limit, given, "Give its text, or the part that matters."
            )


def _count(data: bytes, field: str, limits: PageLimits) -> None:
    etree.fromstring(data, etree.HTMLParser(target=_Counter(field, limits), encoding="utf-8"))


def _refusal(field: str, code: str, what: str, limit: int, given: int, hint: str) -> InvalidArgument:
    message = f"{field} must have at most {limit:,} {what}. Given: {given:,}{'' if 'bytes' in what else ' or more'}."
    violation = Violation(field=field, code=code, message=message, rule="at most", limit=str(limit), given=str(given))
    return InvalidArgument(message, code=code, hint=hint, details=(violation,))


def _parser() -> Any:
    return lxml_html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, collect_ids=False)


def _extract(tree: Any) -> str:
    """What trafilatura keeps of a page where precision matters more than completeness."""
    # Takes half a second to import; servers without local knowledge never do.
    from trafilatura import bare_extraction

    found = bare_extraction(tree, favor_precision=True, include_comments=False, include_tables=False)
    text = getattr(found, "text", None) or ""
    lines = (" ".join(line.split()) for line in _BULLET.sub("", text).split("\n"))
    return "\n\n".join(line for line in lines if line)
