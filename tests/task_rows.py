"""Rows of every task, in our own words, that tiny models can learn something from."""

from __future__ import annotations

from typing import Any

WORDS = ("red", "green", "blue", "small", "large", "round", "old", "new")
THINGS = ("ball", "stone", "tree", "house", "cup", "hat")


def _pair(i: int) -> tuple[str, str]:
    return WORDS[i % len(WORDS)], THINGS[(i // 2) % len(THINGS)]


def rows(task: str, count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """`count` different rows of a task."""
    return [_ROW[task](i) for i in range(first, first + count)]


def _chat(i: int) -> dict[str, Any]:
    word, thing = _pair(i)
    return {
        "messages": [
            {"role": "user", "content": f"What is {thing} {i}?"},
            {"role": "assistant", "content": f"It is {word}."},
        ]
    }


def _preference(i: int) -> dict[str, Any]:
    word, thing = _pair(i)
    return {
        "input": {"messages": [{"role": "user", "content": f"Name {thing} {i}"}]},
        "preferred_output": [{"role": "assistant", "content": f"a {word} {thing}"}],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    }


def _tags(i: int) -> dict[str, Any]:
    word, thing = _pair(i)
    return {"tokens": ["the", word, thing, "is", "here", str(i)], "tags": ["O", "B-Q", "I-Q", "O", "O", "O"]}


def _relation(i: int) -> dict[str, Any]:
    word, thing = _pair(i)
    text = f"{word} likes {thing} {i}"
    a, b = text.index(word), text.index(thing)
    return {
        "text": text,
        "a": {"start": a, "end": a + len(word), "type": "CHEMICAL"},
        "b": {"start": b, "end": b + len(thing), "type": "GENE"},
        "label": "likes" if i % 2 else "false",
    }


def _class(i: int) -> dict[str, Any]:
    word, thing = _pair(i)
    return {"text": f"a {word} {thing} {i}", "label": "even" if i % 2 == 0 else "odd"}


def _span(i: int) -> dict[str, Any]:
    word, thing = _pair(i)
    context = f"the {thing} {i} is {word} today"
    return {
        "id": f"q{i}",
        "question": f"what is {thing} {i}?",
        "context": context,
        "answers": [{"text": word, "answer_start": context.index(word)}],
    }


def _answer(i: int) -> dict[str, Any]:
    word, thing = _pair(i)
    return {"context": f"the {thing} {i} is {word}", "question": f"what is {thing} {i}?", "answers": [word]}


def _decision(i: int) -> dict[str, Any]:
    word, thing = _pair(i)
    return {
        "question": f"is {thing} {i} {word}?",
        "contexts": [f"the {thing} {i} is {word}"],
        "answer": ("yes", "no", "maybe")[i % 3],
    }


def _text(i: int) -> dict[str, Any]:
    word, thing = _pair(i)
    return {"text": f"the {word} {thing} number {i} is here today"}


def _passages(i: int) -> dict[str, Any]:
    word, thing = _pair(i)
    other, _ = _pair(i + 1)
    return {
        "question": f"what is {thing} {i}?",
        "positive_ctxs": [{"title": thing, "text": f"the {thing} {i} is {word} today"}],
        "hard_negative_ctxs": [{"title": thing, "text": f"the {thing} {i + 100} is {other} today"}][: i % 4],
    }


def _document(i: int) -> dict[str, Any]:
    word, thing = _pair(i)
    said = [f"The {thing} {i} is {word}.", f"It is {word} {i}.", f"A {word} {thing} {i} is here.", f"Look at {i}!"]
    return {"title": thing, "text": " ".join(said)}


def _dialogue(i: int) -> dict[str, Any]:
    word, thing = _pair(i)
    return {
        "actor": "me",
        "target": [
            {"author": "you", "text": f"what is {thing} {i}?"},
            {"author": "me", "text": f"it is {word}"},
            {"author": "you", "text": "sure?"},
            {"author": "me", "text": f"yes, {word}"},
            {"author": "you", "text": "good"},
        ],
        "refs": [[{"author": "me", "text": f"I like {thing}"}, {"author": "you", "text": "so do I"}]],
        "knowledge": [{"text": f"the {thing} {i} is {word}"}],
    }


def _story(i: int) -> dict[str, Any]:
    word, thing = _pair(i)
    other, _ = _pair(i + 3)
    step = {
        "keywords": [thing],
        "facts": [f"{thing} is {word}"],
        "ranked": [f"{thing} is {other}"],
        "others": [f"{thing} is {other}", f"{thing} is at {other} {i}"],
    }
    return {"sentences": [f"There is a {thing} {i}.", f"It is {word}."], "steps": [step]}


_ROW = {
    "lm": _text,
    "sft": _chat,
    "dpo": _preference,
    "mlm": _text,
    "span_qa": _span,
    "answer_qa": _answer,
    "yes_no_maybe": _decision,
    "ner": _tags,
    "relation": _relation,
    "classify": _class,
    "dialogue": _dialogue,
    "grounded_dialogue": _dialogue,
    "answer_gen": _span,
    "question_gen": _span,
    "dpr": _passages,
    "story_keywords": _story,
    "story_generator": _story,
    "story_ranker": _story,
    "ict": _document,
}

DECODER_TASKS = (
    "lm", "sft", "dpo", "answer_qa", "yes_no_maybe", "dialogue", "grounded_dialogue", "question_gen", "story_keywords",
    "story_generator",
)  # fmt: skip
ENCODER_TASKS = ("mlm", "span_qa", "ner", "relation", "classify", "answer_gen", "dpr", "ict", "story_ranker")
