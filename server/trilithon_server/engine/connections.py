"""The leader's Unix socket: fronts that come and go, whole messages in, messages out without ever waiting for one."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
from collections.abc import Iterator
from pathlib import Path

from trilithon_server.engine.framing import FrameReader, FramingError, frame

_READ_BYTES = 1 << 18
MAX_UNREAD_BYTES = 256 << 20  # a front that has let this much pile up is stuck: it is cut off


class _Connection:
    def __init__(self, sock: socket.socket, number: int) -> None:
        self.socket = sock
        self.number = number
        self.reader = FrameReader()
        self.unsent = bytearray()


class Connections:
    """
    Args:
        path: where to listen; in a directory that only the owner may enter.
        greeting: sent to whoever connects, at once.
    """

    def __init__(self, path: Path, *, greeting: bytes) -> None:
        self._path = path
        self._greeting = frame(greeting)
        self._selector = selectors.DefaultSelector()
        self._open: dict[int, _Connection] = {}
        self._next = 0
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(16)
        self._selector.register(self._listener, selectors.EVENT_READ, None)

    @property
    def numbers(self) -> list[int]:
        """Who is connected, in order of arrival."""
        return list(self._open)

    def watch(self, fd: int) -> None:
        """Let this descriptor end a `poll` too; its bytes are the caller's business."""
        self._selector.register(fd, selectors.EVENT_READ, fd)

    def poll(self, timeout_s: float) -> Iterator[tuple[int, bytes | None]]:
        """(connection, message) for all that has arrived, (connection, None) for who has gone."""
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.data, _Connection):
                connection = key.data
                if events & selectors.EVENT_WRITE and not self._flush(connection):
                    yield connection.number, None
                elif events & selectors.EVENT_READ:
                    yield from self._read(connection)

    def send(self, number: int, message: bytes) -> bool:
        """Queue a message and send what the socket takes; False when that front is gone or stuck."""
        connection = self._open.get(number)
        if connection is None:
            return False
        connection.unsent += frame(message)
        if len(connection.unsent) > MAX_UNREAD_BYTES:
            self._drop(connection)
            return False
        return self._flush(connection)

    @property
    def all_sent(self) -> bool:
        """Whether nothing waits to be sent."""
        return not any(connection.unsent for connection in self._open.values())

    def close(self) -> None:
        """Close everything and remove the socket."""
        for connection in list(self._open.values()):
            self._drop(connection)
        self._selector.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            sock, _address = self._listener.accept()
            sock.setblocking(False)
            connection = _Connection(sock, self._next)
            self._next += 1
            self._open[connection.number] = connection
            self._selector.register(sock, selectors.EVENT_READ, connection)
            connection.unsent += self._greeting
            self._flush(connection)

    def _read(self, connection: _Connection) -> Iterator[tuple[int, bytes | None]]:
        try:
            data = connection.socket.recv(_READ_BYTES)
            messages = connection.reader.feed(data)
        except BlockingIOError:
            return
        except (OSError, FramingError):
            data, messages = b"", []
        for message in messages:
            yield connection.number, message
        if not data:
            self._drop(connection)
            yield connection.number, None

    def _flush(self, connection: _Connection) -> bool:
        try:
            if connection.unsent:
                sent = connection.socket.send(connection.unsent)
                del connection.unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)
            return False
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
        self._selector.modify(connection.socket, events, connection)
        return True

    def _drop(self, connection: _Connection) -> None:
        if self._open.pop(connection.number, None) is not None:
            self._selector.unregister(connection.socket)
            connection.socket.close()
