"""
Comment trees as conversations of actors: dumps of the Pushshift schema, one comment a line.

    comments -> those that may be turns -> paths from a submission to its last comment -> an actor of each path, with
    earlier paths of that actor from other submissions as references -> rows of the task `dialogue`

Everything that is left out is counted under its reason. The last fifth of the submissions, by time, is held out; so no
submission stands on both sides, and references are always older than what they are given for.

Source: arXiv 2005.06114, section 3; the rules on comments are those that DialoGPT (1911.00536) published.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

MIN_COMMENTS = 2
"""Of a submission."""
MIN_WORDS, MAX_WORDS = 2, 128
"""Of a turn."""
MAX_TURNS = 16
"""Of a path, its last ones."""
MAX_PATHS = 8
"""Of a submission: the longest ones."""
MAX_REFERENCES = 8
"""Of an actor: the newest ones."""
MIN_SCORE = 1
"""Of the turn that is learned last."""
HELD_OUT = 5
"""The last one of so many parts of the submissions is held out."""

_GONE = ("[deleted]", "[removed]", "")
_URL = re.compile(r"(?:https?://|www\.)\S+")
_CAPITALS = re.compile(r"\b[A-Z]{5,}\b")
_THRICE = re.compile(r"\b(\w+)(?:\W+\1\b){2}", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Comment:
    """One line of a dump; `parent` is a comment's id, empty where the submission is meant. `created` in seconds."""

    id: str
    parent: str
    submission: str
    author: str
    text: str
    score: int
    created: int


def comments_of(document: bytes, dropped: Counter[str]) -> list[Comment]:
    """
    The comments that may be turns, in the order of the file.

    Args:
        dropped: counts the others, under the reason.
    """
    found: dict[str, Comment] = {}
    for line in document.split(b"\n"):
        if not line.strip():
            continue
        comment = _read(line)
        if comment is None:
            dropped["lines that are no comments"] += 1
        elif (reason := _unfit(comment)) is not None:
            dropped[reason] += 1
        elif comment.id in found:
            dropped["comments that stand there twice"] += 1
        else:
            found[comment.id] = comment
    return list(found.values())


def _read(line: bytes) -> Comment | None:
    """None where the line is not JSON, or lacks a field."""
    try:
        row = json.loads(line)
        parent = str(row["parent_id"])
        return Comment(
            id=str(row["id"]),
            parent=parent.removeprefix("t1_") if parent.startswith("t1_") else "",
            submission=str(row["link_id"]).removeprefix("t3_"),
            author=str(row["author"]),
            text=str(row["body"]).strip(),
            score=int(row["score"]),
            created=int(row["created_utc"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _unfit(comment: Comment) -> str | None:
    """Why a comment is no turn of any conversation."""
    if comment.author in _GONE or comment.text in _GONE:
        return "comments that were deleted"
    if any(line.lstrip().startswith((">", "&gt;")) for line in comment.text.split("\n")):
        return "comments that quote"
    words = len(comment.text.split())
    if words < MIN_WORDS:
        return f"comments of fewer than {MIN_WORDS} words"
    return f"comments of more than {MAX_WORDS} words" if words > MAX_WORDS else None


def _unlearnable(comment: Comment) -> str | None:
    """Why a turn is not one to learn."""
    text = comment.text
    if _URL.search(text):
        return "turns with an address"
    if "[" in text or "]" in text:
        return "turns with brackets"
    if _CAPITALS.search(text):
        return "turns in capitals"
    if any(len(word) > 30 for word in text.split()):
        return "turns with a word of more than 30 letters"
    if _THRICE.search(text):
        return "turns that say a word three times running"
    return f"turns scored below {MIN_SCORE}" if comment.score < MIN_SCORE else None


def paths_of(comments: Sequence[Comment], dropped: Counter[str]) -> list[list[Comment]]:
    """
    Conversations: from a submission to a comment that nobody answered; oldest submission first.

    Comments whose parent was left out begin nothing: what they answer is not there.
    """
    by_submission: dict[str, list[Comment]] = defaultdict(list)
    for comment in comments:
        by_submission[comment.submission].append(comment)
    paths = []
    for submission in sorted(by_submission, key=lambda name: (min(c.created for c in by_submission[name]), name)):
        members = {comment.id: comment for comment in by_submission[submission]}
        if len(members) < MIN_COMMENTS:
            dropped[f"submissions of fewer than {MIN_COMMENTS} comments"] += 1
            continue
        answered = {comment.parent for comment in members.values()}
        found = []
        for leaf in members.values():
            if leaf.id in answered:
                continue
            path = _path(leaf, members)
            if path is None:
                dropped["conversations whose beginning was left out"] += 1
            elif len(path) < 2:
                dropped["conversations of one turn"] += 1
            else:
                found.append(path[-MAX_TURNS:])
        found.sort(key=lambda path: (-len(path), path[-1].created, path[-1].id))
        dropped[f"conversations beyond {MAX_PATHS} of a submission"] += len(found[MAX_PATHS:])
        paths += found[:MAX_PATHS]
    return paths


def _path(leaf: Comment, members: Mapping[str, Comment]) -> list[Comment] | None:
    path, seen = [leaf], {leaf.id}
    while path[-1].parent:
        parent = members.get(path[-1].parent)
        if parent is None or parent.id in seen:
            return None
        seen.add(parent.id)
        path.append(parent)
    return path[::-1]


def pushshift_rows(document: bytes, dropped: Counter[str]) -> tuple[list[Row], list[Row]]:
    """
    Rows to train on and rows held out.

    Args:
        document: JSON lines of comments: id, parent_id, link_id, author, body, score, created_utc.
        dropped: counts what was left out, under the reason.
    """
    paths = paths_of(comments_of(document, dropped), dropped)
    of_author: dict[str, list[list[Comment]]] = defaultdict(list)
    for path in paths:
        for author in {comment.author for comment in path}:
            of_author[author].append(path)
    submissions = list(dict.fromkeys(path[0].submission for path in paths))
    held_out = set(submissions[len(submissions) - len(submissions) // HELD_OUT :])
    sides: tuple[list[Row], list[Row]] = [], []
    learned: set[str] = set()
    for path in paths:
        for row, last in _rows_of(path, of_author, dropped):
            if last in learned:
                dropped["turns that are learned in another conversation"] += 1
                continue
            learned.add(last)
            sides[path[0].submission in held_out].append(row)
    return sides


def _rows_of(
    path: list[Comment], of_author: Mapping[str, list[list[Comment]]], dropped: Counter[str]
) -> Iterator[tuple[Row, str]]:
    """A row for each author of the path who has been met before, and the id of the last turn that it learns."""
    for author in dict.fromkeys(comment.author for comment in path):
        last = max(i for i, comment in enumerate(path) if comment.author == author)
        references = _references(author, path, of_author[author])
        if last == 0:
            dropped["turns that nothing stands before"] += 1
        elif (reason := _unlearnable(path[last])) is not None:
            dropped[reason] += 1
        elif not references:
            dropped["actors without an earlier conversation"] += 1
        else:
            target = _turns(path[: last + 1], author)
            refs = [_turns(item, author) for item in references]
            yield {"actor": "u1", "target": target, "refs": refs, "ts": path[last].created}, path[last].id


def _references(author: str, path: list[Comment], paths: list[list[Comment]]) -> list[list[Comment]]:
    """The newest earlier conversations of other submissions, one of each, oldest first."""
    begun = min(comment.created for comment in path)
    by_submission: dict[str, list[Comment]] = {}
    for other in paths:
        if other[0].submission != path[0].submission and max(comment.created for comment in other) < begun:
            by_submission.setdefault(other[0].submission, other)
    ordered = sorted(by_submission.values(), key=lambda item: (item[-1].created, item[-1].id))
    return ordered[-MAX_REFERENCES:]


def _turns(path: Sequence[Comment], actor: str) -> list[dict[str, str]]:
    """Turns by numbered speakers, the actor first: names do not travel."""
    numbers = {actor: 1}
    turns = []
    for comment in path:
        number = numbers.setdefault(comment.author, len(numbers) + 1)
        text = _URL.sub("__url__", comment.text).replace("#", "")
        turns.append({"author": f"u{number}", "text": " ".join(text.split())})
    return turns
