"""Log lines: one event a line, in both forms, whatever a value holds."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from trilithon_server import logs

HOSTILE = 'x\n{"event": "forged"}\r\x1b[2J\x1b]0;title\x07\u2028\x00'


@pytest.fixture(autouse=True)
def _restore_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_carry_context_and_fields() -> None:
    """A line is one object with time, level, event, the process's own fields and the event's."""
    out = io.StringIO()
    logs.configure(log_format="json", stream=out, process="front")

    logs.log_request(request_id="req_1", route="/v1/completions", code="ok", prompt_tokens=3, finish_reason=None)

    line = json.loads(out.getvalue())
    assert {
        "level": "info",
        "event": "request",
        "process": "front",
        "request_id": "req_1",
        "prompt_tokens": 3,
    }.items() <= (line.items())
    assert "finish_reason" not in line
    assert line["ts"].endswith("Z")


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_S7_a_value_cannot_forge_a_line_or_paint_the_terminal(log_format: logs.LogFormat) -> None:
    """
    Newlines, escapes and NUL in a value, an event name or an exception stay inside one harmless line.

    Inverse seen: with `escape` returning its input the text case has several lines and a raw escape byte.
    """
    out = io.StringIO()
    logs.configure(log_format=log_format, stream=out)

    logging.getLogger("x").warning(HOSTILE, extra={"request_id": HOSTILE})

    text = out.getvalue()
    assert text.count("\n") == 1
    assert text.isascii() if log_format == "json" else text.rstrip("\n").isprintable()
    assert not set("\r\x1b\x07\x00\u2028") & set(text)


def test_auto_is_json_away_from_a_terminal() -> None:
    """Colours and columns are for people; a pipe gets JSON."""
    assert logs.resolve_format("auto", io.StringIO()) == "json"
    assert logs.resolve_format("text", io.StringIO()) == "text"
