"""What a model that writes reads of a passage: the trained prompt, cut where it must be, nothing read as special."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_llama

from trilithon_finetune.recipes.texts import continuation
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer
from trilithon_server.tasks.answer_format import answer_prompt, answer_text
from trilithon_server.tasks.reading import answer_ends, answer_tokens, log_sum, marginal, pack, passage_context

QUESTION, TITLE, TEXT = "How was it built?", "Stonehenge", "It was built in stages, of stones from afar."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level, with special tokens of its own."""
    return load_tokenizer(tiny_llama(tmp_path_factory.mktemp("model") / "writer"))


def test_acc_005_what_is_read_is_what_was_trained(tokenizer: Tokenizer) -> None:
    """Prompt and answer have the tokens that the recipe `answer_qa` learns, and end as it ends them."""
    context = passage_context(TITLE, TEXT)
    head, tail = continuation(tokenizer, answer_prompt(QUESTION, context), answer_text("in stages"))

    assert list(pack(QUESTION, TITLE, TEXT, tokenizer, room=1000).tokens) == head
    assert answer_tokens("in stages", tokenizer) == tail
    assert [tokenizer.eos_ids[0]] in answer_ends(tokenizer)


def test_a_passage_loses_its_end_and_the_question_nothing(tokenizer: Tokenizer) -> None:
    """At every room: whole words from the front, as many as fit; none at all is refused."""
    whole = len(pack(QUESTION, TITLE, TEXT, tokenizer, room=1000).tokens)
    words = passage_context(TITLE, TEXT).split(" ")
    sizes = [len(pack(QUESTION, "", " ".join(words[: i + 1]), tokenizer, room=1000).tokens) for i in range(len(words))]
    for room in range(sizes[0], whole + 1):
        packed = pack(QUESTION, TITLE, TEXT, tokenizer, room=room)
        kept = max(i for i, size in enumerate(sizes) if size <= room)
        text = tokenizer.decode(packed.tokens, skip_special_tokens=True)
        assert text.strip() == answer_prompt(QUESTION, " ".join(words[: kept + 1]))
        assert packed.truncated == (room < whole)
    with pytest.raises(ValueError, match="room for a word"):
        pack(QUESTION, TITLE, TEXT, tokenizer, room=sizes[0] - 1)


def test_no_text_spells_a_special_token(tokenizer: Tokenizer) -> None:
    """An end token written out in a passage, a title or a question is text."""
    spelt = tokenizer.id_to_piece(tokenizer.eos_ids[0])
    packed = pack(f"What is {spelt}?", spelt, f"A {spelt} b", tokenizer, room=1000)

    assert not set(packed.tokens[1:]) & tokenizer.special_ids
    assert not set(answer_tokens(spelt, tokenizer)) & tokenizer.special_ids


def test_titles_are_sentences() -> None:
    """With a full stop of their own, or none where they have one; a passage without a title is the text alone."""
    assert [passage_context(title, " x ") for title in ("A", "A!", "  ")] == ["A. x", "A! x", "x"]


@given(st.lists(st.tuples(st.floats(-700, 0), st.floats(-700, 0)), min_size=1, max_size=6))
def test_a_marginal_is_a_sum(pairs: list[tuple[float, float]]) -> None:
    """In any order, between the largest term and the number of terms as large, and far below the least float."""
    passages, answers = zip(*pairs, strict=True)
    value, most = marginal(passages, answers), max(map(sum, pairs))

    assert most <= value + 1e-9 <= most + math.log(len(pairs)) + 2e-9
    assert value == pytest.approx(marginal(passages[::-1], answers[::-1]), abs=1e-9)
    assert log_sum([]) == log_sum([-math.inf]) == -math.inf
