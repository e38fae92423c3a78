"""How encoder-decoders read a passage: either vocabulary's parts, what is cut, and how an answer ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_tokenizers import write_bpe_tokenizer, write_metaspace_tokenizer, write_wordpiece_tokenizer

from trilithon_parallel.config import ModelError
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer
from trilithon_server.tasks.reader_format import ReaderFormat, read_answer

FORMAT = ReaderFormat(max_question_tokens=12, max_passage_tokens=40, max_answer_tokens=6)


@pytest.fixture(scope="module", params=["wordpiece", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One of either kind."""
    path = tmp_path_factory.mktemp("tokenizer")
    if request.param == "wordpiece":
        write_wordpiece_tokenizer(path, vocab=256, context=512)
    else:
        write_metaspace_tokenizer(path, vocab=256)
    return load_tokenizer(path)


def shown(tokens: tuple[int, ...] | list[int], tokenizer: Tokenizer) -> str:
    """A sequence with its special tokens."""
    return tokenizer.decode(tokens, skip_special_tokens=False)


def test_the_vocabulary_says_how_parts_are_told_apart(tokenizer: Tokenizer) -> None:
    """By separators, or by words; a passage without a title has no part for it."""
    is_bert = tokenizer.bos_id is None and len(tokenizer.encode("", add_special_tokens=True)) == 2
    packed = FORMAT.pack(" the mason? ", "village", "the stones.", tokenizer)
    untitled = FORMAT.pack("the mason?", " ", "the stones.", tokenizer)

    if is_bert:
        assert shown(packed.tokens, tokenizer) == "[CLS] the mason? [SEP] village [SEP] the stones. [SEP]"
        assert shown(untitled.tokens, tokenizer) == "[CLS] the mason? [SEP] the stones. [SEP]"
    else:
        assert shown(packed.tokens, tokenizer) == "question: the mason? title: village context: the stones.</s>"
        assert shown(untitled.tokens, tokenizer) == "question: the mason? context: the stones.</s>"
    assert not packed.truncated


def test_what_is_too_long_loses_its_end(tokenizer: Tokenizer) -> None:
    """Questions, passages and answers, each at its own limit; the end token stays."""
    packed = FORMAT.pack("what holds it up " * 9, "winter", "the miller counted " * 40, tokenizer)
    short = FORMAT.pack("what", "winter", "the miller", tokenizer)
    answer = FORMAT.answer_tokens("the people of the village came to look", tokenizer)
    _, *_, end = tokenizer.encode("x", add_special_tokens=True)

    assert (len(packed.tokens), packed.truncated, short.truncated) == (40, True, False)
    assert packed.tokens[-1] == end
    assert (len(answer), answer[-1]) == (6, end)
    assert FORMAT.answer_tokens("", tokenizer) == [end]


def test_nothing_that_is_given_is_a_special_token(tokenizer: Tokenizer) -> None:
    """Written out in a question, a title, a text or an answer, `[SEP]` and `</s>` are text."""
    end = tokenizer.encode("x", add_special_tokens=True)[-1]
    mark = tokenizer.id_to_piece(end)
    clean = FORMAT.pack("a", "b", "c", tokenizer).tokens
    packed = FORMAT.pack(f"a {mark}", f"b {mark}", f"c {mark}", tokenizer).tokens

    assert packed.count(end) == clean.count(end)
    assert FORMAT.answer_tokens(f"a {mark}", tokenizer).count(end) == 1


def test_an_answer_comes_back(tokenizer: Tokenizer) -> None:
    """What is written is read, without its end."""
    tokens = FORMAT.answer_tokens("the mason", tokenizer)

    assert read_answer(tokenizer.decode(tokens, skip_special_tokens=True)) == "the mason"


def test_R11_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    """What puts nothing behind a text cannot say where an answer ends."""
    write_bpe_tokenizer(tmp_path, vocab=384, context=512, chat_template=False)
    with pytest.raises(ModelError, match=r"one token after a text.* Given: 0 around an empty text") as caught:
        FORMAT.pack("a", "b", "c", load_tokenizer(tmp_path))
    assert caught.value.code == "task_tokenizer"
