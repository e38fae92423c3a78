"""
Log lines: JSON, or text for people. One event a line, whatever a client sent.

    {"ts": "2026-01-31T12:00:00.123Z", "level": "info", "event": "request", "request_id": "req_...", ...}

Code logs an event name with its fields: `log.info("rank_lost", extra={"rank": 1, "cause": "killed by SIGKILL"})`.
Newlines, terminal escapes and other control characters in values are escaped in both forms (bar S7), so no value can
forge a line or repaint a terminal. Prompts and answers are never logged.
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import sys
from typing import Any, Literal, TextIO

LogFormat = Literal["json", "text"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_COLOURS = {
    logging.DEBUG: "2",
    logging.INFO: "36",
    logging.WARNING: "33",
    logging.ERROR: "31",
    logging.CRITICAL: "31;1",
}
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")
_LOG_LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{3} ")
_access = logging.getLogger("trilithon.access")


def resolve_format(wanted: str, stream: TextIO | None = None) -> LogFormat:
    """What `auto` means here: text on a terminal, JSON lines elsewhere."""
    if wanted == "auto":
        return "text" if (stream or sys.stderr).isatty() else "json"
    return "json" if wanted == "json" else "text"


def configure(
    *,
    log_format: LogFormat,
    level: str = "info",
    stream: TextIO | None = None,
    colour: bool | None = None,
    **context: Any,
) -> None:
    """
    Send this process's log to `stream` (stderr by default).

    Args:
        log_format: json or text.
        level: debug, info, warning or error.
        colour: whether text is coloured; unset: on a terminal.
        context: fields that every line carries, for example `process="front"` or `rank=1, tp=1, pp=0`.
    """
    target = stream or sys.stderr
    handler = logging.StreamHandler(target)
    if log_format == "json":
        handler.setFormatter(JsonFormatter(context))
    else:
        handler.setFormatter(TextFormatter(context, colour=target.isatty() if colour is None else colour))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "grpc"):
        logger = logging.getLogger(noisy)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)


def log_request(*, request_id: str, **fields: Any) -> None:
    """
    The one line of a request, written at its end: sizes, timings and the outcome, never content.

    Args:
        request_id: as in the `x-request-id` header.
        fields: route, status, code, finish_reason, prompt_tokens, generated_tokens, total_ms ... None is left out.
    """
    kept = {name: value for name, value in fields.items() if value is not None}
    _access.info("request", extra={"request_id": request_id, **kept})


class JsonFormatter(logging.Formatter):
    """One JSON object a line, ASCII only."""

    def __init__(self, context: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._context = context or {}

    def format(self, record: logging.LogRecord) -> str:
        line = {"ts": _timestamp(record.created), "level": record.levelname.lower(), "event": record.getMessage()}
        line |= self._context | _fields(record)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


class TextFormatter(logging.Formatter):
    """`12:00:00.123 INFO  event  key=value ...`, coloured on a terminal; a traceback follows, indented."""

    def __init__(self, context: dict[str, Any] | None = None, *, colour: bool = False) -> None:
        super().__init__()
        self._context = context or {}
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname:<7}"
        if self._colour:
            level = f"\x1b[{_COLOURS.get(record.levelno, '0')}m{level}\x1b[0m"
        fields = self._context | _fields(record)
        rest = "".join(f"  {name}={escape(value)}" for name, value in fields.items())
        line = f"{_timestamp(record.created)[11:23]} {level} {escape(record.getMessage())}{rest}"
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            line += "".join(f"\n    | {escape(part)}" for part in trace.splitlines())
        return line


class ChildOutput:
    """
    Passes on what child processes print: log lines as they are, anything else (a library's print, a traceback) as a
    line that says which process it came from. Control characters are escaped; colours of our own log lines stay.
    """

    def __init__(self, log_format: LogFormat, stream: TextIO | None = None) -> None:
        self._format = log_format
        self._stream = stream or sys.stderr

    def write(self, process: str, line: str) -> None:
        """Write one line of `process`."""
        if self._format == "text":
            text = line if _LOG_LINE.match(line) else f"{process} | {line}"
            text = "".join(part if _COLOUR.fullmatch(part) else escape(part) for part in _COLOUR.split(text))
        elif line.startswith('{"ts": '):
            text = escape(line)
        else:
            now = datetime.datetime.now(datetime.UTC).timestamp()
            fields = {"ts": _timestamp(now), "level": "warning", "event": "output", "process": process, "line": line}
            text = json.dumps(fields, ensure_ascii=True)
        print(text, file=self._stream, flush=True)


def escape(value: object) -> str:
    r"""
    A value as one harmless piece of a text line: control characters and line ends are written as escapes.

    >>> print(escape("a\nb\x1b[31m"))
    a\nb\x1b[31m
    """
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def _timestamp(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"
