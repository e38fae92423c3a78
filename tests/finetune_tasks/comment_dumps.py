"""Dumps of comments as they are published, made up."""

from __future__ import annotations

import json
from typing import Any


def comment(number: int, parent: int | None, submission: str, author: str, **changes: Any) -> dict[str, Any]:
    """A line of a dump; `number` is its second, too."""
    return {
        "id": f"c{number}",
        "parent_id": f"t3_{submission}" if parent is None else f"t1_c{parent}",
        "link_id": f"t3_{submission}",
        "author": author,
        "body": f"words of number {number}",
        "score": 5,
        "created_utc": number,
        **changes,
    }


def dump(comments: list[dict[str, Any]]) -> bytes:
    """The file."""
    return "\n".join(map(json.dumps, comments)).encode()


def earlier() -> list[dict[str, Any]]:
    """A first submission in which ann and bob have met."""
    return [comment(0, None, "s0", "bob"), comment(1, 0, "s0", "ann"), comment(2, 1, "s0", "bob")]
