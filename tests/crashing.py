"""Clients that vanish at random moments, and what must be true of the server afterwards."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from front_server import ACME, MODEL, Front

WAIT_S = 30.0


def poll(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that must come true soon."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        threading.Event().wait(0.02)


def assert_blocks_are_free(front: Front) -> None:
    """Once nothing runs, no block is held, and none is lost: free + cached + in use = total."""
    poll(lambda: front.engine()["running"] == 0 and front.engine()["waiting"] == 0, "requests still run")
    front.generate(prompt="x", max_tokens=1)  # a step's statistics tell what is held after it
    state = front.engine()
    assert state["kv_blocks_in_use"] <= 1, state


def total_blocks(front: Front) -> int:
    state = front.engine()
    return int(state["kv_blocks_free"] + state["kv_blocks_cached"] + state["kv_blocks_in_use"])


def raw_request(rng: random.Random, port: int) -> bytes:
    """A random request as it goes over the wire: chat or completion, streamed or plain, of several sizes."""
    chat = rng.random() < 0.3
    body: dict[str, Any] = {"model": MODEL, "max_tokens": rng.choice([1, 40, 300]), "ignore_eos": True}
    body["stream"] = rng.random() < 0.5
    body["n"] = rng.choice([1, 1, 3])
    text = "word " * rng.choice([1, 20, 90])
    if chat:
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = [text, "b"] if rng.random() < 0.3 else text
    if rng.random() < 0.2:
        body["beam_width"] = rng.choice([3, 5])
    if rng.random() < 0.2:
        body["constraint"] = {"regex": "[a-z ]+"}
    raw = json.dumps(body).encode()
    path = "/v1/chat/completions" if chat else "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {ACME}\r\ncontent-length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


def crashing_client(front: Front, rng: random.Random) -> None:
    """Send a request, or part of one, and vanish: at once, while queued, in prefill, or in the middle of the answer."""
    raw = raw_request(rng, front.server.http_port)
    with socket.create_connection(("127.0.0.1", front.server.http_port)) as connection:
        connection.sendall(raw[: rng.randrange(1, len(raw))] if rng.random() < 0.1 else raw)
        connection.settimeout(rng.choice([0.001, 0.02, 0.1, 0.3]))
        try:
            for _ in range(rng.choice([0, 1, 5])):
                if not connection.recv(4096):
                    return
        except TimeoutError:
            pass
        if rng.random() < 0.5:  # reset rather than a clean close
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
