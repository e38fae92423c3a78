"""
What stories gain from finetuning, knowledge and control, on five-sentence stories (after arXiv 2010.00840).

    python benchmarks/quality/stories.py ranker --folder runs/stories
    python benchmarks/quality/stories.py keywords --folder runs/stories
    python benchmarks/quality/stories.py sentences --folder runs/stories
    python benchmarks/quality/stories.py control --folder runs/stories

ranker     facts ranked by MiniLM finetuned on stories: recall among 10 of the facts that fit the next sentence, beside
           MiniLM as it is, with that sentence's keywords and without, TF-IDF of the story, and chance.
keywords   keywords of the next sentence from SmolLM2 with LoRA: the share of sentences with one of their own among the
           first three, beside SmolLM2 as it is and the three most frequent ones.
sentences  the next sentence from SmolLM2 with LoRA, with facts and without: word perplexity of the held-out sentences,
           beside SmolLM2 as it is.
control    stories told with what `keywords` and `sentences` left in the folder, no four tokens twice: whether a
           sentence is about a keyword that it is given, or about its opposite; repeated and distinct 4-grams.

Every tenth story is held out. `--train` and `--dev` take the first so many stories; the folder keeps labels and
exports. Numbers, seeds, times and versions are written to `results/`.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runs import Result, data_dir, model_dir, record, run_job, settings, write_rows

from trilithon_finetune.converters.questions import json_lines
from trilithon_finetune.data.story_labels import StoryLabeller, TextEncoder
from trilithon_finetune.metrics.control import Controlled, control_rate, leakage
from trilithon_finetune.metrics.texts import distinct_share, num_words, repeat_share
from trilithon_finetune.phases.verify import loaded_stage, outputs_of_stage
from trilithon_finetune.recipes.base import Sample
from trilithon_finetune.recipes.story_rows import Step, steps_of
from trilithon_finetune.recipes.texts import next_token_targets
from trilithon_finetune.train.text_encoder import open_encoder
from trilithon_parallel.config import QUERY_DIR, load_config
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.knowledge.concepts import Concepts, read_concepts
from trilithon_server.knowledge.fact_vectors import by_cosine
from trilithon_server.knowledge.keywords import keywords
from trilithon_server.knowledge.tfidf import TermCounts, unit
from trilithon_server.llm import LLM
from trilithon_server.sampling import SamplingParams
from trilithon_server.story_telling import first_end, seed_of
from trilithon_server.tasks.story_format import GUIDE, KeywordFormat, RankerFormat, SentenceFormat

ENCODER, DECODER = "all-minilm-l6-v2", "smollm2-135m-instruct"
KNOWLEDGE = ("conceptnet100k_train.tsv", "wordnet30_triples.tsv", "wordnet30_glosses.jsonl")
HELD_OUT_EVERY = 10
RECALL_AT = 10
FACTS = 3
FASTER = {"optimizer": {"lr": 5e-4}}
"""Of adapters: a few hundred stories are a few hundred steps."""
CONTROLLED = 3
"""Index of the sentence that `control` is about."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Stories:
    """Labelled rows to train on and rows held out, as files too."""

    concepts: Concepts
    train: list[Row]
    dev: list[Row]
    train_file: Path
    dev_file: Path


def stories(folder: Path, *, train: int, dev: int) -> Stories:
    """Label the first so many stories of both sides, once for each number of them."""
    known = folder / "concepts"
    known.mkdir(parents=True, exist_ok=True)
    for name in KNOWLEDGE:
        shutil.copy(data_dir() / "kb" / name, known / name)
    concepts = read_concepts(known)
    told = [
        {"sentences": row["sentences"]}
        for row in json_lines((data_dir() / "stories/five_sentence_stories.jsonl").read_bytes())
    ]
    sides = {
        "train": [row for i, row in enumerate(told) if i % HELD_OUT_EVERY][:train],
        "dev": told[::HELD_OUT_EVERY][:dev],
    }
    files = {side: folder / f"{side}-{len(rows)}.jsonl" for side, rows in sides.items()}
    if not all(file.exists() for file in files.values()):
        with open_encoder(model_dir(ENCODER)) as encoder:
            labeller = StoryLabeller(concepts, encoder)
            for side, rows in sides.items():
                write_rows(files[side], map(labeller.label, rows))
    rows = {side: list(json_lines(file.read_bytes())) for side, file in files.items()}
    return Stories(concepts, rows["train"], rows["dev"], files["train"], files["dev"])


def job(found: Stories, folder: Path, name: str, model: str, config: Mapping[str, Any]) -> Result:
    """Train, and leave a copy of the export in the folder under the name."""
    result = run_job(folder / name, model_dir(model), found.train_file, found.dev_file, config)
    shutil.copytree(result.export, folder / f"{name}-export", dirs_exist_ok=True)
    return result


# -- ranker -----------------------------------------------------------------------------------------------------


def ranker(found: Stories, folder: Path, seed: int, epochs: int) -> dict[str, Any]:
    """Recall of the facts that fit, among the best ten by each way to rank."""
    config = {"task": "story_ranker", "seed": seed, "training": {"epochs": epochs}}
    base, result, ways = model_dir(ENCODER), job(found, folder, "ranker", ENCODER, config), {}
    with open_ranker(base, RankerFormat()) as plain:
        cases = [case for row in found.dev for case in candidates(found.concepts, row, plain)]
    asked, alone = RankerFormat(), RankerFormat(with_keywords=False)
    for name, directory, format_ in (("minilm", base, asked), ("minilm, story alone", base, alone),
                                     ("finetuned", result.export, asked)):  # fmt: skip
        with open_ranker(directory, format_) as way:
            ways[name] = [way.order(step, texts) for step, texts, _ in cases]
    ways["tfidf"] = [by_terms(step, texts) for step, texts, _ in cases]
    fitting = [fits for _, _, fits in cases]
    numbers = {name: recall(order, fitting) for name, order in ways.items()}
    chance = float(np.mean([RECALL_AT / len(texts) for _, texts, _ in cases]))
    return {**facts_of(result), "recall_at_10": {**numbers, "chance": chance}, "sentences": len(cases)}


Vector = np.ndarray[Any, Any]


class Ranker:
    """Cosines of stories and facts by an encoder of each, which may be one; a fact is encoded once."""

    def __init__(self, reader: TextEncoder, knower: TextEncoder, format: RankerFormat) -> None:
        self._reader, self._knower, self._format = reader, knower, format
        self._known: dict[str, Vector] = {}

    def story(self, sentences: Sequence[str], keywords: Sequence[str] = ()) -> Vector:
        """The vector [H] of a story, and of what its next sentence is about."""
        told = self._format.story(sentences, self._reader.tokenizer, keywords=keywords)
        rows: Vector = self._reader.vectors([told.tokens])
        return rows[0]

    def facts(self, texts: Sequence[str]) -> list[Vector]:
        """The vectors [H] of facts."""
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        tokens = [self._format.fact(text, self._knower.tokenizer).tokens for text in new]
        self._known |= zip(new, self._knower.vectors(tokens), strict=True)
        return [self._known[text] for text in texts]

    def order(self, step: Step, texts: Sequence[str]) -> list[str]:
        """Candidates by the story so far, best first."""
        story = self.story(step.told, step.keywords).astype(np.float64)
        scores = unit(np.stack(self.facts(texts)).astype(np.float64)) @ story
        return [texts[i] for i in np.argsort(-scores, kind="stable")]


@contextmanager
def open_ranker(directory: Path, format: RankerFormat) -> Iterator[Ranker]:
    """The encoder of a directory, or its two."""
    with ExitStack() as held:
        knower = held.enter_context(open_encoder(directory))
        beside = directory / QUERY_DIR
        yield Ranker(held.enter_context(open_encoder(beside)) if beside.is_dir() else knower, knower, format)


def candidates(concepts: Concepts, row: Row, ranker: Ranker) -> list[tuple[Step, list[str], set[str]]]:
    """Steps with more candidates than ten, the candidates, and which of them fit by brute force."""
    cases = []
    for step in steps_of(row):
        facts = concepts.graph.facts(step.keywords).facts
        if len(facts) > RECALL_AT:
            texts = [fact.text for fact in facts]
            best = by_cosine(facts, ranker.facts(texts), ranker.story([*step.told, step.sentence]))[:RECALL_AT]
            fits = {one.fact.text for one in best}
            assert list(step.facts) == [one.fact.text for one in best], "a label is not what brute force finds"
            cases.append((step, texts, fits))
    return cases


def by_terms(step: Step, texts: Sequence[str]) -> list[str]:
    """The same by words, rare ones more."""
    terms = TermCounts(texts).weighted([" ".join(step.told)])
    return [texts[i] for i in np.argsort(-terms.products(terms.context[0]), kind="stable")]


def recall(orders: Sequence[Sequence[str]], fitting: Sequence[set[str]]) -> float:
    """Mean share of the fitting ones among the first ten."""
    shares = [len(set(order[:RECALL_AT]) & fits) / len(fits) for order, fits in zip(orders, fitting, strict=True)]
    return float(np.mean(shares))


# -- keywords ---------------------------------------------------------------------------------------------------


def keyword_hits(found: Stories, folder: Path, seed: int, epochs: int) -> dict[str, Any]:
    """The share of sentences with one of their own keywords among the first three, by each way to predict."""
    config = {"task": "story_keywords", "seed": seed, "training": {"epochs": epochs, "batch_size": 8}, **FASTER}
    result = job(found, folder, "keywords", DECODER, config)
    steps = [step for row in found.dev for step in steps_of(row) if step.keywords]
    frequent = Counter(word for row in found.train for step in steps_of(row) for word in step.keywords)
    guess = [word for word, _ in frequent.most_common(3)]
    with LLM(model_dir(DECODER), adapters={"keywords": result.export}, dtype="float32") as llm:
        tuned = predicted(llm, KeywordFormat(max_story=160), steps, "keywords")
        plain = predicted(llm, KeywordFormat(guide=GUIDE), steps, None)
    hits = {"finetuned": hit_share(tuned, steps), "smollm2": hit_share(plain, steps)}
    return {**facts_of(result), "hits": {**hits, "frequent": hit_share([guess] * len(steps), steps)}}


def predicted(llm: LLM, format_: KeywordFormat, steps: Sequence[Step], adapter: str | None) -> list[list[str]]:
    """Keywords that a model says of each sentence, from the story so far."""
    prompts = [list(format_.pack(step.told, llm.tokenizer).tokens) for step in steps]
    params = SamplingParams(temperature=0, max_tokens=32, stop=format_.stops)
    return [format_.read(out.choices[0].text) for out in llm.generate(prompts, params, adapter=adapter)]


def hit_share(said: Sequence[Sequence[str]], steps: Sequence[Step]) -> float:
    """Share of sentences of which at least one keyword was said."""
    return sum(bool(set(words) & set(step.keywords)) for words, step in zip(said, steps, strict=True)) / len(steps)


# -- sentences --------------------------------------------------------------------------------------------------


def sentence_perplexity(found: Stories, folder: Path, seed: int, epochs: int) -> dict[str, Any]:
    """Word perplexity of the held-out sentences."""
    config = {"task": "story_generator", "seed": seed, "training": {"epochs": epochs, "batch_size": 8}, **FASTER}
    with_facts = job(found, folder, "sentences", DECODER, {**config, "options": {"facts": FACTS}})
    without = job(found, folder, "bare", DECODER, {**config, "options": {"facts": 0}})
    numbers = {
        "finetuned": with_facts.metrics["word_perplexity"],
        "finetuned without facts": without.metrics["word_perplexity"],
        "smollm2": zero_shot(found.dev),
    }
    return {**facts_of(with_facts), "word_perplexity": numbers, "without": facts_of(without)}


def zero_shot(dev: Sequence[Row]) -> float:
    """Of the model as it is, with the guide that a server gives it."""
    base = model_dir(DECODER)
    stage = loaded_stage(load_config(base), base, dtype=torch.float32)
    stage.prepare()
    tokenizer, format_ = load_tokenizer(base), SentenceFormat(guide=GUIDE)
    steps = [step for row in dev for step in steps_of(row)]
    samples = []
    for step in steps:
        packed = format_.pack(
            step.told, tokenizer, keywords=step.keywords, knowledge=step.ranked[:FACTS], answer=step.sentence
        )
        start, stop = packed.answer
        learned = [start <= at < stop for at in range(len(packed.tokens))]
        samples.append(Sample(packed.tokens, next_token_targets(packed.tokens, learned)))
    said = outputs_of_stage(stage, [(sample, np.empty(0, np.float32)) for sample in samples])
    return math.exp(-sum(float(values.sum()) for values in said) / num_words([step.sentence for step in steps]))


# -- control ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Teller:
    """Stories by the exports of the folder, as a server tells them: keywords, facts by MiniLM, a sentence."""

    llm: LLM
    ranker: Ranker
    concepts: Concepts
    seed: int

    def tell(self, firsts: Sequence[str], controls: Sequence[Sequence[str] | None]) -> tuple[list[Row], list[str]]:
        """
        Stories of five sentences from first ones.

        Args:
            controls: of each story the keywords of sentence `CONTROLLED`; None: predicted.
        Returns:
            The stories, with the keywords of each step, and all of their texts.
        """
        told = [[first] for first in firsts]
        used: list[list[list[str]]] = [[] for _ in firsts]
        for index in range(2, 6):
            steps = [Step(index, story, "", ()) for story in told]
            said = predicted(self.llm, KeywordFormat(max_story=160), steps, "keywords")
            for i, control in enumerate(controls):
                if index == CONTROLLED and control is not None:
                    said[i] = list(control)
            for i, sentence in enumerate(self._written(told, said, index)):
                told[i].append(sentence)
                used[i].append(said[i])
        rows = [{"sentences": story, "keywords": words} for story, words in zip(told, used, strict=True)]
        return rows, [" ".join(story) for story in told]

    def _written(self, told: Sequence[Sequence[str]], said: Sequence[Sequence[str]], index: int) -> list[str]:
        format_ = SentenceFormat(max_story=160, max_knowledge=64)
        prompts = []
        for story, words in zip(told, said, strict=True):
            facts = [fact.text for fact in self.concepts.graph.facts(words).facts]
            known = self.ranker.order(Step(index, story, "", words), facts)[:FACTS] if facts else []
            prompts.append(list(format_.pack(story, self.llm.tokenizer, keywords=words, knowledge=known).tokens))
        seed = seed_of(self.seed, index)
        params = SamplingParams(
            temperature=0.7, top_k=40, no_repeat_ngram=4, max_tokens=64, stop=format_.stops, seed=seed
        )
        texts = [out.choices[0].text for out in self.llm.generate(prompts, params, adapter="sentences")]
        return [" ".join(text[: first_end(text)].split()) for text in texts]


def control(found: Stories, folder: Path, seed: int, epochs: int) -> dict[str, Any]:
    """Whether the third sentence is about what it is told to be about; of `epochs` nothing is needed here."""
    firsts = [row["sentences"][0] for row in found.dev]
    shifted = [*found.dev[1:], found.dev[0]]
    foreign = [(keywords(row["sentences"][CONTROLLED - 1]) or ["dog"])[:1] for row in shifted]
    words = found.concepts.words
    adapters = {name: folder / f"{name}-export" for name in ("keywords", "sentences")}
    with (
        LLM(model_dir(DECODER), adapters=adapters, dtype="float32") as llm,
        open_ranker(model_dir(ENCODER), RankerFormat()) as encoder,
    ):
        teller = Teller(llm, encoder, found.concepts, seed)
        free, free_texts = teller.tell(firsts, [None] * len(firsts))
        given, given_texts = teller.tell(firsts, foreign)
        before = [row["keywords"][CONTROLLED - 2] for row in free]
        turned = [[words.opposite(word) for word in group] for group in before]
        with_one = [i for i, group in enumerate(turned) if any(one.is_found for one in group)]
        opposed, _ = teller.tell([firsts[i] for i in with_one], [[one.text for one in turned[i]] for i in with_one])
    turns = [(n, i, one) for n, i in enumerate(with_one) for one in turned[i] if one.is_found]
    told = {name: third_of(rows) for name, rows in (("free", free), ("given", given), ("opposed", opposed))}
    asked = [word for (word,) in foreign]
    after = [Controlled(told["opposed"][n], one.antonym, one.word) for n, _, one in turns]
    unturned = [Controlled(told["free"][i], one.antonym, one.word) for _, i, one in turns]
    return {
        "stories": len(firsts),
        "control_rate": control_rate(list(map(Controlled, told["given"], asked)), words),
        "uncontrolled_rate": control_rate(list(map(Controlled, told["free"], asked)), words),
        "antonyms": len(turns),
        "antonym_rate": control_rate(after, words),
        "leakage": leakage(after, words),
        "uncontrolled_leakage": leakage(unturned, words),
        "repeat_4": {"free": repeat_share(free_texts), "controlled": repeat_share(given_texts)},
        "distinct_4": {"free": distinct_share(free_texts), "controlled": distinct_share(given_texts)},
        "examples": free_texts[:3],
    }


def third_of(rows: Sequence[Row]) -> list[str]:
    """The sentences that are controlled."""
    return [row["sentences"][CONTROLLED - 1] for row in rows]


# -- running ----------------------------------------------------------------------------------------------------


def facts_of(result: Result) -> dict[str, Any]:
    """What is written down of a job."""
    return {"metrics": dict(result.metrics), "seconds": result.seconds, "tokens": result.tokens}


CASES = {"ranker": ranker, "keywords": keyword_hits, "sentences": sentence_perplexity, "control": control}
EPOCHS = {"ranker": 1, "keywords": 1, "sentences": 1, "control": 0}


def main() -> None:
    """Run one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--train", type=int, default=10**6)
    parser.add_argument("--dev", type=int, default=10**6)
    args = parser.parse_args()
    found = stories(args.folder, train=args.train, dev=args.dev)
    numbers = CASES[args.case](found, args.folder, args.seed, args.epochs or EPOCHS[args.case])
    record(
        f"stories_{args.case}",
        {"settings": settings(args), "train": len(found.train), "dev": len(found.dev), **numbers},
    )


if __name__ == "__main__":
    main()
