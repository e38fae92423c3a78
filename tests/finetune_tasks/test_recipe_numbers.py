"""What recipes of encoder tasks say of a validation, from logits to numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from finetune_tasks.encoder_fixtures import CLASSIFY, LABELLED, NER, RELATED, RELATION, SPANS, context_of, samples_of

from trilithon_finetune.recipes.base import IGNORE, Output, Sample
from trilithon_parallel.tokenizer import Tokenizer

LISTS = ("strict_accuracy", "lenient_accuracy", "mean_reciprocal_rank")


def test_entities_are_judged_on_whole_rows(tokenizer: Tokenizer) -> None:
    """
    Logits that say the gold tags give F1 1 over windows; a wrong end costs the entity; types are told apart.

    Seen to fail when each window is compared for itself: entities that a window cuts are then lost.
    """
    row = {"tokens": ["the", "aspirin", "pain"] * 20, "tags": ["B-C", "I-C", "B-G"] * 20}
    context = context_of(NER, tokenizer, [row], max_tokens=16, options={"stride": 3})
    samples = samples_of(NER.encode(row, 4, context, file="f"))

    def output(sample: Sample, wrong: int) -> Output:
        values = np.zeros((len(sample.tokens), len(context.labels)), np.float32)
        for place, target in enumerate(sample.targets):
            if target != IGNORE:
                values[place, wrong if wrong and target == 2 else target] = 4.0
        return Output(sample, values)

    right = NER.metrics([output(sample, 0) for sample in samples[::-1]], {4: row}, context)
    assert right == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "f1/C": 1.0, "f1/G": 1.0}
    half = NER.metrics([output(sample, 4) for sample in samples], {4: row}, context)
    assert (half["f1/C"], half["f1/G"]) == (0.0, pytest.approx(2 / 3))


def test_relations_are_judged_without_the_negative_class(tokenizer: Tokenizer) -> None:
    """Finding none is no merit."""
    rows = {1: RELATED, 2: {**RELATED, "label": "false"}, 3: {**RELATED, "label": "false"}}
    context = context_of(RELATION, tokenizer, list(rows.values()))

    def numbers(said: list[int]) -> Mapping[str, float]:
        samples = [samples_of(RELATION.encode(row, line, context, file="f"))[0] for line, row in rows.items()]
        values = [np.eye(2, dtype=np.float32)[label] for label in said]
        return RELATION.metrics([Output(s, v) for s, v in zip(samples, values, strict=True)], rows, context)

    assert context.labels == ("CPR:4", "false")
    assert numbers([0, 1, 1]) == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "f1/CPR:4": 1.0}
    assert numbers([1, 1, 1])["f1"] == 0.0
    assert numbers([0, 0, 1])["f1"] == pytest.approx(2 / 3)


def test_classes_are_judged_by_accuracy_and_macro_f1(tokenizer: Tokenizer) -> None:
    """A class that is never found lowers macro-F1 more than accuracy."""
    rows = {i: {**LABELLED, "label": "no" if i == 4 else "yes"} for i in range(1, 5)}
    context = context_of(CLASSIFY, tokenizer, list(rows.values()))
    samples = [samples_of(CLASSIFY.encode(row, line, context, file="f"))[0] for line, row in rows.items()]
    found = CLASSIFY.metrics([Output(s, np.array([0.0, 1.0], np.float32)) for s in samples], rows, context)

    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((6 / 7) / 2)
    assert found["f1/no"] == 0.0


def test_answers_are_judged_over_windows(tokenizer: Tokenizer) -> None:
    """Gold logits give exact match and F1 1; with `no_answer` the questions without one are told apart."""
    text = "the aspirin " + "of it " * 20 + "the pain"
    rows = {
        1: {
            "context": text,
            "question": "who?",
            "answers": [{"text": "the pain", "answer_start": text.index("the p")}],
        },
        2: {"context": "of it", "question": "who?", "answers": [], "is_impossible": True},
    }
    context = context_of(SPANS, tokenizer, [], max_tokens=30, options={"no_answer": True, "doc_stride": 10})
    outputs = []
    for line, row in rows.items():
        for sample in samples_of(SPANS.encode(row, line, context, file="f")):
            values = np.full((len(sample.tokens), 2), -5.0, np.float32)
            values[sample.columns["start"], 0] = values[sample.columns["end"], 1] = 5.0
            outputs.append(Output(sample, values))
    found = SPANS.metrics(outputs, rows, context)

    assert len(outputs) > 3
    assert (found["exact"], found["f1"], found["has_answer_f1"], found["no_answer_f1"]) == (1.0, 1.0, 1.0, 1.0)
    assert found["best_f1"] == 1.0
    shy = [Output(o.sample, o.values + 20.0 * (np.arange(len(o.values)) == 0)[:, None]) for o in outputs]
    assert (SPANS.metrics(shy, rows, context)["f1"], found["best_threshold"]) == (1.0, -20.0)
    options = {"no_answer": True, "doc_stride": 10, "null_threshold": 0.0}
    told = SPANS.metrics(shy, rows, context_of(SPANS, tokenizer, [], max_tokens=30, options=options))
    assert (told["f1"], told["best_f1"], told["best_threshold"]) == (0.5, 1.0, 20.0)
    assert [told[name] for name in LISTS] == [1.0, 1.0, 1.0]  # one question has an answer
    alone = context_of(SPANS, tokenizer, [], max_tokens=30, options={"doc_stride": 10})
    assert SPANS.metrics(outputs[:-1], {1: rows[1]}, alone) == {"exact": 1.0, "f1": 1.0, **dict.fromkeys(LISTS, 1.0)}
