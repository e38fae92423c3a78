"""Ids that sort by the time they were made and cannot be guessed: 9 characters of milliseconds, 11 of chance."""

from __future__ import annotations

import secrets
import string
import time
from typing import Literal

_ALPHABET = string.digits + string.ascii_lowercase
_TIME_LEN, _CHANCE_LEN = 9, 11  # 36**9 ms are 3,200 years; 36**11 are 57 bits


def new_id(kind: Literal["ftjob", "file"]) -> str:
    """
    A new id of that kind: `ftjob-` or `file-` and 20 characters of `[a-z0-9]`.

    >>> len(new_id("file"))
    25
    """
    milliseconds = time.time_ns() // 1_000_000
    head = [_ALPHABET[milliseconds // 36**place % 36] for place in reversed(range(_TIME_LEN))]
    return f"{kind}-{''.join(head)}{''.join(secrets.choice(_ALPHABET) for _ in range(_CHANCE_LEN))}"
