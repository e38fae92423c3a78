"""Small decoders learn from scratch to use what a dialogue stands on: knowledge, and the habits of an actor."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from finetune_jobs import JobDir, make_job, write_rows
from tiny import tiny_llama

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


def learned(folder: Path, task: str, rows: Sequence[Row], *, epochs: int) -> JobDir:
    """A decoder of four layers that has learned the rows, its export verified."""
    base = tiny_llama(folder / "base", layers=4, hidden=128, heads=4, groups=4, ffn=256, scale=0.1)
    return make_job(
        folder,
        base,
        write_rows(folder / "train.jsonl", rows),
        task=task,
        training={"epochs": epochs, "batch_size": 32},
        optimizer={"lr": 2e-3},
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

ACTORS = 20
OPENINGS = ("well", "hm", "oh", "so", "ah", "look", "now", "right", "fine", "yes")


def talk(count: int, seed: int) -> list[Row]:
    """Twenty actors, each of whom begins and ends every turn with words of its own."""
    draw = random.Random(seed)

    def turn(actor: int, text: str) -> dict[str, str]:
        opening, ending = OPENINGS[actor % 10], WORDS[actor // 2]
        return {"author": f"u{actor}", "text": f"{opening} {text} {ending}"}

    def line() -> str:
        return f"the {draw.choice(THINGS)} by the {draw.choice(THINGS)}"

    found = []
    for i in range(count):
        actor = i % ACTORS
        refs = [[{"author": "x", "text": line()}, turn(actor, line())] for _ in range(2)]
        target = [{"author": "x", "text": line()}, turn(actor, line())]
        found.append({"actor": f"u{actor}", "target": target, "refs": refs})
    return found


def test_acc_D05_an_actor_is_known_by_its_references(tmp_path: Path) -> None:
    """
    Over 200 turns that it never saw: own references beat those of another actor, and those beat none; each by 2 % of
    perplexity and more.
    """
    rows = talk(200, 2)
    job = learned(tmp_path, "dialogue", talk(4000, 1), epochs=1)
    with opened(job.root / "export") as llm:
        own, others, none = (
            perplexity(llm, asked) for asked in (rows, with_others(rows, "refs"), without(rows, "refs"))
        )

    assert own < 0.98 * others
    assert others < 0.98 * none
