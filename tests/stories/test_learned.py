"""A generator that learned to say what it is told, in a made-up world in which only facts know what happens."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from finetune_jobs import JobDir, make_job, write_rows
from tiny import tiny_llama

from trilithon_finetune.metrics.control import Controlled, control_rate
from trilithon_finetune.metrics.texts import num_words
from trilithon_finetune.phases.verify import loaded_stage, outputs_of_stage
from trilithon_finetune.recipes.base import Sample
from trilithon_finetune.setup import read_job
from trilithon_finetune.train.work import open_work
from trilithon_parallel.config import load_config
from trilithon_server.knowledge.antonyms import WordRelations
from trilithon_server.llm import LLM
from trilithon_server.sampling import SamplingParams
from trilithon_server.tasks.story_format import SentenceFormat

ACTORS = ("dog", "king", "fox", "girl", "cook", "bird", "duke", "nurse")
ITEMS = ("lamp", "fork", "boat", "drum", "kite", "coin", "harp", "sock", "vase", "jam", "rope", "mask", "pie", "axe",
         "fig", "bell", "hat", "net", "owl", "pen", "rug", "saw", "tub", "urn")  # fmt: skip
WORLD = [(actor, f"{one} {two}") for actor in ACTORS for one, two in itertools.permutations(ITEMS, 2)]
random.Random(5).shuffle(WORLD)


def row(actor: str, items: str, *, knows: bool, said: str = "") -> dict[str, Any]:
    """A story whose second sentence says what the fact of its keyword says; with it, without, or with another one."""
    facts = [f"{actor} has {said or items}"] if knows else []
    step = {"keywords": [actor], "facts": facts, "ranked": facts}
    return {"sentences": ["It was day.", f"The {actor} has {items}."], "steps": [step]}


def train_tokenizer(path: Path) -> None:
    """Byte-level BPE in which every word of the world is one piece; special tokens stay where they are."""
    document = json.loads((path / "tokenizer.json").read_text("utf-8"))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = [token["content"] for token in sorted(document["added_tokens"], key=lambda token: token["id"])]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    labels = ["Story: It was day.\nKeywords:\nKnowledge:\nNext sentence: The has\n"] * 200
    tokenizer.train_from_iterator([*labels, *(f" {word}" for word in (*ACTORS, *ITEMS) for _ in range(50))], trainer)
    (path / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> JobDir:
    """A job that ended: half of its stories came with their fact, half without."""
    folder = tmp_path_factory.mktemp("learned")
    model = tiny_llama(folder / "m", layers=2, hidden=64, heads=4, groups=4, ffn=128, vocab=512, context=128, scale=0.2)
    train_tokenizer(model)
    told = [row(actor, items, knows=bool(i % 2)) for i, (actor, items) in enumerate(WORLD[:3000])]
    made = make_job(
        folder,
        model,
        write_rows(folder / "train.jsonl", told),
        write_rows(folder / "valid.jsonl", [row(actor, items, knows=True) for actor, items in WORLD[3000:3032]]),
        task="story_generator",
        tuning={"kind": "full"},
        optimizer={"lr": 3e-3, "schedule": "constant"},
        training={"epochs": 2, "batch_size": 32},
    )
    made.phase("validate")
    made.phase("prepare")
    made.train_here()
    made.phase("export")
    return made


def word_perplexity(made: JobDir, told: Sequence[dict[str, Any]]) -> float:
    """What an export makes of the second sentences."""
    work, export = open_work(read_job(made.root)), made.root / "export"
    stage = loaded_stage(load_config(export), export, dtype=torch.float32)
    stage.prepare()
    samples = [sample for i, one in enumerate(told) for sample in work.recipe.encode(one, i, work.context, file="f")]
    said = outputs_of_stage(stage, [(s, np.empty(0, np.float32)) for s in samples if isinstance(s, Sample)])
    assert len(said) == len(told)
    return math.exp(-sum(float(values.sum()) for values in said) / num_words([one["sentences"][1] for one in told]))


def test_acc_C07_facts_make_a_sentence_likely_and_wrong_ones_do_not(learned: JobDir) -> None:
    """
    Word perplexity with the fact is below half of that without it, and with another story's items it is above that:
    what helps is what the fact says, not that there is one.
    """
    tests = WORLD[3100:3164]
    others = [items for _, items in [*tests[1:], tests[0]]]
    known = word_perplexity(learned, [row(actor, items, knows=True) for actor, items in tests])
    unknown = word_perplexity(learned, [row(actor, items, knows=False) for actor, items in tests])
    wrong = [row(actor, items, knows=True, said=other) for (actor, items), other in zip(tests, others, strict=True)]

    assert known < 0.5 * unknown
    assert word_perplexity(learned, wrong) > unknown


def test_acc_C07_sentences_are_about_their_keywords(learned: JobDir) -> None:
    """Of keywords that come with nothing else at least eight sentences of ten speak, and of wrong ones few do."""
    work = open_work(read_job(learned.root))
    format_ = SentenceFormat.from_task_file(work.recipe.task_file(work.context, {}))
    cases = [(actor, other) for actor in ACTORS for other in (ACTORS[0], ACTORS[3]) if actor != other]
    prompts = [format_.pack(["It was day."], work.context.tokenizer, keywords=[actor]).tokens for actor, _ in cases]
    with LLM(learned.root / "export", dtype="float32") as llm:
        params = SamplingParams(temperature=0, max_tokens=16, stop=("\n",))
        texts = [output.choices[0].text for output in llm.generate([list(prompt) for prompt in prompts], params)]
    none = WordRelations([])

    assert control_rate([Controlled(text, actor) for text, (actor, _) in zip(texts, cases, strict=True)], none) >= 0.8
    assert control_rate([Controlled(text, other) for text, (_, other) in zip(texts, cases, strict=True)], none) < 0.2
