"""
A multipart upload, read as it arrives: the fields first, then the one file in pieces. Nothing is held whole.

`purpose` must stand before `file`, as every client of OpenAI's sends it: what a file is for decides whether it is read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from trilithon.errors import InvalidArgument
from trilithon_server.http.exchange import Exchange, UnsupportedMediaType
from trilithon_server.validation import invalid, shown

FIELDS = ("purpose", "sha256")
MAX_FIELD_BYTES = 1024
MAX_PARTS = 8
OVERHEAD_BYTES = 64 << 10
"""Of boundaries, part headers and fields, beside the file's own bytes."""


@dataclass
class _Part:
    """One part: its headers, and what of its data is not handed on yet."""

    headers: dict[str, str] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    name: str = ""
    filename: str | None = None
    ready: bool = False
    """Whether its headers are complete."""
    ended: bool = False


class _Parts:
    """The parts of a body, cut by a push parser into records that can be taken."""

    def __init__(self, boundary: bytes) -> None:
        self.parts: list[_Part] = []
        self.finished = False
        self._header_name, self._header_value = bytearray(), bytearray()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                "on_header_end": self._header,
                "on_headers_finished": self._headers,
                "on_part_data": lambda data, start, end: self.parts[-1].data.extend(data[start:end]),
                "on_part_end": self._end,
                "on_end": self._finish,
            },
        )

    def feed(self, piece: bytes) -> None:
        try:
            self._parser.write(piece)
        except FormParserError:
            raise _broken("it is not well formed") from None

    def _begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise _broken(f"it has more than {MAX_PARTS} parts")
        self.parts.append(_Part())

    def _header(self) -> None:
        name = self._header_name.decode("latin-1").lower()
        self.parts[-1].headers[name] = self._header_value.decode("latin-1")
        self._header_name.clear()
        self._header_value.clear()

    def _headers(self) -> None:
        part = self.parts[-1]
        kind, options = parse_options_header(part.headers.get("content-disposition"))
        if kind != b"form-data" or b"name" not in options:
            raise _broken("a part has no name")
        part.name = options[b"name"].decode("utf-8", "replace")
        filename = options.get(b"filename")
        part.filename = None if filename is None else filename.decode("utf-8", "replace")
        part.ready = True

    def _end(self) -> None:
        self.parts[-1].ended = True

    def _finish(self) -> None:
        self.finished = True


@dataclass(frozen=True)
class Upload:
    """What was sent: the fields before the file, the file's name, and its bytes, to be read once."""

    fields: dict[str, str]
    filename: str
    pieces: AsyncIterator[bytes]


async def read_upload(exchange: Exchange, *, max_file_bytes: int) -> Upload:
    """
    Read up to the file's first byte.

    Raises:
        UnsupportedMediaType: the body is not multipart/form-data.
        InvalidArgument: the body is broken, a field is unknown or missing, or the file comes first.
        BodyTooLarge: by its length, before a byte is read, or while it arrives.
    """
    media, options = parse_options_header(exchange.header(b"content-type"))
    if media != b"multipart/form-data" or not options.get(b"boundary"):
        raise UnsupportedMediaType(
            "the content-type header must be multipart/form-data with a boundary. "
            f"Given: {shown(media.decode('latin-1'))}.",
            code="unsupported_media_type",
        )
    try:
        parts = _Parts(options[b"boundary"])
    except FormParserError:
        raise _broken("its boundary is too long") from None
    source = exchange.pieces(max_file_bytes + OVERHEAD_BYTES)
    fields: dict[str, str] = {}
    taken = 0
    async for piece in source:
        parts.feed(piece)
        while taken < len(parts.parts) and parts.parts[taken].ready:
            part = parts.parts[taken]
            if part.name == "file":
                if part.filename is None:
                    raise invalid("file", "must be a file with a name", code="missing_parameter")
                return Upload(fields, part.filename, _file(part, parts, source))
            if len(part.data) > MAX_FIELD_BYTES:
                raise invalid(shown(part.name)[1:-1], f"must have at most {MAX_FIELD_BYTES} bytes")
            if not part.ended:
                break
            _take_field(part, fields)
            taken += 1
    raise invalid("file", "must be set", code="missing_parameter")


def _take_field(part: _Part, fields: dict[str, str]) -> None:
    if part.name not in FIELDS:
        known = ", ".join((*FIELDS, "file"))
        raise invalid(
            shown(part.name)[1:-1], "is not a field here", code="unknown_parameter", todo=f"Allowed: {known}."
        )
    if part.name in fields:
        raise invalid(part.name, "must come once", given="twice")
    fields[part.name] = part.data.decode("utf-8", "replace")


async def _file(part: _Part, parts: _Parts, source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The bytes of the file's part; what follows it must be the end of the body."""
    async with aclosing(source):  # type: ignore[type-var]  # an asynchronous generator
        while True:
            if part.data:
                yield bytes(part.data)
                part.data.clear()
            if part.ended:
                break
            piece = await anext(source, None)
            if piece is None:
                raise _broken("it ends within the file")
            parts.feed(piece)
        async for piece in source:
            parts.feed(piece)
    if parts.parts[-1] is not part:
        raise _broken("the file must be its last part")
    if not parts.finished:
        raise _broken("it lacks its closing boundary")


def _broken(why: str) -> InvalidArgument:
    return InvalidArgument(f"the body must be one multipart form. Given: {why}.", code="invalid_multipart")
