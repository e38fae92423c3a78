"""How a question about an answer is written down and read: to the token, and over every question of a real set."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tiny_tokenizers import write_bpe_tokenizer

from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer
from trilithon_server.tasks.plain_questions import SIDE_CHARS, question_instruction, question_prompt, read_reply
from trilithon_server.tasks.question_format import QuestionFormat, read_question, written_question

TEXT = "It was late. The mill stood still. The miller counted 12 sacks. Nobody came. The 12 sacks stayed."
START = TEXT.index("12")
MARKED, TYPED = QuestionFormat(), QuestionFormat(roles="types", context="whole")


def said(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of tokens, specials left out."""
    return tokenizer.decode(list(ids), skip_special_tokens=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE with an end token."""
    path = tmp_path_factory.mktemp("tiny")
    write_bpe_tokenizer(path, vocab=384, context=512, chat_template=False)
    return load_tokenizer(path)


def _gpt2(path: Path, shared_data: Callable[[str], Path]) -> Tokenizer:
    files = (str(shared_data(f"tokenizer/gpt2_{name}")) for name in ("vocab.json", "merges.txt"))
    tokenizer = tokenizers.ByteLevelBPETokenizer(*files)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}), encoding="utf-8")
    return load_tokenizer(path)


def _word_pieces(path: Path, minilm: Path) -> Tokenizer:
    """MiniLM's vocabulary with an end token, which decoders have."""
    shutil.copy(minilm / "tokenizer.json", path / "tokenizer.json")
    document = json.loads((minilm / "tokenizer_config.json").read_text("utf-8"))
    (path / "tokenizer_config.json").write_text(json.dumps({**document, "eos_token": "[SEP]"}), encoding="utf-8")
    return load_tokenizer(path)


def test_markers_are_words(tiny: Tokenizer) -> None:
    """The answer's own sentence with one before and one behind, the answer marked where it stands and told again."""
    packed = MARKED.pack(TEXT, (START, START + 2), tiny, question="How many\nsacks?")
    asked = MARKED.pack(TEXT, (START, START + 2), tiny)
    start, stop = packed.question

    assert said(tiny, packed.tokens[:start]) == (
        "Context: The mill stood still. The miller counted << 12 >> sacks. Nobody came.\nAnswer: 12\nquestion:"
    )
    assert said(tiny, packed.tokens[start : stop - 1]) == " How many sacks? :question"
    assert packed.tokens[stop - 1] in tiny.eos_ids
    assert stop == len(packed.tokens)
    assert asked.tokens == packed.tokens[:start]
    assert asked.question == (start, start)
    assert packed.types == ()


@pytest.mark.parametrize("roles", ["markers", "types"])
def test_a_model_of_both_kinds_is_told_which_is_wanted(tiny: Tokenizer, roles: Any) -> None:
    """By the last word of the prompt, alike in all else; a file that says nothing is of one that asks one kind."""
    both = QuestionFormat(roles=roles, unanswerable=True)
    one, other = (both.pack(TEXT, (START, START + 2), tiny, answerable=answerable) for answerable in (True, False))
    plain = QuestionFormat(roles=roles).pack(TEXT, (START, START + 2), tiny)
    word = said(tiny, plain.tokens).removesuffix("question:")
    document = QuestionFormat().task_file()
    del document["unanswerable"]

    assert said(tiny, one.tokens) == f"{word}answerable question:"
    assert said(tiny, other.tokens) == f"{word}unanswerable question:"
    assert len(other.types) == (len(other.tokens) if roles == "types" else 0)
    assert QuestionFormat.from_task_file(document) == QuestionFormat()


def test_types_tell_the_parts(tiny: Tokenizer) -> None:
    """Context 0 with its end token, the answer 1 in it and behind it, the question 2; nothing but text between them."""
    packed = TYPED.pack(TEXT, (START, START + 2), tiny, question="How many?")
    parts = {
        kind: said(tiny, [t for t, type in zip(packed.tokens, packed.types, strict=True) if type == kind])
        for kind in range(3)
    }

    assert len(packed.types) == len(packed.tokens)
    assert parts[0] == TEXT.replace(" 12", "", 1)
    assert parts[1] == " 1212"
    assert parts[2] == "question: How many? :question"
    assert [said(tiny, packed.tokens[slice(*span)]) for span in packed.answers] == [" 12", "12"]
    assert sum(token in tiny.eos_ids for token in packed.tokens) == 3
    assert packed.answer_type == 2


@pytest.mark.parametrize("format_", [MARKED, TYPED], ids=["markers", "types"])
def test_the_answer_meant_is_the_one_marked(tiny: Tokenizer, format_: QuestionFormat) -> None:
    """Of two equal texts the characters say which one; they give different sequences."""
    second = TEXT.rindex("12")
    first, last = (format_.pack(TEXT, (at, at + 2), tiny) for at in (START, second))

    assert first.tokens != last.tokens or first.types != last.types


def test_a_long_context_loses_what_is_far(tiny: Tokenizer) -> None:
    """Tokens go at both ends, what is left is as long as it may be, and the answer with its marks stays whole."""
    text = " ".join(f"word{n}" for n in range(100))
    start = text.index("word50")
    format_ = QuestionFormat(context="whole", max_context=40)
    packed = format_.pack(text, (start, start + 6), tiny)
    edge = format_.pack(text, (0, 5), tiny)
    text = said(tiny, packed.tokens)

    assert " << word50 >> " in text
    assert "word0 " not in text
    assert "word99" not in text
    assert "Context: << word0 >> word1" in said(tiny, edge.tokens)
    with pytest.raises(ValueError, match="and the context at most 4"):
        QuestionFormat(max_context=4).pack(text, (start, start + 6), tiny)


@pytest.mark.parametrize(
    ("written", "question"),
    [
        (" How many? :question", "How many?"),
        (" how many ? : question", "how many ?"),
        (" How many? :question question: Why? :question", "How many?"),
        (" How many?", None),
        ("  :question", None),
        ("", None),
    ],
)
def test_what_has_no_end_is_no_question(written: str, question: str | None) -> None:
    """The text up to the first end word; without one, or with nothing before it, there is no question."""
    assert read_question(written) == question


@pytest.mark.parametrize("roles", ["markers", "types"])
@pytest.mark.parametrize("vocabulary", ["gpt2", "smollm2", "wordpiece"])
def test_acc_E02_every_question_comes_back(
    vocabulary: str,
    roles: str,
    shared_data: Callable[[str], Path],
    smollm2_dir: Path,
    minilm_dir: Path,
    tmp_path: Path,
) -> None:
    """
    All questions of XQuAD, packed, decoded and read, are themselves; the tokens of type 1 in the context are exactly
    the answer, and the server's prompt is what the recipe learns up to the question. Inverse seen red: an answer
    that ends a character early.
    """
    tokenizer = {
        "gpt2": lambda: _gpt2(tmp_path, shared_data),
        "smollm2": lambda: load_tokenizer(smollm2_dir),
        "wordpiece": lambda: _word_pieces(tmp_path, minilm_dir),
    }[vocabulary]()
    format_ = QuestionFormat(roles=roles, context="whole", max_context=1 << 20)  # type: ignore[arg-type]  # of the two

    def same(text: str) -> str:
        """Without what an uncased vocabulary of words doesn't keep; others keep all but spaces."""
        if vocabulary != "wordpiece":
            return " ".join(text.split())
        return "".join(said(tokenizer, tokenizer.encode(text, add_special_tokens=False)).split())

    count = 0
    for article in json.loads(shared_data("qa/xquad_en.json").read_text("utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for item in paragraph["qas"]:
                text, answer = paragraph["context"], item["answers"][0]
                span = answer["answer_start"], answer["answer_start"] + len(answer["text"])
                packed = format_.pack(text, span, tokenizer, question=item["question"])
                start, stop = packed.question
                found = read_question(said(tokenizer, packed.tokens[start:stop]))

                assert found is not None
                assert same(found) == same(item["question"])
                for place in packed.answers:
                    assert same(said(tokenizer, packed.tokens[slice(*place)])) == same(answer["text"])
                before = said(tokenizer, packed.tokens[: packed.answers[0][0]])
                assert same(text[: span[0]]) in same(before)
                assert format_.pack(text, span, tokenizer).tokens == packed.tokens[:start]
                count += 1

    assert count == 991


def test_a_task_file_comes_back() -> None:
    """What is written is read; what nobody wrote is refused."""
    assert QuestionFormat.from_task_file(TYPED.task_file()) == TYPED
    with pytest.raises(ValueError, match="roles: Input should be 'markers' or 'types'"):
        QuestionFormat.from_task_file({**TYPED.task_file(), "roles": "colours"})


def test_plain_words_ask_and_are_read() -> None:
    """A model without the format is asked in words; of its reply the first question counts."""
    asked = question_instruction(TEXT, (START, START + 2))

    assert asked.startswith("Text: The mill stood still. The miller counted 12 sacks. Nobody came.\n")
    assert 'must be "12"' in asked
    assert question_prompt(TEXT, (START, START + 2)) == f"{asked}\n\nQuestion:"
    assert len(question_instruction("a" * 9000, (4000, 4003))) < 2300
    assert len(question_instruction("a" * 9000, (4000, 4000 + SIDE_CHARS))) < 4300
    with pytest.raises(ValueError, match="the answer has 1001 characters"):
        question_prompt("a" * 9000, (4000, 4001 + SIDE_CHARS))
    assert read_reply("Sure!\n1. **How many sacks?**\n2. Who came?") == "How many sacks?"
    assert read_reply("There were twelve sacks.") is None
    assert written_question(" a \n b ") == " a b :question"
