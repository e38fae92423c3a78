"""
What stories are labelled with before models learn to tell them: keywords of each sentence, and facts that go with it.

    sentence -> its keywords (RAKE) -> facts of the concept graph -> the best by what is known of the sentence itself

A label has seen the sentence that it is for, so it belongs to training alone; beside it stands what a server would
choose, which knows the story so far and the keywords only. It lives here because the server imports nothing of this
package.

Source: arXiv 2010.00840 (Megatron-CNTRL), weak supervision of the contextual ranker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trilithon_finetune.data.findings import Finding, line_form
from trilithon_finetune.data.reading import Row as Placed
from trilithon_finetune.data.reading import read_rows
from trilithon_finetune.recipes.story_rows import check_story, spread
from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.knowledge.concepts import Concepts
from trilithon_server.knowledge.fact_vectors import by_cosine
from trilithon_server.knowledge.graph import PER_KEYWORD, ConceptGraph, Fact
from trilithon_server.knowledge.keywords import keywords
from trilithon_server.tasks.story_format import RankerFormat

Vector = npt.NDArray[np.float32]
Row = dict[str, Any]


@dataclass(frozen=True)
class TextEncoder:
    """
    Attributes:
        vectors: fp32 [N, H] of N sequences of token ids, as the model pools and scales them.
        digest: of the weights and the tokenizer.
    """

    tokenizer: Tokenizer
    vectors: Callable[[Sequence[Sequence[int]]], npt.NDArray[np.float32]]
    digest: str


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """
    Attributes:
        facts: of a sentence, at most, that count as fitting.
        others: of the other candidates, at most, that are kept as not fitting: spread over their ranks.
        per_keyword: candidates of one keyword, at most.
    """

    facts: int = 10
    others: int = 20
    per_keyword: int = PER_KEYWORD


def read_stories(path: Path) -> list[Row]:
    """
    The rows of a file of stories.

    Raises:
        ValueError: a row is none; the message has the first finding.
        OSError: the file cannot be read.
    """
    rows: list[Row] = []
    for item in read_rows(path):
        findings = [item] if isinstance(item, Finding) else check_story(item.value, file=path.name, line=item.line)
        if findings:
            raise ValueError(line_form(findings[0]))
        assert isinstance(item, Placed)
        rows.append(dict(item.value))
    return rows


class StoryLabeller:
    """
    Labels stories; vectors of facts are kept from one to the next.

    Args:
        encoder: whose cosines say what goes together.
    """

    def __init__(self, concepts: Concepts, encoder: TextEncoder, options: LabelOptions = LabelOptions()) -> None:
        self._graph, self._encoder, self._options = concepts.graph, encoder, options
        self._format = RankerFormat()
        self._known: dict[str, Vector] = {}
        self._made_by = {"concepts": concepts.digest, "encoder": encoder.digest, "options": asdict(options)}

    def label(self, row: Mapping[str, Any]) -> Row:
        """
        A story with a step for each of its sentences but the first.

        Args:
            row: with `sentences`, texts.
        Returns:
            The row with `steps`: `keywords`; `facts`, best first, by the story with the sentence; `ranked`, as many, by
            the story so far with the keywords; `others`, that are not among `facts`. And `labelled_by`: digests of what
            made them.
        """
        sentences: Sequence[str] = row["sentences"]
        found = [keywords(sentence) for sentence in sentences[1:]]
        candidates = [self._graph.facts(words, per_keyword=self._options.per_keyword).facts for words in found]
        tokenizer = self._encoder.tokenizer
        before = [
            self._format.story(sentences[:size], tokenizer, keywords=words).tokens
            for size, words in enumerate(found, start=1)
        ]
        after = [self._format.story(sentences[: size + 1], tokenizer).tokens for size in range(1, len(sentences))]
        new = list({fact.text: None for facts in candidates for fact in facts if fact.text not in self._known})
        told = [self._format.fact(text, tokenizer).tokens for text in new]
        vectors = self._encoder.vectors([*before, *after, *told])
        self._known |= zip(new, vectors[2 * len(found) :], strict=True)
        steps = [
            {"keywords": words, **self._ranked(facts, *asked)}
            for words, facts, *asked in zip(found, candidates, vectors, vectors[len(found) :], strict=False)
        ]
        return {**row, "steps": steps, "labelled_by": self._made_by}

    def _ranked(self, facts: Sequence[Fact], before: Vector, after: Vector) -> dict[str, list[str]]:
        """Candidates by the vectors of a story before a sentence, with its keywords, and after it."""
        vectors = [self._known[fact.text] for fact in facts]
        best, guessed = ([one.fact.text for one in by_cosine(facts, vectors, story)] for story in (after, before))
        return _lists(best, guessed, self._options)


def unranked(row: Mapping[str, Any], graph: ConceptGraph, options: LabelOptions = LabelOptions()) -> Row:
    """
    A story with as many keywords and facts in its steps as labels have, but with the facts as the graph gives them: no
    encoder is asked. To count with, not to learn from.
    """
    steps: list[dict[str, list[str]]] = []
    for sentence in row["sentences"][1:]:
        words = keywords(sentence)
        facts = [fact.text for fact in graph.facts(words, per_keyword=options.per_keyword).facts]
        steps.append({"keywords": words, **_lists(facts, facts, options)})
    return {**row, "steps": steps}


def _lists(best: Sequence[str], guessed: Sequence[str], options: LabelOptions) -> dict[str, list[str]]:
    """What a step keeps of its candidates, best first by the sentence, and by the story before it."""
    return {
        "facts": list(best[: options.facts]),
        "ranked": list(guessed[: options.facts]),
        "others": spread(best[options.facts :], options.others),
    }
