"""Server-sent events, read from bytes as they arrive."""

from __future__ import annotations


class SSEDecoder:
    r"""
    Splits a byte stream into (event, data) pairs.

    Lines end in LF, CRLF or CR and nothing else: JSON text may hold U+2028 and other characters at which
    `str.splitlines` would break a line.

    >>> SSEDecoder().feed(b'event: delta\ndata: {"text": "a"}\n\n: ping\n\ndata: [DONE]\n')
    [('delta', '{"text": "a"}')]

    Source: WHATWG HTML, section 9.2.6.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._event = ""
        self._data: list[str] = []

    def feed(self, received: bytes) -> list[tuple[str, str]]:
        """The events that these bytes complete."""
        buffer = self._rest + received
        # A CR at the very end may be the first half of a CRLF: wait for what follows.
        held_back = buffer.endswith(b"\r")
        text = buffer[:-1] if held_back else buffer
        lines = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + (b"\r" if held_back else b"")
        events = []
        for line in lines:
            event = self._take(line.decode("utf-8", "replace"))
            if event is not None:
                events.append(event)
        return events

    def _take(self, line: str) -> tuple[str, str] | None:
        if not line:
            event = (self._event, "\n".join(self._data)) if self._data else None
            self._event, self._data = "", []
            return event
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        return None
