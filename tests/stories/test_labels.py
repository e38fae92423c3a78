"""Labels of stories against brute force, rows that are wrong, and what recipes make of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from finetune_tasks.encoder_fixtures import context_for, samples_of
from tiny_tokenizers import write_bpe_tokenizer

from trilithon.cli import main
from trilithon_finetune.data.story_labels import LabelOptions, StoryLabeller, TextEncoder, read_stories
from trilithon_finetune.recipes import RECIPES
from trilithon_finetune.recipes.base import IGNORE, Context, Output, Sample
from trilithon_finetune.train.text_encoder import open_encoder
from trilithon_parallel.contrast_terms import ANSWER, NOTHING, OTHER, QUERY
from trilithon_parallel.tokenizer import Tokenizer, load_tokenizer
from trilithon_server.knowledge.concepts import Concepts, read_concepts
from trilithon_server.knowledge.keywords import keywords
from trilithon_server.tasks.story_format import KeywordFormat, RankerFormat, SentenceFormat

KEYWORDS, GENERATOR, RANKER = (RECIPES[f"story_{name}"] for name in ("keywords", "generator", "ranker"))
STORY = {
    "sentences": ["The miller had a dog.", "The dog saw a boat.", "It is so.", "A lamp was in the boat."],
    "title": "The miller",
}
STEP = {"keywords": ["dog"], "facts": ["dog can bark", "dog desires bone"], "ranked": ["dog is at kennel"],
        "others": ["dog is at kennel"]}  # fmt: skip
LABELLED = {"sentences": STORY["sentences"][:2], "steps": [STEP]}


@pytest.fixture(scope="module")
def known(concepts: Path) -> Concepts:
    """The facts of the server's tests."""
    return read_concepts(concepts)


@pytest.fixture(scope="module")
def vectors(encoder: Path) -> Iterator[TextEncoder]:
    """The encoder of the server's tests, in this process."""
    with open_encoder(encoder) as opened:
        yield opened


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of a decoder."""
    path = tmp_path_factory.mktemp("words")
    write_bpe_tokenizer(path, vocab=384, context=512, chat_template=False)
    return load_tokenizer(path)


def cosines(
    encoder: TextEncoder, story: Sequence[str], words: Sequence[str], texts: Sequence[str]
) -> npt.NDArray[np.float32]:
    format_ = RankerFormat()
    asked = [
        format_.story(story, encoder.tokenizer, keywords=words),
        *(format_.fact(text, encoder.tokenizer) for text in texts),
    ]
    rows = encoder.vectors([one.tokens for one in asked])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[1:] @ rows[0]


def test_acc_C04_labels_are_the_best_by_brute_force(known: Concepts, vectors: TextEncoder) -> None:
    """
    `facts` are the top of all candidates by the cosine with the story and its next sentence, `ranked` by that with the
    sentence's keywords in its place, `others` what is left; keywords are those of the sentence. Inverse seen: the
    sentence left out of the story.
    """
    labelled = StoryLabeller(known, vectors, LabelOptions(facts=2, others=2)).label(STORY)
    sentences = STORY["sentences"]

    assert labelled["title"] == "The miller"
    assert labelled["labelled_by"]["concepts"] == known.digest
    assert labelled["labelled_by"]["encoder"] == vectors.digest
    assert labelled["labelled_by"]["options"] == {"facts": 2, "others": 2, "per_keyword": 100}
    for i, step in enumerate(labelled["steps"], start=1):
        assert step["keywords"] == keywords(sentences[i])
        texts = [fact.text for fact in known.graph.facts(step["keywords"]).facts]
        for name, story, words in (("facts", sentences[: i + 1], ()), ("ranked", sentences[:i], step["keywords"])):
            scores = dict(zip(texts, cosines(vectors, story, words, texts), strict=True)) if texts else {}
            assert step[name] == sorted(texts, key=lambda text: -round(float(scores[text]), 5))[:2]
        assert set(step["others"]) <= set(texts) - set(step["facts"])
        assert len(step["others"]) == min(2, max(0, len(texts) - 2))
    assert [len(step["facts"]) for step in labelled["steps"]] == [2, 0, 2]


def test_labels_do_not_depend_on_what_was_labelled_before(known: Concepts, vectors: TextEncoder) -> None:
    """Vectors of facts are kept, and a story that comes later is labelled as if it were the first."""
    other = {"sentences": ["A lamp was red.", "The dog saw the lamp.", "The boat was late."]}
    labeller = StoryLabeller(known, vectors)

    assert labeller.label(other) != labeller.label(STORY)
    assert labeller.label(STORY) == StoryLabeller(known, vectors).label(STORY)


def test_the_command_labels_a_file(encoder: Path, concepts: Path, known: Concepts, vectors: TextEncoder, tmp_path: Path,
                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """What it writes is what the labeller says, a row a line; a row that is no story is exit code 3, with its line."""
    source, target = tmp_path / "stories.jsonl", tmp_path / "labelled.jsonl"
    source.write_text(f"{json.dumps(STORY)}\n{json.dumps(LABELLED)}\n")
    flags = ["--concepts", str(concepts), "--encoder", str(encoder), "-o", str(target)]

    assert main(["data", "stories", str(source), *flags]) == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert rows == [StoryLabeller(known, vectors).label(row) for row in (STORY, LABELLED)]
    assert "2 stories, 3 of 4 sentences with facts" in capsys.readouterr().out
    assert read_stories(target) == rows
    source.write_text(f"{json.dumps(STORY)}\n" + '{"sentences": ["One."]}\n')
    assert main(["data", "stories", str(source), *flags]) == 3
    assert "stories.jsonl:2  sentences: must hold at least 2 sentences" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "code", "path"),
    [
        ({}, "E-DATA-008", "sentences"),
        ({"sentences": ["One."]}, "E-DATA-022", "sentences"),
        ({"sentences": ["One.", " "]}, "E-DATA-015", "sentences[1]"),
        ({"sentences": ["One.", 2]}, "E-DATA-008", "sentences[1]"),
        ({"sentences": ["One.", "Two."], "tittle": "x"}, "E-DATA-007", "tittle"),
        ({"sentences": ["One.", "Two."], "title": 3}, "E-DATA-008", "title"),
        ({"sentences": ["One.", "Two."], "steps": []}, "E-DATA-008", "steps"),
        ({"sentences": ["One.", "Two."], "steps": [[]]}, "E-DATA-008", "steps[0]"),
        ({"sentences": ["One.", "Two."], "steps": [{}]}, "E-DATA-008", "steps[0].keywords"),
        (
            {"sentences": ["One.", "Two."], "steps": [{"keywords": [], "facts": [""]}]},
            "E-DATA-015",
            "steps[0].facts[0]",
        ),
        ({"sentences": ["One.", "Two."], "steps": [{"keywords": [], "fact": []}]}, "E-DATA-007", "steps[0].fact"),
    ],
)
def test_R11_what_is_wrong_with_a_row_is_told(row: dict[str, Any], code: str, path: str) -> None:
    """Missing parts, unknown keys, other kinds, too few sentences or steps."""
    found = GENERATOR.check(row, GENERATOR.formats[0], file="f", line=1)

    assert (found[0].code, found[0].path) == (code, path)
    assert GENERATOR.check({**STORY, "id": "1", "source": "us"}, GENERATOR.formats[0], file="f", line=1) == []


def test_a_ranker_needs_labels(encoder: Path) -> None:
    """It is told how to come by them; of facts that all fit nothing can be learned."""
    context = context_for(RANKER, load_tokenizer(encoder))
    (found,) = RANKER.encode(STORY, 1, context, file="f")
    (bare,) = RANKER.encode({**LABELLED, "steps": [{**STEP, "others": []}]}, 7, context, file="f")

    assert not isinstance(found, Sample)
    assert not isinstance(bare, Sample)
    assert (found.code, found.path) == ("E-DATA-008", "steps")
    assert "options.concepts" in found.hint
    assert "trilithon data stories" in found.hint
    assert (bare.code, bare.path, "more concepts" in bare.hint) == ("E-DATA-022", "steps", True)
    assert samples_of(list(RANKER.encode(LABELLED, 1, context, file="f")))


def learned(sample: Sample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([target for target in sample.targets if target != IGNORE], skip_special_tokens=False)


def test_acc_005_samples_are_the_servers_sequences(words: Tokenizer) -> None:
    """
    What a recipe trains on is what the formats of the server pack, and only the answer is learned. Sentences of stop
    words have no keywords to learn.
    """
    keyword = context_for(KEYWORDS, words)
    generator = context_for(GENERATOR, words, options={"predicted_share": 0.0, "facts": 1})
    told = STORY["sentences"]
    said = samples_of(list(KEYWORDS.encode(STORY, 4, keyword, file="f")))
    written = samples_of(list(GENERATOR.encode(LABELLED, 4, generator, file="f")))

    assert [learned(sample, words) for sample in said] == [" dog saw, boat\n", " lamp, boat\n"]
    assert [(sample.row, sample.part) for sample in said] == [(4, 1), (4, 3)]
    format_ = KEYWORDS.task_file(keyword, {})
    packed = KeywordFormat.from_task_file(format_).pack(told[:3], words)
    assert said[1].tokens[: len(packed.tokens)] == packed.tokens
    prompt = SentenceFormat.from_task_file(GENERATOR.task_file(generator, {})).pack(
        told[:1], words, keywords=["dog"], knowledge=["dog can bark"]
    )
    assert written[0].tokens[: len(prompt.tokens)] == prompt.tokens
    assert learned(written[0], words) == f" {told[1]}\n"


def test_a_generator_learns_with_both_kinds_of_facts(words: Tokenizer) -> None:
    """By the share of the option, the same each time; it is judged with what a server would choose alone."""

    def texts(context: Context) -> list[str]:
        rows = [{**LABELLED, "sentences": [f"The dog {i} was here.", "It barked."]} for i in range(200)]
        samples = [
            s for i, row in enumerate(rows) for s in samples_of(list(GENERATOR.encode(row, i, context, file="f")))
        ]
        return [words.decode(sample.tokens, skip_special_tokens=False) for sample in samples]

    mixed = context_for(GENERATOR, words, options={"predicted_share": 0.25})
    first = texts(mixed)
    judged = texts(Context(**{**vars(mixed), "validating": True}))

    assert first == texts(mixed)
    assert 0.15 < sum("Knowledge: dog is at kennel\n" in text for text in first) / 200 < 0.35
    assert all(("kennel" in text) != ("Knowledge: dog can bark; dog desires bone\n" in text) for text in first)
    assert all("Knowledge: dog is at kennel\n" in text for text in judged)


def test_a_base_without_marks_cannot_learn_them(words: Tokenizer) -> None:
    """The finding says which is missing, and what to set."""
    context = context_for(GENERATOR, words, options={"markers": "tokens"})
    (found,) = GENERATOR.encode(STORY, 1, context, file="f")

    assert not isinstance(found, Sample)
    assert (found.code, "Set options.markers to text" in found.hint) == ("E-DATA-022", True)
    assert "<|story|>" in found.message


def test_word_perplexity_counts_words(words: Tokenizer) -> None:
    """exp of what all sentences lose, by the words that stand between spaces."""
    rows = {1: STORY}
    outputs = [
        Output(Sample((1,), row=1, part=part), np.array([loss, 0], np.float32))
        for part, loss in ((1, -4.0), (2, -10.0))
    ]

    assert GENERATOR.metrics(outputs, rows, context_for(GENERATOR, words)) == {"word_perplexity": np.exp(14 / 8)}
    assert GENERATOR.metrics([], rows, context_for(GENERATOR, words)) == {}


def test_facts_that_fit_are_not_told_from_each_other(encoder: Path) -> None:
    """
    One group of a sentence: the story, facts that fit, others, and nothing where there are too few of them; of more
    facts than are asked for some of all ranks.
    """
    tokenizer, facts = load_tokenizer(encoder), [f"dog likes {name}" for name in ("boat", "lamp", "bone", "kennel")]
    context = context_for(RANKER, tokenizer, options={"positives": 2, "negatives": 2})
    samples = samples_of(list(RANKER.encode(LABELLED, 7, context, file="f")))
    more = {**LABELLED, "steps": [{**STEP, "facts": facts}]}
    many = samples_of(list(RANKER.encode(more, 7, context, file="f")))

    assert [s.columns["role"] for s in samples] == [QUERY, ANSWER, ANSWER, OTHER, NOTHING]
    assert {s.columns["pair"] for s in samples} == {0}
    story, words = LABELLED["sentences"][:1], STEP["keywords"]
    assert samples[0].tokens == RankerFormat().story(story, tokenizer, keywords=words).tokens
    alone = context_for(RANKER, tokenizer, options={"with_keywords": False})
    (plain, *_) = samples_of(list(RANKER.encode(LABELLED, 7, alone, file="f")))
    assert samples[0].tokens != plain.tokens == RankerFormat().story(story, tokenizer).tokens
    assert RANKER.task_file(alone, {})["with_keywords"] is False
    assert samples[2].tokens == RankerFormat().fact("dog desires bone", tokenizer).tokens
    assert [s.num_supervised for s in samples] == [1, 0, 0, 0, 0]
    assert [s.tokens for s in many[1:3]] == [RankerFormat().fact(facts[i], tokenizer).tokens for i in (0, 2)]
