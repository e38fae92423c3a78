"""What a job's ranks printed, as it comes."""

from __future__ import annotations

import sys
import time

from trilithon.cli._finetune_doors import Door
from trilithon.cli._output import print_json, printable
from trilithon.errors import NotFound

POLL_S = 1.0
_OVERLAP_CHARS = 4096


def show(text: str, *, as_json: bool) -> None:
    """Print a log, its control characters spelt out."""
    if as_json:
        print_json({"text": text})
        return
    sys.stdout.write("".join(f"{printable(line)}\n" for line in text.splitlines()))
    sys.stdout.flush()


def follow(door: Door, job_id: str, *, attempt: int | None, rank: int) -> None:
    """Print what comes until the job is over; a new attempt begins a new log, unless one was asked for."""
    shown, number = "", attempt
    while True:
        job = door.get(job_id)
        if attempt is None and job.attempt != number:
            shown, number = "", job.attempt
        try:
            text = door.logs(job_id, attempt=number or None, rank=rank)
        except NotFound:
            if job.finished:
                raise
            text = ""  # nothing was printed yet
        lines = text[: text.rfind("\n") + 1] if not job.finished else text
        show(fresh(shown, lines), as_json=False)
        shown = lines or shown
        if job.finished or (attempt is not None and attempt < job.attempt):
            return
        time.sleep(POLL_S)


def fresh(before: str, now: str) -> str:
    """
    What is new in the end of a log, of which only so much is told at once.

    >>> fresh("a\\nb\\n", "b\\nc\\n")
    'c\\n'
    """
    if now.startswith(before):
        return now[len(before) :]
    tail = before[-_OVERLAP_CHARS:]
    while tail:
        at = now.find(tail)
        if at >= 0:
            return now[at + len(tail) :]
        tail = tail.partition("\n")[2]
    return now
