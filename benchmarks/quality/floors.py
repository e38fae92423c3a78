"""
What is reached without a model: the floors that a trained one must beat, computed from the data alone.

    python benchmarks/quality/floors.py ../shared/data

Entities: a dictionary of the training mentions. Relations: one label for all, or a linear model on hashed words.
Answers: the sentence of the context that is most like the question.
"""

from __future__ import annotations

import itertools
import math
import sys
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trilithon_finetune.converters import convert
from trilithon_finetune.metrics.classification import positive_scores
from trilithon_finetune.metrics.span_f1 import micro, span_scores
from trilithon_finetune.metrics.squad import best_of, normalise, token_f1
from trilithon_server.tasks.relations import split_sentences
from trilithon_server.tasks.tagging import spans_of

Rows = Sequence[Mapping[str, Any]]
Words = tuple[str, ...]

FEATURES = 1 << 16
"""Buckets into which words and pairs of words are hashed."""


def dictionary_tags(train: Rows, texts: Rows) -> list[list[str]]:
    """
    Tags of `texts` by the longest match with mentions of `train`, in lower case, left to right.

    A mention is in the dictionary if more than half of its occurrences in the training texts are entities.
    """
    mentions: Counter[tuple[Words, str]] = Counter()
    for row in train:
        words = _lower(row)
        mentions.update((words[start:stop], type_) for start, stop, type_ in spans_of(row["tags"]))
    known = {words for words, _ in mentions}
    longest = max(map(len, known))
    occurrences = Counter(run for row in train for run in _runs(_lower(row), longest) if run in known)
    types = {words: type_ for (words, type_), count in mentions.items() if 2 * count > occurrences[words]}
    out = []
    for row in texts:
        words = _lower(row)
        tags = ["O"] * len(words)
        place = 0
        while place < len(words):
            sizes = range(min(longest, len(words) - place), 0, -1)
            size = next((size for size in sizes if words[place : place + size] in types), 0)
            if size:
                type_ = types[words[place : place + size]]
                tags[place : place + size] = [f"B-{type_}", *[f"I-{type_}"] * (size - 1)]
            place += max(size, 1)
        out.append(tags)
    return out


def seen_share(train: Rows, texts: Rows) -> float:
    """Share of the mentions of `texts` that are, in lower case, mentions of the same type in `train` too."""

    def mentions(rows: Rows) -> list[tuple[Words, str]]:
        return [(_lower(row)[start:stop], type_) for row in rows for start, stop, type_ in spans_of(row["tags"])]

    known, wanted = set(mentions(train)), mentions(texts)
    return sum(mention in known for mention in wanted) / len(wanted)


def sentence_f1(rows: Rows) -> float:
    """
    Mean F1 of the sentence that is most like the question: cosine of TF-IDF vectors of normalised words, with
    tf = 1 + ln(count) and idf = ln(1 + sentences / sentences with the word), over the distinct contexts.
    """
    contexts = {row["context"]: _sentences(row["context"]) for row in rows}
    bags = {context: [Counter(normalise(item).split()) for item in found] for context, found in contexts.items()}
    with_word = Counter(word for found in bags.values() for bag in found for word in bag)
    count = sum(map(len, bags.values()))
    idf = {word: math.log(1 + count / number) for word, number in with_word.items()}

    def likeness(question: Counter[str], bag: Counter[str]) -> float:
        norm = math.sqrt(sum((_tf(number) * idf[word]) ** 2 for word, number in bag.items()))
        shared = question.keys() & bag.keys()
        # In the order of the question: sums of floats depend on theirs.
        products = (_tf(question[w]) * _tf(bag[w]) * idf[w] ** 2 for w in question if w in shared)
        return sum(products) / norm if norm else 0.0

    total = 0.0
    for row in rows:
        question = Counter(normalise(row["question"]).split())
        scores = [likeness(question, bag) for bag in bags[row["context"]]]
        best = contexts[row["context"]][scores.index(max(scores))]
        total += best_of(token_f1, best, [answer["text"] for answer in row["answers"]])
    return total / len(rows)


def linear_relation_f1(train: Rows, dev: Rows, *, between: bool, epochs: int = 20, seed: int = 0) -> float:
    """
    F1 over the positive classes of a logistic regression on hashed words and pairs of words.

    Args:
        between: read only what stands between the two mentions, not the sentence.
    """
    labels = sorted({row["label"] for row in train})
    features = [_hashed(_words(row, between=between)) for row in train]
    targets = [labels.index(row["label"]) for row in train]
    weights = np.zeros((FEATURES, len(labels)))
    squares = np.full_like(weights, 1e-8)
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        for i in generator.permutation(len(train)):
            places = features[i]
            error = _softmax(weights[places].sum(axis=0))
            error[targets[i]] -= 1.0
            squares[places] += error**2
            weights[places] -= 0.1 * error / np.sqrt(squares[places])
    said = [labels[int(weights[_hashed(_words(row, between=between))].sum(axis=0).argmax())] for row in dev]
    return positive_scores([row["label"] for row in dev], said, negative="false").f1


def _sentences(text: str) -> list[str]:
    return [text[start:end] for start, end in split_sentences(text)]


def _tf(count: int) -> float:
    return 1 + math.log(count)


def _lower(row: Mapping[str, Any]) -> Words:
    return tuple(token.lower() for token in row["tokens"])


def _runs(words: Words, longest: int) -> list[Words]:
    return [words[i:j] for i in range(len(words)) for j in range(i + 1, min(i + longest, len(words)) + 1)]


def _words(row: Mapping[str, Any], *, between: bool) -> list[str]:
    first, second = sorted((row["a"], row["b"]), key=lambda mention: int(mention["start"]))
    text = row["text"]
    middle = text[first["end"] : second["start"]].lower().split()
    if between:
        return middle
    return [*text[: first["start"]].lower().split(), "<1>", *middle, "<2>", *text[second["end"] :].lower().split()]


def _hashed(words: Sequence[str]) -> list[int]:
    pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
    return sorted({zlib.crc32(item.encode()) % FEATURES for item in ["", *words, *pairs]})


def _softmax(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    values = np.exp(values - values.max())
    return values / values.sum()


def main(data: Path) -> None:
    """Print the floors of every data set under `data`."""
    biomed, qa = data / "biomed", data / "qa"
    for name in ("ncbi_disease", "bc5cdr"):
        train, devel = (
            convert("conll", (biomed / f"{name}_{side}.tsv").read_bytes()).train for side in ("train", "devel")
        )
        scores = span_scores([row["tags"] for row in devel], dictionary_tags(train, devel))
        for type_, score in {**scores, "all": micro(scores)}.items():
            numbers = " / ".join(f"{100 * value:.1f}" for value in (score.precision, score.recall, score.f1))
            print(f"{name} {type_}: {score.gold} mentions, dictionary P / R / F1 {numbers}")
    split = convert("drugprot", (biomed / "drugprot_re.jsonl").read_bytes())
    gold = [row["label"] for row in split.dev]
    always = positive_scores(gold, ["CPR:4"] * len(gold), negative="false").f1
    share = gold.count("false") / len(gold)
    print(f"drugprot: {len(gold)} pairs, {100 * share:.1f} % false, all CPR:4 F1 {100 * always:.1f}")
    for between in (False, True):
        f1 = linear_relation_f1(split.train, split.dev, between=between)
        print(f"drugprot linear, {'between the mentions' if between else 'sentence'}: F1 {100 * f1:.1f}")
    for name, file in (("squad", "xquad_en.json"), ("qed", "qed_nq_dev.jsonl"), ("covidqa", "covidqa_windows.jsonl")):
        questions = convert(name, (qa / file).read_bytes())
        print(f"{file}: best sentence F1 {100 * sentence_f1([*questions.train, *questions.dev]):.1f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
