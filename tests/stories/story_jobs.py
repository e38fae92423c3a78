"""Stories and facts that jobs label and learn from: what tests of such jobs share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune_jobs import JobDir, make_job, write_rows

STORIES: list[dict[str, Any]] = [
    {"sentences": ["The miller had a dog.", "The dog saw a boat.", "It is so.", "A lamp was in the boat."]},
    {"sentences": ["A boat was late.", "It was the dog.", "This is the boat."], "title": "Late"},
    {"sentences": ["The dog slept.", "A lamp fell into the boat."]},
]
HELD_OUT: list[dict[str, Any]] = [
    {"sentences": ["The lamp was out.", "The dog ran to the boat."]},
    {"sentences": ["A dog came.", "It saw a boat."]},
]
PLACES = ("river", "sea", "lake", "hill", "yard", "barn", "road", "field", "town", "farm", "mill", "shore")
SMALL: dict[str, Any] = {"data": {"max_tokens": 96}, "training": {"batch_size": 4, "epochs": 1}}


def with_many_facts(concepts: Path, folder: Path) -> Path:
    """A copy of a folder of facts with more of them than fit a sentence."""
    shutil.copytree(concepts, folder)
    more = [f"AtLocation\t{thing}\t{place}\n" for thing in ("boat", "dog") for place in PLACES]
    (folder / "more.tsv").write_text("".join(more))
    return folder


def a_job(
    folder: Path, model: Path, concepts: Path, encoder: Path, task: str, *, lr: float = 1e-3, **options: Any
) -> JobDir:
    """A job over plain rows that names its sources, where a worker has found them."""
    folder.mkdir()
    train, valid = write_rows(folder / "t.jsonl", STORIES), write_rows(folder / "v.jsonl", HELD_OUT)
    named = {"concepts": "village", "encoder": "minilm"}
    made = make_job(folder, model, train, valid, task=task, options={**named, **options}, optimizer={"lr": lr}, **SMALL)
    made.change({"concepts_path": str(concepts), "encoder_dir": str(encoder)})
    return made
