"""Names of people as tags: which words are names, one tag for each, and names back in what is told."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from finetune_tasks.encoder_fixtures import context_for, samples_of
from hypothesis import given
from hypothesis import strategies as st
from served import Server, serving
from tiny import tiny_llama
from tiny_tokenizers import write_bpe_tokenizer

from trilithon_finetune.recipes import RECIPES
from trilithon_finetune.recipes.base import IGNORE, Sample
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer
from trilithon_server.knowledge import names as names_module
from trilithon_server.knowledge.names import TAGS, cut_at_names, names_of, with_names
from trilithon_server.story_telling import first_end, seed_of
from trilithon_server.tasks.story_format import KeywordFormat, SentenceFormat

STORY = ["A girl named Anna had a dog.", "Tom asked if it was his.", 'Anna said, "No."']
NEXT = "Then Tom gave Anna a ball for Annabel."
NAMES = {"Anna": "[FEMALE]", "Tom": "[MALE]"}
SEED = 10
MARKS = ("<|story|>", "<|kw|>", "<|know|>", "<|sep|>", *TAGS)


def with_marks(path: Path, *, first: int) -> Path:
    """Add the marks of stories and the tags of names to a tokenizer's file, from this id on."""
    document: dict[str, Any] = json.loads((path / "tokenizer.json").read_text("utf-8"))
    like = document["added_tokens"][0]
    document["added_tokens"] += [{**like, "id": first + i, "content": text} for i, text in enumerate(MARKS)]
    (path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE with the marks and tags as special tokens 384 .. 390."""
    path = tmp_path_factory.mktemp("tagged")
    write_bpe_tokenizer(path, vocab=384, context=512, chat_template=False)
    return load_tokenizer(with_marks(path, first=384))


@pytest.mark.parametrize(
    ("story", "names"),
    [
        (STORY, NAMES),
        (["There was a man named Sam."], {"Sam": "[MALE]"}),
        (["A fox named Rex ran."], {"Rex": "[NEUTRAL]"}),
        (["A fox named Rex ran.", "She was late."], {"Rex": "[FEMALE]"}),
        (["She said no.", "Someone cried.", "They asked why."], {}),
        (["Tom ran home."], {}),
        (
            ["Tom said he was ill.", "Max said he was too.", "Ben said he was not."],
            {"Tom": "[MALE]", "Max": "[NEUTRAL]"},
        ),
    ],
)
def test_a_name_has_one_tag_and_a_tag_one_name(story: list[str], names: dict[str, str]) -> None:
    """By the word before "named", else by the next pronoun; where the tags are taken, the name stays a word."""
    assert names_of(story) == names


def test_names_are_found_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Pronouns are looked for once in each character of a story, though hundreds of names stand there and one tag is
    free to the end. Inverse seen: the rest of the story is read anew for every name.
    """

    class Counting:
        """A pattern that counts the characters that it is given."""

        read = 0

        def __init__(self, pattern: re.Pattern[str]) -> None:
            self._pattern = pattern

        def search(self, text: str) -> re.Match[str] | None:
            self.read += len(text)
            return self._pattern.search(text)

        def finditer(self, text: str) -> Iterator[re.Match[str]]:
            self.read += len(text)
            return self._pattern.finditer(text)

    pattern = Counting(names_module._PRONOUN)
    monkeypatch.setattr(names_module, "_PRONOUN", pattern)
    story = [f"N{i}x said so." for i in range(500)]

    assert names_of(["A boy named Tom ran.", *story]) == {"Tom": "[MALE]", "N0x": "[NEUTRAL]"}
    assert pattern.read == len(" ".join(["A boy named Tom ran.", *story]))


@given(st.lists(st.sampled_from(["A girl named Anna", "Tom said", "Max asked", "Zoe cried", " he", " HER.", "x"])))
def test_the_next_pronoun_tells(parts: list[str]) -> None:
    """Where no word before the name does: as by reading what follows the name."""
    text = " ".join(parts)
    told: dict[str, str] = {}
    for match in names_module._NAME.finditer(text):
        name = match[2] or match[3]
        word = re.search(r"\b(he|her)\b", text[match.end() :], re.IGNORECASE)
        is_female = match[1] == "girl" or (word is not None and word[1].lower() == "her")
        tag = "[FEMALE]" if is_female else "[MALE]" if word is not None else "[NEUTRAL]"
        free = [one for one in (tag, "[NEUTRAL]") if one not in told.values()]
        if name not in told and free:
            told[name] = free[0]

    assert names_of([text]) == told


@given(st.lists(st.sampled_from(["Anna", "Tom", " ", "anna", "Tom's", "[MALE", "said ", ". ", "Annabel"]), max_size=9))
def test_a_text_has_its_names_back(parts: list[str]) -> None:
    """Cut at its names it is the text; with tags for names, and names for tags, it is the text again."""
    text = "".join(parts)
    cut = list(cut_at_names(text, NAMES))

    assert "".join(part for part, _ in cut) == text
    assert with_names("".join(tag or part for part, tag in cut), NAMES) == text
    assert all(tag == NAMES.get(part, "") for part, tag in cut)


def test_tags_are_atomic_and_no_text_spells_them(tagged: Tokenizer) -> None:
    """
    Every name of the story is its one token, in what is told, in keywords of small letters, and in the answer; facts
    and other words stay, and a text that spells a tag is text. Inverse seen: names taken from the answer too.
    """
    format_ = SentenceFormat("tokens", names="tags")
    story = [*STORY[:2], "It spelt [MALE] here."]
    answer = f"{NEXT} Zoe said hi."
    packed = format_.pack(story, tagged, keywords=["tom", "red ball"], knowledge=["Tom is a name"], answer=answer)
    male, female, neutral = (384 + MARKS.index(tag) for tag in TAGS)
    text = tagged.decode(packed.tokens, skip_special_tokens=False)

    assert "A girl named [FEMALE] had a dog. [MALE] asked if it was his." in text
    assert "<|kw|>[MALE]<|sep|>red ball<|know|>Tom is a name<|story|>" in text
    assert " Then [MALE] gave [FEMALE] a ball for Annabel. Zoe said hi." in text
    assert (packed.tokens.count(male), packed.tokens.count(female), packed.tokens.count(neutral)) == (3, 2, 0)
    assert text.count("[MALE]") == 4
    with pytest.raises(ValueError, match=r"no special token \[MALE\]"):
        format_.check(_without_tags(tagged))


def _without_tags(tokenizer: Tokenizer) -> Tokenizer:
    class Bare:
        special_ids = frozenset(range(384, 388))

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=add_special_tokens))

    return Bare()  # type: ignore[return-value]  # what `special` asks


def test_acc_005_recipes_learn_what_servers_ask_for(tagged: Tokenizer) -> None:
    """The option makes both tasks' samples, and their task files, those of the format with tags."""
    row = {"sentences": [*STORY, NEXT]}
    for name, format_ in (
        ("story_keywords", KeywordFormat("tokens", max_story=160, names="tags")),
        ("story_generator", SentenceFormat("tokens", max_story=160, max_knowledge=64, names="tags")),
    ):
        recipe = RECIPES[name]
        context = context_for(recipe, tagged, options={"markers": "tokens", "names": "tags"}, max_tokens=256)
        last = samples_of(list(recipe.encode(row, 1, context, file="f")))[-1]
        assert isinstance(last, Sample)
        words = ["tom gave anna", "ball", "annabel"]
        prompt = (
            format_.pack(STORY, tagged) if name == "story_keywords" else format_.pack(STORY, tagged, keywords=words)
        )
        learned = tagged.decode([t for t in last.targets if t != IGNORE], skip_special_tokens=False)

        assert type(format_).from_task_file(recipe.task_file(context, {})) == format_
        assert last.tokens[: len(prompt.tokens)] == prompt.tokens
        assert "[MALE] gave [FEMALE]" in learned
        assert "Tom" not in learned


def test_a_file_without_names_reads_them_as_words() -> None:
    """As models do that were exported before there were tags."""
    document = SentenceFormat().task_file()
    del document["names"]

    assert SentenceFormat.from_task_file(document) == SentenceFormat()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of random weights whose task file says tags."""
    path = tiny_llama(tmp_path_factory.mktemp("tags") / "teller", vocab=391, context=512)
    write_bpe_tokenizer(path, vocab=384, context=512, chat_template=False)
    format_ = SentenceFormat("tokens", max_story=256, names="tags")
    (path / "task.json").write_text(json.dumps(format_.task_file()))
    return with_marks(path, first=384)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """It tells stories alone."""
    with serving(model, "--dtype", "float32") as started:
        yield started


def test_a_served_story_has_names_and_no_tags(server: Server, model: Path) -> None:
    """
    Drawn from all tokens alike, some are tags: of the story's names alone, and told are the names. Each sentence is
    what the plain route writes from the prompt with tags. Inverse seen: tags that stand for nobody not banned.
    """
    tokenizer = load_tokenizer(model)
    drawn = {"temperature": 5, "top_k": 0, "max_tokens": 100}
    body = {"first_sentence": STORY[0], "seed": SEED, "sentences": 2, **drawn,
            "controls": [{"index": index, "keywords": ["anna"]} for index in (2, 3)]}  # fmt: skip
    response = httpx.post(f"{server.url}/v1/stories", json=body, timeout=120)
    assert response.status_code == 200, response.text
    told = [one["text"] for one in response.json()["sentences"]]
    format_ = SentenceFormat("tokens", max_story=256, names="tags")
    for index in (2, 3):
        story = told[: index - 1]
        banned = format_.drawing(story, tokenizer)["logit_bias"]
        plain = {
            "prompt": list(format_.pack(story, tokenizer, keywords=["anna"]).tokens), "seed": seed_of(SEED, index),
            **drawn, "skip_special_tokens": False, "logit_bias": {str(token): value for token, value in banned.items()},
        }  # fmt: skip
        text = httpx.post(f"{server.url}/v1/generate", json=plain, timeout=60).json()["choices"][0]["text"]
        assert told[index - 1] == " ".join(text[: first_end(text)].replace("[FEMALE]", "Anna").split())

    assert "Anna" in told[1] + told[2]
    assert not any(mark in text for mark in (*MARKS, "<|") for text in told)
