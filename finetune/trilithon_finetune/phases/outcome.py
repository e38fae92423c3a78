"""What a phase leaves behind: one file that says how it ended, and lines of what happened. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trilithon_finetune.errors import JobError

EVENTS_FILE = "events.jsonl"


def write_outcome(path: Path, *, data: Mapping[str, Any] | None = None, error: JobError | None = None) -> None:
    """Write how a phase ended, whole or not at all."""
    failed = {} if error is None else {"error": error.to_json()}
    write_json(path, {"ok": error is None, "data": dict(data or {}), **failed})


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class Events:
    """Lines of what happened in an attempt, for whoever reads along; a line is in the file when `tell` returns."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / EVENTS_FILE

    def tell(
        self,
        kind: str,
        message: str,
        *,
        level: Literal["info", "warn", "error"] = "info",
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Append an event. Several processes of one attempt may: each line is one write."""
        line = json.dumps({"kind": kind, "level": level, "message": message, "data": dict(data or {})})
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(fd, f"{line}\n".encode())
        finally:
            os.close(fd)
