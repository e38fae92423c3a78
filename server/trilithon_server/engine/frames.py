"""
The frames between a front and a leader: 4 bytes of length, big-endian, then one protobuf message.
"""

from __future__ import annotations

import asyncio

from google.protobuf.message import DecodeError

from trilithon_server.engine import wire_pb2 as wire

MAX_FRAME_BYTES = 64 << 20


def encode_frame(message: wire.ToEngine | wire.FromEngine) -> bytes:
    """A message as it travels: 4 bytes of length, big-endian, then the message."""
    body = message.SerializeToString()
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame must have at most {MAX_FRAME_BYTES} bytes. Given: {len(body)}.")
    return len(body).to_bytes(4, "big") + body


async def read_frame(reader: asyncio.StreamReader) -> wire.FromEngine:
    """
    Read one message.

    Raises:
        asyncio.IncompleteReadError: the other side closed.
        ValueError: a frame above 64 MiB, or bytes that are no message.
    """
    length = int.from_bytes(await reader.readexactly(4), "big")
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame must have at most {MAX_FRAME_BYTES} bytes. Given: {length}.")
    body = await reader.readexactly(length)
    try:
        return wire.FromEngine.FromString(body)
    except DecodeError as error:
        raise ValueError(f"not a message of the engine: {error}") from None
