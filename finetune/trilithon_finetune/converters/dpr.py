"""
Questions of SQuAD's form and passages as rows of the task `dpr` (Karpukhin et al. 2020, section 4.2).

A question's positive is the passage that was cut from its paragraph and holds its answer. What BM25 finds for it
besides is a hard negative, unless it holds an answer too: that would teach the encoder to push right passages away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from trilithon.errors import InvalidArgument
from trilithon_finetune.data.placed import PlacedRow
from trilithon_finetune.metrics.retrieval import has_answer
from trilithon_server.knowledge.passages import Passage, check_passages, parse_passage
from trilithon_server.knowledge.sparse import SparseIndex

HARD_NEGATIVES = 7
"""Of a row, at most; a job takes as many of them as its `options.hard_negatives` says."""

SEARCHED = 64
"""Passages that BM25 is asked for."""

KEY_WORDS = 3
"""First words of a passage by which its place in a paragraph is looked up."""

Row = dict[str, Any]


def read_passage_lines(document: bytes) -> list[Passage]:
    """
    The passages of a file's bytes.

    Raises:
        ValueError: a line is no passage, or an id repeats; names the line.
    """
    passages = []
    try:
        for number, line in enumerate(document.split(b"\n"), start=1):
            if line.strip():
                try:
                    passages.append(parse_passage(line))
                except InvalidArgument as error:
                    raise ValueError(f"line {number} of the passages {error.message}") from None
        check_passages(passages)
    except InvalidArgument as error:
        raise ValueError(error.message) from None
    return passages


def dpr_rows(
    questions: Iterable[PlacedRow], passages: Sequence[Passage], dropped: Counter[str]
) -> Iterator[tuple[str, Row]]:
    """
    Rows with the path of the question that each is of.

    Args:
        dropped: counts what was left out, under the reason.
    """
    places, sparse = _Places(passages), SparseIndex.build([passage.searched for passage in passages])
    for row in questions:
        answers = list(dict.fromkeys(answer["text"] for answer in row["answers"]))
        if not answers:
            dropped["questions without an answer"] += 1
            continue
        own = places.within(row["context"])
        positives = [at for at in own if has_answer(passages[at].text, answers)]
        if not positives:
            dropped["questions whose answer is in no passage of their paragraph"] += 1
            continue
        negatives: list[int] = []
        (ranking,) = sparse.search([row["question"]], SEARCHED)
        for at in map(int, ranking.rows):
            if at in positives or len(negatives) == HARD_NEGATIVES:
                continue
            if has_answer(passages[at].text, answers):
                dropped["hard negatives that hold an answer"] += 1
            else:
                negatives.append(at)
        yield (
            row.path,
            {
                "question": row["question"],
                "answers": answers,
                "positive_ctxs": [_shown(passages[at]) for at in positives],
                "hard_negative_ctxs": [_shown(passages[at]) for at in negatives],
            },
        )


class _Places:
    """Where passages were cut from: a passage is a run of a paragraph's words."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self._words = [passage.text.split() for passage in passages]
        self._by_key: dict[tuple[str, ...], list[int]] = {}
        for at, words in enumerate(self._words):
            self._by_key.setdefault(tuple(words[:KEY_WORDS]), []).append(at)

    def within(self, paragraph: str) -> list[int]:
        """The passages that are runs of this paragraph, in their order there."""
        words, found = paragraph.split(), []
        for start in range(len(words)):
            for length in range(1, KEY_WORDS + 1):
                for at in self._by_key.get(tuple(words[start : start + length]), ()):
                    passage = self._words[at]
                    if len(passage[:KEY_WORDS]) == length and words[start : start + len(passage)] == passage:
                        found.append(at)
        return list(dict.fromkeys(found))


def _shown(passage: Passage) -> Mapping[str, str]:
    return {"title": passage.title, "text": passage.text, "id": passage.id}
