"""Small decoders learn from scratch to use what a dialogue stands on: knowledge, and the habits of an actor."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from finetune_jobs import JobDir, make_job, write_rows
from tiny import tiny_llama
from tiny_tokenizers import retrain_bpe_tokenizer

from trilithon_finetune.metrics.knowledge_f1 import mean_word_f1
from trilithon_server.llm import LLM
from trilithon_server.prompts import Sequenced
from trilithon_server.sampling import SamplingParams
from trilithon_server.tasks.dialogue_format import DialogueFormat, Turn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Row = dict[str, Any]
FORMAT = DialogueFormat(max_references=96, max_knowledge=64, max_conversation=96)
THINGS = ("ball", "boat", "cup", "door", "fish", "house", "lamp", "stone", "tree", "wheel")
WORDS = ("amber", "blue", "cold", "dry", "early", "flat", "green", "heavy", "iron", "jolly", "kind", "loud", "merry")


def learned(
    folder: Path, task: str, rows: Sequence[Row], *, epochs: int, small: bool = False, words: Sequence[str] = ()
) -> JobDir:
    """
    A decoder that has learned the rows, its export verified.

    Args:
        small: half of the layers and of the width, and twice the steps.
        words: texts to make a vocabulary of; none: that of the tiny models, nearly letter by letter.
    """
    vocab = 1500 if words else 384
    shape = {"layers": 2, "hidden": 64, "ffn": 128} if small else {"layers": 4, "hidden": 128, "ffn": 256}
    base = tiny_llama(folder / "base", heads=4, groups=4, vocab=vocab, scale=0.1, **shape)
    if words:
        retrain_bpe_tokenizer(base, words, vocab=vocab)
    return make_job(
        folder,
        base,
        write_rows(folder / "train.jsonl", rows),
        task=task,
        training={"epochs": epochs, "batch_size": 16 if small else 32},
        optimizer={"lr": 4e-3 if small else 2e-3},
        tuning={"kind": "full"},
        data={"max_tokens": 256, "validation_share": 0.0},
        options={
            "reference_tokens": FORMAT.max_references,
            "knowledge_tokens": FORMAT.max_knowledge,
            "conversation_tokens": FORMAT.max_conversation,
            "written_answers": 0,
        },
    ).walk()


def opened(model: Path) -> LLM:
    return LLM(model, dtype="float32", kv_cache_bytes=64 << 20, max_batch_sequences=32, max_queued_requests=1000)


def turns(items: Sequence[Mapping[str, str]], actor: str) -> list[Turn]:
    return [Turn("target" if item["author"] == actor else "other", item["text"]) for item in items]


def perplexity(llm: LLM, rows: Sequence[Row]) -> float:
    """Of the last turn's tokens."""
    packs = [
        FORMAT.pack(
            turns(row["target"], row["actor"]),
            llm.tokenizer,
            references=[turns(item, row["actor"]) for item in row.get("refs", ())],
            knowledge=[item["text"] for item in row.get("knowledge", ())],
            open_turn=False,
        )
        for row in rows
    ]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([Sequenced(ids=pack.tokens) for pack in packs], params)
    told = [
        token.logprob
        for pack, output in zip(packs, outputs, strict=True)
        for token in output.prompt_tokens[pack.spans[-1][0] - 1 : pack.spans[-1][1] - 1]
    ]
    return math.exp(-math.fsum(told) / len(told))


def with_others(rows: Sequence[Row], name: str) -> list[Row]:
    """Each row with the next one's `name`."""
    return [{**row, name: other[name]} for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]


def without(rows: Sequence[Row], name: str) -> list[Row]:
    return [{key: value for key, value in row.items() if key != name} for row in rows]


# -- knowledge --------------------------------------------------------------------------------------------------


def facts(count: int, seed: int) -> list[Row]:
    """What a thing is like, is nowhere but in the knowledge."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        things = draw.sample(THINGS, 2)
        words = draw.sample(WORDS, 2)
        known = [f"the {thing} is {word}" for thing, word in zip(things, words, strict=True)]
        asked, said = {"author": "u2", "text": f"and the {things[0]}?"}, {"author": "u1", "text": known[0]}
        found.append({"actor": "u1", "target": [asked, said], "knowledge": [{"text": text} for text in known]})
    return found


@pytest.fixture(scope="module")
def grounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """It has learned to say what the knowledge says."""
    job = learned(tmp_path_factory.mktemp("grounded"), "grounded_dialogue", facts(4000, 1), epochs=1)
    with opened(job.root / "export") as llm:
        yield llm


def test_acc_B06_replies_are_copied_from_the_knowledge(grounded: LLM) -> None:
    """
    On rows that it never saw: the perplexity with their own knowledge is below half of that with another row's, and
    what it writes shares twice as many words with the knowledge as without any.

    Inverse seen: trained with another row's knowledge, it has the same perplexity with both, and shares 0.12 of the
    words with it and 0.08 without.
    """
    rows = facts(200, 2)
    own, shuffled = perplexity(grounded, rows), perplexity(grounded, with_others(rows, "knowledge"))
    known = [row["knowledge"][0]["text"] for row in rows]

    assert own < 0.5 * shuffled
    assert written(grounded, rows, known) >= 2 * written(grounded, without(rows, "knowledge"), known)


def written(llm: LLM, rows: Sequence[Row], known: Sequence[str]) -> float:
    """F1 of the words by which the facts differ, in greedy replies."""
    prompts = [
        FORMAT.pack(
            turns(row["target"][:-1], "u1"),
            llm.tokenizer,
            knowledge=[item["text"] for item in row.get("knowledge", ())],
        )
        for row in rows
    ]
    params = SamplingParams(temperature=0, max_tokens=16, stop=("\n",))
    outputs = llm.generate([Sequenced(ids=prompt.tokens) for prompt in prompts], params)
    said = [output.choices[0].text.rpartition(" is ")[2] for output in outputs]
    return mean_word_f1(said, [text.rpartition(" is ")[2] for text in known])


# -- habits -----------------------------------------------------------------------------------------------------

HABITS = (
    ("aye", "och", "ken", "bonny", "wee"),
    ("howdy", "yall", "shucks", "reckon", "yonder"),
    ("blimey", "cheers", "innit", "mate", "crikey"),
    ("dude", "totally", "rad", "gnarly", "stoked"),
)
"""Of four places with five actors each: the word that an actor likes to begin with, which the others there know too."""
FAITH = 0.7
"""How often an actor begins with its own word; else with another one of its place."""
ACTORS = [(place, own) for place in range(len(HABITS)) for own in range(len(HABITS[0]))]


@dataclass(frozen=True)
class Lines:
    """Short sentences that people said about topics, each once; one in four is kept to judge by."""

    learned: Sequence[str]
    judged: Sequence[str]


@pytest.fixture(scope="module")
def lines(shared_data: Callable[[str], Path]) -> Lines:
    """Of Topical-Chat."""
    with shared_data("dialogue/topical_chat_valid_freq.jsonl").open(encoding="utf-8") as rows:
        turns = [turn["text"] for row in rows for turn in json.loads(row)["turns"]]
    sentences = dict.fromkeys(text for turn in turns for text in re.split(r"(?<=[.!?])\s+", turn))
    short = [text for text in sentences if 3 <= len(text.split()) <= 5]
    return Lines([text for i, text in enumerate(short) if i % 4], short[::4])


def talk(lines: Sequence[str], count: int, seed: int, *, alone: float) -> list[Row]:
    """
    Rows of the actors in turn; the share `alone` of them has no references.

    `other_refs` is of another actor of the same place.
    """
    draw = random.Random(seed)

    def said(actor: tuple[int, int]) -> dict[str, str]:
        place, own = actor
        others = [word for i, word in enumerate(HABITS[place]) if i != own]
        word = HABITS[place][own] if draw.random() < FAITH else draw.choice(others)
        return {"author": "actor", "text": f"{word} {draw.choice(lines)}"}

    found = []
    for i in range(count):
        place, own = actor = ACTORS[i % len(ACTORS)]
        refs, others = ([[said(one) for _ in range(3)]] for one in (actor, (place, (own + 1) % len(HABITS[0]))))
        target = [{"author": "x", "text": draw.choice(lines)}, said(actor)]
        row = {"actor": "actor", "target": target, "refs": refs, "other_refs": others}
        found.append(without([row], "refs")[0] if draw.random() < alone else row)
    return found


@pytest.fixture(scope="module")
def habits(lines: Lines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """It has learned how the actors begin; a quarter of its rows had no references."""
    folder = tmp_path_factory.mktemp("habits")
    rows = talk(lines.learned, 12000, 1, alone=0.25)
    words = [f"{label} {text}\n" for label in ("Me:", "Them:") for text in lines.learned]
    words += [f"Me: {word}\n" for place in HABITS for word in place for _ in range(100)]
    job = learned(folder, "dialogue", without(rows, "other_refs"), epochs=1, small=True, words=words)
    with opened(job.root / "export") as llm:
        yield llm


def test_acc_D05_an_actor_is_known_by_its_references(habits: LLM, lines: Lines) -> None:
    """
    Over 400 turns of sentences that it never saw: own references beat those of another actor of the same place, and
    those beat none; each by 2 % of perplexity and more.

    Inverse seen: trained with the other actor's references, own ones are worth less than another's.
    """
    rows = talk(lines.judged, 400, 2, alone=0.0)
    others = [{**row, "refs": row["other_refs"]} for row in rows]
    own, other, none = (perplexity(habits, asked) for asked in (rows, others, without(rows, "refs")))

    assert own < 0.98 * other
    assert other < 0.98 * none
