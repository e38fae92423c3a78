"""Messages on a byte stream: 4 bytes of big-endian length, then the message. No pickle, a hard size bound."""

from __future__ import annotations

import struct

MAX_FRAME_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct(">I")


class FramingError(ValueError):
    """The peer announced a frame beyond the bound: the stream can't be trusted any more."""


def frame(payload: bytes) -> bytes:
    """
    Put the length in front of a message.

    >>> frame(b"abc")
    b'\\x00\\x00\\x00\\x03abc'
    """
    if len(payload) > MAX_FRAME_BYTES:
        raise FramingError(f"a frame may hold at most {MAX_FRAME_BYTES} bytes. Given: {len(payload)}.")
    return _LENGTH.pack(len(payload)) + payload


class FrameReader:
    """
    Cut a byte stream back into messages, whatever the sizes it arrives in.

    >>> reader = FrameReader()
    >>> reader.feed(b"\\x00\\x00\\x00\\x02h")
    []
    >>> reader.feed(b"i\\x00\\x00\\x00\\x00")
    [b'hi', b'']
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Take what arrived; return every message that is now whole."""
        self._buffer += data
        messages: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise FramingError(f"a frame may hold at most {MAX_FRAME_BYTES} bytes. Given: {length}.")
            end = start + _LENGTH.size + length
            if end > len(self._buffer):
                break
            messages.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        if start:
            del self._buffer[:start]
        return messages
