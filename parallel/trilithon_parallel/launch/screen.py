"""Where the output of several ranks becomes one."""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

_MAX_LINE_BYTES = 64 << 10  # a longer line is cut


class Screen:
    """
    Where the ranks' output goes: whole lines, with a prefix where they aren't rank 0's.

    On a terminal (`live`) rank 0 may draw: its bytes pass as they come, and it is told the terminal's size.
    """

    def __init__(self, output: BinaryIO, *, live: bool) -> None:
        self._output: BinaryIO | None = output  # None once nobody reads it any more
        self._live = live
        self._rests: dict[int, bytes] = {}

    def terminal_env(self) -> dict[str, str]:
        """What rank 0 must find in its environment to draw through our pipe; nothing where it may not."""
        if not self._live:
            return {}
        size = os.get_terminal_size(sys.stdout.fileno())
        return {
            "TTY_COMPATIBLE": "1",  # rich draws although it writes into a pipe
            "TTY_INTERACTIVE": "1",
            "COLUMNS": str(size.columns or 80),
            "LINES": str(size.lines or 25),
        }

    def take(self, rank: int, piece: bytes) -> None:
        """A piece of a rank's output, as it came."""
        if rank == 0 and self._live:
            self._write(piece)
            return
        *lines, rest = (self._rests.get(rank, b"") + piece).split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        self._rests[rank] = rest
        self._write(b"".join(_prefix(rank) + line + b"\n" for line in lines))

    def flush(self) -> None:
        """Write what ranks left without an end of line."""
        for rank, rest in sorted(self._rests.items()):
            self._write(_prefix(rank) + rest + b"\n" if rest else b"")
        self._rests.clear()

    def say(self, text: str) -> None:
        """A line of the launcher itself."""
        self._write(f"launch: {text}\n".encode())

    def _write(self, piece: bytes) -> None:
        if self._output is None or not piece:
            return
        try:
            self._output.write(piece)
            self._output.flush()
        except OSError:  # the reader has gone (a closed pipe or terminal): training goes on without one
            self._output = None


def _prefix(rank: int) -> bytes:
    return f"[rank {rank}] ".encode() if rank else b""
