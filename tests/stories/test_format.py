"""The formats of stories: what is learned is what is prompted with, what gives way, and what task files hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import write_bpe_tokenizer, write_wordpiece_tokenizer

from trilithon_parallel.config import ModelError
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer
from trilithon_server.tasks import TASK_FILE, read_task
from trilithon_server.tasks.story_format import (
    GUIDE,
    KEYWORDS,
    KNOWLEDGE,
    SEPARATOR,
    STORY,
    KeywordFormat,
    NoRoom,
    RankerFormat,
    SentenceFormat,
    StoryFormat,
)

TOLD = ["Tom has a dog.", "The dog is big."]
FACTS = ["ball is used for play", "park is near house"]
NEXT = "They play in the park."


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE without marks of stories."""
    path = tmp_path_factory.mktemp("plain")
    write_bpe_tokenizer(path, vocab=384, context=512, chat_template=False)
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same with the marks as special tokens 384 .. 387."""
    path = tmp_path_factory.mktemp("marked")
    write_bpe_tokenizer(path, vocab=384, context=512, chat_template=False)
    document: dict[str, Any] = json.loads((path / "tokenizer.json").read_text("utf-8"))
    like = document["added_tokens"][0]
    for number, text in enumerate((STORY, KEYWORDS, KNOWLEDGE, SEPARATOR), start=384):
        document["added_tokens"].append({**like, "id": number, "content": text})
    (path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return load_tokenizer(path)


def text_of(tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False)


def ids(text: str, tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_golden_texts_in_words(plain: Tokenizer) -> None:
    """Both parts of a sentence, as the module's documentation shows them."""
    predictor = KeywordFormat().pack(TOLD, plain, keywords=["park", "ball"])
    generator = SentenceFormat().pack(TOLD, plain, keywords=["park", "ball"], knowledge=FACTS, answer=NEXT)

    story = "Story: Tom has a dog. The dog is big.\nKeywords:"
    assert text_of(predictor.tokens, plain) == f"{story} park, ball\n"
    assert text_of(predictor.tokens[slice(*predictor.answer)], plain) == " park, ball\n"
    knowledge = "Knowledge: ball is used for play; park is near house\n"
    assert text_of(generator.tokens, plain) == f"{story} park, ball\n{knowledge}Next sentence: {NEXT}\n"
    assert text_of(generator.tokens[slice(*generator.answer)], plain) == f" {NEXT}\n"
    assert generator.knowledge == 2


def test_golden_texts_in_marks(marked: Tokenizer) -> None:
    """The same with special tokens, and an end token behind each answer."""
    predictor = KeywordFormat("tokens").pack(TOLD, marked, keywords=["park", "ball"])
    generator = SentenceFormat("tokens").pack(TOLD, marked, keywords=["park", "ball"], knowledge=FACTS, answer=NEXT)
    end = text_of((marked.eos_ids[0],), marked)

    story = "<|story|> Tom has a dog. The dog is big.<|kw|>"
    assert text_of(predictor.tokens, marked) == f"{story}park<|sep|>ball{end}"
    facts = "<|know|>ball is used for play<|sep|>park is near house"
    assert text_of(generator.tokens, marked) == f"{story}park<|sep|>ball{facts}<|story|> {NEXT}{end}"


@pytest.mark.parametrize("markers", ["text", "tokens"])
@given(
    story=st.lists(st.sampled_from([*TOLD, "A <|kw|> in a text.", "Keywords: no\nline"]), min_size=1, max_size=6),
    keywords=st.lists(st.sampled_from(["park", "red ball"]), min_size=1, max_size=3, unique=True),
    facts=st.lists(st.sampled_from(FACTS), max_size=2, unique=True),
    room=st.integers(90, 200) | st.none(),
)
def test_acc_005_what_is_learned_begins_with_what_is_prompted(
    marked: Tokenizer, markers: Any, story: list[str], keywords: list[str], facts: list[str], room: int | None
) -> None:
    """
    A sample without its answer is the prompt, both fit into the room, and what texts spell is no special token. The
    room is made smaller for the prompt by what the answer takes, as a server leaves room for one.
    """
    keyword, sentence = KeywordFormat(markers), SentenceFormat(markers)
    for learned, prompted in (
        (
            keyword.pack(story, marked, keywords=keywords, room=room),
            lambda left: keyword.pack(story, marked, room=left),
        ),
        (
            sentence.pack(story, marked, keywords=keywords, knowledge=facts, answer=NEXT, room=room),
            lambda left: sentence.pack(story, marked, keywords=keywords, knowledge=facts, room=left),
        ),
    ):
        start, stop = learned.answer
        prompt = prompted(None if room is None else room - (stop - start))
        assert stop == len(learned.tokens)
        assert learned.tokens[:start] == prompt.tokens
        assert room is None or len(learned.tokens) <= room
        assert prompt.tokens.count(385) == (markers == "tokens")
        assert prompt.tokens[-1] >= 384 or markers == "text"


@pytest.mark.parametrize("markers", ["text", "tokens"])
def test_a_story_that_grows_keeps_its_beginning(marked: Tokenizer, markers: Any) -> None:
    """
    All tokens of the story so far begin the prompts of the next sentence too, for both parts: that is what a cache can
    have. Inverse seen: knowledge in front of the story.
    """
    story = [*TOLD, NEXT, "It is late.", "They go home."]
    predicting, writing = KeywordFormat(markers), SentenceFormat(markers)
    opening = ids("\n", marked) + ids("Keywords:", marked) if markers == "text" else [385]
    for size in range(1, 5):
        told = predicting.pack(story[:size], marked).tokens[: -len(opening)]
        for after in (
            predicting.pack(story[: size + 1], marked),
            writing.pack(story[:size], marked, keywords=["x"], knowledge=FACTS),
            writing.pack(story[: size + 1], marked, keywords=["y"], knowledge=FACTS[1:]),
        ):
            assert after.tokens[: len(told)] == told


def test_what_gives_way(plain: Tokenizer) -> None:
    """Knowledge first, fact by fact; then the story's oldest sentences; keywords stay. A last sentence is cut."""
    format_ = SentenceFormat()
    whole = format_.pack(TOLD, plain, keywords=["park"], knowledge=FACTS)
    fewer = format_.pack(TOLD, plain, keywords=["park"], knowledge=FACTS, room=len(whole.tokens) - 1)
    bare = format_.pack(TOLD, plain, keywords=["park"])
    shorter = format_.pack(TOLD, plain, keywords=["park"], knowledge=FACTS, room=len(bare.tokens) - 1)
    cut = format_.pack(TOLD[:1], plain, keywords=["park"], room=len(bare.tokens) - len(ids(f" {TOLD[1]}", plain)) - 3)

    assert (whole.knowledge, whole.dropped) == (2, 0)
    assert (fewer.knowledge, fewer.dropped) == (1, 0)
    assert text_of(shorter.tokens, plain).startswith("Story: The dog is big.\nKeywords: park\n")
    assert shorter.dropped == 1
    assert cut.dropped == 1
    assert text_of(cut.tokens, plain).endswith("dog.\nKeywords: park\nNext sentence:")
    with pytest.raises(NoRoom, match="room for none of them"):
        format_.pack(TOLD, plain, keywords=["park"], room=20)


@pytest.mark.parametrize(
    ("markers", "text", "expected"),
    [
        ("text", " Park, the ball, park, , a very long walk home", ["park", "the ball", "long walk home"]),
        ("text", "one, two, three, four", ["one", "two", "three"]),
        ("text", " ...", []),
        ("tokens", "Park<|sep|>red ball<|sep|>", ["park", "red ball"]),
    ],
)
def test_keywords_are_read_as_they_were_written(markers: Any, text: str, expected: list[str]) -> None:
    """Small letters, no signs around them, three words of each, three of them, each once."""
    assert KeywordFormat(markers).read(text) == expected


def test_ranker_sequences(tmp_path: Path) -> None:
    """
    A story's last tokens, with keywords as its last sentence, and a fact's first ones, each between the two that an
    encoder's text has.
    """
    write_wordpiece_tokenizer(tmp_path, vocab=256, context=128)
    tokenizer = load_tokenizer(tmp_path)
    format_ = RankerFormat(max_story=8, max_fact=5)
    first, last = tokenizer.encode("", add_special_tokens=True)
    story = tokenizer.encode(" ".join(TOLD), add_special_tokens=False)
    fact = tokenizer.encode(FACTS[0], add_special_tokens=False)

    assert format_.story(TOLD, tokenizer).tokens == (first, *story[-6:], last)
    about = tokenizer.encode(" ".join([*TOLD, "old dog, sea."]), add_special_tokens=False)
    assert format_.story(TOLD, tokenizer, keywords=["old dog", "sea"]).tokens == (first, *about[-6:], last)
    alone = replace(format_, with_keywords=False)
    assert alone.story(TOLD, tokenizer, keywords=["sea"]) == format_.story(TOLD, tokenizer)
    assert format_.fact(FACTS[0], tokenizer).tokens == (first, *fact[:3], last)


@pytest.mark.parametrize(
    "format_",
    [
        KeywordFormat(),
        SentenceFormat("tokens", guide=GUIDE, max_story=99, max_knowledge=0, with_keywords=False),
        RankerFormat(32, 16),
    ],
)
def test_task_files_hold_the_format(tmp_path: Path, format_: StoryFormat) -> None:
    """What is written is read again; what is not sound is refused by name."""
    file = tmp_path / TASK_FILE
    file.write_text(json.dumps(format_.task_file()))

    assert read_task(tmp_path) == format_
    for key in (key for key in format_.task_file() if key != "task"):
        file.write_text(json.dumps({**format_.task_file(), key: -1}))
        with pytest.raises(ModelError) as refused:
            read_task(tmp_path)
        assert refused.value.code == "task_invalid"


def test_a_tokenizer_without_marks_is_refused(plain: Tokenizer) -> None:
    """A task file that names them does not fit the model."""
    with pytest.raises(ValueError, match=r"no special token <\|kw\|>"):
        KeywordFormat("tokens").pack(TOLD, plain)
