"""Ports of 127.0.0.1 for servers that are started a moment later."""

from __future__ import annotations

import itertools
import os
import socket

FIRST, COUNT = 12_000, 20_000
"""Below what Linux gives to sockets that ask for any port (from 32768 on): nobody comes in between by chance."""

_steps = itertools.count(os.getpid() * 613)


def free_port() -> int:
    """A port that nobody listens on; every call of a process another one, and each process begins elsewhere."""
    while True:
        port = FIRST + next(_steps) % COUNT
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
