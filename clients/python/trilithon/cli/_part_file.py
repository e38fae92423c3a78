"""What a long run has done so far, in a file beside its output: an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ResumeError(ValueError):
    """What is kept of an earlier run doesn't belong to this one."""


class PartFile:
    """
    Lines of JSON: the first says which run it is, each other is a piece that is done.

    Args:
        path: of the file.
        run: what decides the pieces besides the models. It must be that of the earlier run, if there was one.
        restart: leave an earlier run aside.
    Attributes:
        models: who does the work, by part; None before `begin` has been called for the first time.
        pieces: so far, in the order in which they were done.
    Raises:
        ResumeError: an earlier run was another one, or what it left is damaged.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], *, restart: bool) -> None:
        self.path, self._run = path, dict(run)
        self.models: dict[str, str] | None = None
        self.pieces: list[dict[str, Any]] = []
        if restart:
            path.unlink(missing_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        raw = self.path.read_bytes()
        # What stands behind the last line feed was cut off in the middle of a piece, perhaps of a character.
        end = raw.rfind(b"\n") + 1
        whole = [self._line(number, line) for number, line in enumerate(raw[:end].split(b"\n")[:-1], start=1)]
        if not whole:
            self.path.unlink()
            return
        head, *self.pieces = whole
        if {name: head.get(name) for name in self._run} != self._run:
            raise ResumeError(f"{self.path.name} was begun with another corpus or other settings. Add --restart.")
        self.models = head["models"]
        os.truncate(self.path, end)  # in place: a run that is killed here has lost nothing

    def _line(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError:  # UnicodeDecodeError, too
            found = None
        if not isinstance(found, dict):
            raise ResumeError(f"{self.path.name}:{number} is damaged. Take the line out, or add --restart.")
        return found

    def begin(self, models: Mapping[str, str]) -> None:
        """
        Hold the models against those of the earlier run; the first time, write them down.

        Raises:
            ResumeError: they are others.
        """
        if self.models is None:
            self._append({**self._run, "models": dict(models)})
            self.models = dict(models)
        elif self.models != models:
            was, now = ", ".join(self.models.values()), ", ".join(models.values())
            raise ResumeError(f"{self.path.name} was begun with other models: {was}. Now: {now}. Add --restart.")

    def add(self, piece: dict[str, Any]) -> None:
        """A piece is done."""
        self._append(piece)
        self.pieces.append(piece)

    def _append(self, document: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
