"""
Comment trees as conversations of actors: dumps of the Pushshift schema, one comment a line.

    comments -> those that may be turns -> paths from a submission to its last comment -> an actor of each path, with
    earlier paths of that actor from other submissions as references -> rows of the task `dialogue`

Everything that is left out is counted under its reason. References are always older than what they are given for. The
last fifth of the submissions, by time, is held out: rows to train on have nothing of it, as references neither. What is
held out is judged with older submissions as references, whichever side they are of.

A turn is learned in one row, and only where it passes the filters; the actor's other turns have the weight 0.

A second file, where there is one, says what is not wanted: a line of it is a word, or `r/NAME`, a community.

Source: arXiv 2005.06114, section 3; the rules on comments are those that DialoGPT (1911.00536) published.
"""

from __future__ import annotations

import codecs
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trilithon_finetune.data.findings import Finding, Findings, finding, shown
from trilithon_finetune.data.strict_json import RowError, parse_row

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
"""Of a turn that is learned."""
HELD_OUT = 5
"""The last one of so many parts of the submissions is held out."""

_GONE = ("[deleted]", "[removed]", "")
_URL = re.compile(r"(?:https?://|www\.)\S+")
_CAPITALS = re.compile(r"\b[A-Z]{5,}\b")
_THRICE = re.compile(r"\b(\w+)(?:\W+\1\b){2}", re.IGNORECASE)
_WORD = re.compile(r"\w+")
_EDGES = string.punctuation + "\u2018\u2019\u201c\u201d\u2026"


@dataclass(frozen=True, slots=True)
class Blocked:
    """
    What is not wanted, in lower case.

    Attributes:
        words: no turn that has one is learned.
        communities: no comment of these is read; without their `r/`.
    """

    words: frozenset[str] = frozenset()
    communities: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Comment:
    """
    One line of a dump; `parent` is a comment's id, empty where the submission is meant. `created` in seconds.

    `unlearnable` is why the turn is not one to learn.
    """

    id: str
    parent: str
    submission: str
    author: str
    text: str
    created: int
    unlearnable: str | None


def blocked_of(document: bytes) -> Blocked:
    """
    Read a list of what is not wanted.

    >>> blocked_of(b"Heck\\nr/Shouting\\n")
    Blocked(words=frozenset({'heck'}), communities=frozenset({'shouting'}))

    Raises:
        ValueError: a line is neither a word nor a community.
    """
    words: set[str] = set()
    communities: set[str] = set()
    for number, line in enumerate(document.decode("utf-8-sig").splitlines(), start=1):
        entry = line.strip().lower()
        is_community = entry.startswith("r/")
        name = entry.removeprefix("r/") if is_community else entry.strip(_EDGES)
        if entry and (not name or len(entry.split()) > 1):
            rule = "a line of what is not wanted must be one word, or r/ and a community's name"
            raise ValueError(f"line {number}: {rule}. Given: {shown(line)}.")
        if entry:
            (communities if is_community else words).add(name)
    return Blocked(frozenset(words), frozenset(communities))


def comments_of(document: bytes, dropped: Counter[str], findings: Findings, blocked: Blocked) -> list[Comment]:
    """
    The comments that may be turns, in the order of the file.

    Args:
        dropped: counts the others, under the reason.
        findings: takes one for each line that is no comment.
    """
    found: dict[str, Comment] = {}
    for number, line in enumerate(document.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        comment = _read(line, number, blocked)
        if isinstance(comment, Finding):
            findings.add(comment)
            dropped["lines that are no comments"] += 1
        elif comment is None:
            dropped["comments of a blocked community"] += 1
        elif (reason := _unfit(comment)) is not None:
            dropped[reason] += 1
        elif comment.id in found:
            dropped["comments that stand there twice"] += 1
        else:
            found[comment.id] = comment
    return list(found.values())


def _read(line: bytes, number: int, blocked: Blocked) -> Comment | Finding | None:
    """
    The comment of a line, or the first thing that is wrong with it; whose file it is the caller knows.

    None: it is of a blocked community.
    """
    try:
        row = parse_row(line)
    except RowError as error:
        return finding(error.code, error.message, file="", line=number, path=error.path)
    values: dict[str, Any] = {}
    fields = {**_FIELDS, "subreddit": _text} if blocked.communities else _FIELDS
    for key, kind in fields.items():
        if key not in row:
            return finding("E-DATA-008", "is missing.", file="", line=number, path=key)
        try:
            values[key] = kind(row[key])
        except (ValueError, TypeError, OverflowError):
            rule = f"must be {'a whole number' if kind is int else 'a text'}. Given: {shown(row[key])}."
            return finding("E-DATA-008", rule, file="", line=number, path=key)
    if values.get("subreddit", "").lower() in blocked.communities:
        return None
    parent, text = values["parent_id"], values["body"].strip()
    return Comment(
        id=values["id"],
        parent=parent.removeprefix("t1_") if parent.startswith("t1_") else "",
        submission=values["link_id"].removeprefix("t3_"),
        author=values["author"],
        text=text,
        created=values["created_utc"],
        unlearnable=_unlearnable(text, values["score"], blocked.words),
    )


def _text(value: Any) -> str:
    """Raises TypeError for what is no text: `null` is nobody's name."""
    if not isinstance(value, str):
        raise TypeError
    return value


_FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "id": str,
    "parent_id": str,
    "link_id": str,
    "author": _text,
    "body": _text,
    "score": int,
    "created_utc": int,
}
"""Of a line. Some dumps have ids as numbers, and numbers as texts."""


def _unfit(comment: Comment) -> str | None:
    """Why a comment is no turn of any conversation."""
    if comment.author in _GONE or comment.text in _GONE:
        return "comments that were deleted"
    if any(line.lstrip().startswith((">", "&gt;")) for line in comment.text.split("\n")):
        return "comments that quote"
    words = len(_clean(comment.text).split())
    if words < MIN_WORDS:
        return f"comments of fewer than {MIN_WORDS} words"
    return f"comments of more than {MAX_WORDS} words" if words > MAX_WORDS else None


def _unlearnable(text: str, score: int, blocked: frozenset[str]) -> str | None:
    """Why a turn is not one to learn."""
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
    if blocked and not blocked.isdisjoint(_words(text)):
        return "turns with a blocked word"
    return f"turns scored below {MIN_SCORE}" if score < MIN_SCORE else None


def _words(text: str) -> Iterator[str]:
    """What stands between blanks, without the signs around it, and its runs of letters: `well-known` is three words."""
    for part in text.lower().split():
        yield part.strip(_EDGES)
        yield from _WORD.findall(part)


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


def pushshift_rows(
    document: bytes, dropped: Counter[str], findings: Findings | None = None, blocked: Blocked | None = None
) -> tuple[list[Row], list[Row]]:
    """
    Rows to train on and rows held out.

    Args:
        document: JSON lines of comments: id, parent_id, link_id, author, body, score, created_utc; subreddit, where
            communities are blocked.
        dropped: counts what was left out, under the reason; turns once for each conversation that they stand in.
        findings: takes one for each line that is no comment.
        blocked: what is not wanted. None: everything is.
    """
    comments = comments_of(document, dropped, findings or Findings(most=1), blocked or Blocked())
    paths = paths_of(comments, dropped)
    submissions = list(dict.fromkeys(path[0].submission for path in paths))
    held_out = set(submissions[len(submissions) - len(submissions) // HELD_OUT :])
    of_author = _by_author(paths)
    of_author_to_train = _by_author([path for path in paths if path[0].submission not in held_out])
    train: list[Row] = []
    dev: list[Row] = []
    learned: set[str] = set()
    for path in paths:
        if path[0].submission in held_out:
            dev += _rows_of(path, of_author, learned, dropped)
        else:
            train += _rows_of(path, of_author_to_train, learned, dropped)
    return train, dev


def _by_author(paths: Sequence[list[Comment]]) -> dict[str, list[list[Comment]]]:
    of_author: dict[str, list[list[Comment]]] = defaultdict(list)
    for path in paths:
        for author in {comment.author for comment in path}:
            of_author[author].append(path)
    return of_author


def _rows_of(
    path: list[Comment], of_author: Mapping[str, list[list[Comment]]], learned: set[str], dropped: Counter[str]
) -> Iterator[Row]:
    """
    A row for each author of the path who has been met before, and who says what no row teaches yet.

    Args:
        of_author: the paths that may be references.
        learned: ids of the turns that rows teach; those of these rows are added.
    """
    for author in dict.fromkeys(comment.author for comment in path):
        fit = []
        for i, comment in enumerate(path):
            if comment.author != author:
                continue
            reason = comment.unlearnable if i else "turns that nothing stands before"
            if reason is None:
                fit.append(i)
            else:
                dropped[reason] += 1
        references = _references(author, path, of_author[author])
        if fit and not references:
            dropped["actors without an earlier conversation"] += 1
            continue
        new = [i for i in fit if path[i].id not in learned]
        dropped["turns that are learned in another conversation"] += len(fit) - len(new)
        if not new:
            continue
        learned.update(path[i].id for i in new)
        last = new[-1]
        target = _turns(path[: last + 1], author)
        for i, comment in enumerate(path[:last]):
            if comment.author == author and i not in new:
                target[i]["weight"] = 0
        refs = [_turns(item, author) for item in references]
        yield {"actor": "u1", "target": target, "refs": refs, "ts": path[last].created}


def _references(author: str, path: list[Comment], paths: list[list[Comment]]) -> list[list[Comment]]:
    """The newest earlier conversations of other submissions, one of each, oldest first."""
    begun = min(comment.created for comment in path)
    by_submission: dict[str, list[Comment]] = {}
    for other in paths:
        if other[0].submission != path[0].submission and max(comment.created for comment in other) < begun:
            by_submission.setdefault(other[0].submission, other)
    ordered = sorted(by_submission.values(), key=lambda item: (item[-1].created, item[-1].id))
    return ordered[-MAX_REFERENCES:]


def _turns(path: Sequence[Comment], actor: str) -> list[Row]:
    """Turns by numbered speakers, the actor first: names do not travel."""
    numbers = {actor: 1}
    turns = []
    for comment in path:
        number = numbers.setdefault(comment.author, len(numbers) + 1)
        turns.append({"author": f"u{number}", "text": _clean(comment.text)})
    return turns


def _clean(text: str) -> str:
    """A comment as a turn says it: in one line, without addresses and the signs of tags."""
    return " ".join(_URL.sub("__url__", text).replace("#", "").split())
