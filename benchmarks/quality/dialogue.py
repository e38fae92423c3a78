"""
What references and knowledge are worth to SmolLM2-135M-Instruct, in words, before and after a LoRA on real dialogues.

    python benchmarks/quality/dialogue.py persona
    python benchmarks/quality/dialogue.py grounded

persona    Persona-Chat: perplexity of a person's turns with what is told of that person as references, with what is
           told of somebody else, and with nothing; then of the people who speak in several dialogues with their other
           dialogues as references.
grounded   BEGIN: perplexity of replies with the sentence that they say, with another one, and with none; knowledge F1
           of replies that the model writes. Topical-Chat: the table of references and knowledge.

Intervals are 95 % of 2,000 draws of whole dialogues. Numbers, seeds, times and versions are written to `results/`.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from runs import Result, data_dir, model_dir, record, run_job, settings, write_rows

from trilithon_finetune.converters.dialogues import CONTEXT_TURNS, begin_rows, persona_rows, topical_rows
from trilithon_finetune.converters.questions import json_lines
from trilithon_finetune.metrics.knowledge_f1 import mean_word_f1
from trilithon_server.llm import LLM
from trilithon_server.prompts import Sequenced
from trilithon_server.sampling import SamplingParams
from trilithon_server.tasks.dialogue_format import Conversation, DialogueFormat, Turn

MODEL = "smollm2-135m-instruct"
FORMAT = DialogueFormat(max_references=160, max_knowledge=96, max_conversation=256)
BATCH = 32
DRAWS = 2000
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """
    A turn to be judged: the conversation that ends with it, and what it may stand on. `group`: its dialogue; `person`:
    who speaks, where several dialogues are of one.
    """

    group: str
    conversation: Conversation
    references: Sequence[Conversation] = ()
    knowledge: Sequence[str] = ()
    person: str = ""


@dataclass(frozen=True)
class Losses:
    """Negative log-likelihood of each case's last turn, and its tokens."""

    nll: np.ndarray[Any, np.dtype[np.float64]]
    tokens: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.nll.sum() / self.tokens.sum())


def losses(llm: LLM, cases: Sequence[Case], adapter: Path | None) -> Losses:
    """Of the last turn of each case, whole packs at once."""
    found: list[tuple[float, int]] = []
    for first in range(0, len(cases), BATCH):
        packs = [
            FORMAT.pack(
                case.conversation,
                llm.tokenizer,
                references=case.references,
                knowledge=case.knowledge,
                open_turn=False,
            )
            for case in cases[first : first + BATCH]
        ]
        starts = [pack.spans[-1][0] for pack in packs]
        scored = llm.score([Sequenced(ids=pack.tokens) for pack in packs], starts, adapter=adapter)
        for pack, tokens in zip(packs, scored, strict=True):
            start, stop = pack.spans[-1]
            told = [token.logprob for token in tokens[: stop - start]]
            found.append((-math.fsum(told), stop - start))
    nll, tokens = zip(*found, strict=True)
    return Losses(np.array(nll), np.array(tokens))


def interval(cases: Sequence[Case], better: Losses, worse: Losses) -> dict[str, float]:
    """By how much a token's loss falls, with its interval."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, case in enumerate(cases):
        groups[case.group].append(i)
    gains = worse.nll - better.nll
    by_group = np.array([[gains[rows].sum(), better.tokens[rows].sum()] for rows in groups.values()])
    draws = np.random.default_rng(0).integers(len(by_group), size=(DRAWS, len(by_group)))
    sums = by_group[draws].sum(1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return {"nats_a_token": float(gains.sum() / better.tokens.sum()), "low": float(low), "high": float(high)}


def table(llm: LLM, settings: Mapping[str, Sequence[Case]], adapter: Path | None) -> dict[str, Any]:
    """Perplexity of each setting of the same turns; what the first one gains on each of the others."""
    found = {name: losses(llm, cases, adapter) for name, cases in settings.items()}
    (first, best), *others = found.items()
    return {
        "perplexity": {name: item.perplexity for name, item in found.items()},
        "gain": {f"{first} on {name}": interval(settings[first], best, item) for name, item in others},
        "turns": len(best.nll),
        "tokens": int(best.tokens.sum()),
    }


def opened(model: Path) -> LLM:
    """With room for one adapter."""
    return LLM(
        model, dtype="float32", max_context=640, kv_cache_bytes=1 << 30, max_batch_sequences=BATCH,
        max_queued_requests=BATCH, max_adapters=1,
    )  # fmt: skip


def learn(folder: Path, task: str, rows: Sequence[Row], args: argparse.Namespace) -> Result:
    """A LoRA of rows."""
    train = write_rows(folder / f"{task}.jsonl", rows)
    config = {
        "task": task,
        "seed": args.seed,
        "training": {"epochs": args.epochs, "batch_size": 8},
        "options": {
            "reference_tokens": FORMAT.max_references,
            "knowledge_tokens": FORMAT.max_knowledge,
            "conversation_tokens": FORMAT.max_conversation,
            "written_answers": 0,
        },
        "data": {"max_tokens": 512, "validation_share": 0.0},
    }
    return run_job(folder, model_dir(MODEL), train, None, config)


def turns(items: Sequence[Mapping[str, str]], actor: str) -> list[Turn]:
    """As the format takes them."""
    return [Turn("target" if item["author"] == actor else "other", item["text"]) for item in items]


# -- people -----------------------------------------------------------------------------------------------------


def people(rows: Sequence[tuple[str, Row]], *, each: int, before: int = 4) -> Iterator[Case]:
    """Turns of the actors with at least `before` turns before them, `each` of a row, spread over it."""
    for group, row in rows:
        told = turns(row["target"], row["actor"])
        at = [i for i, turn in enumerate(told) if turn.speaker == "target" and i >= before]
        kept = min(each, len(at))
        for index in (at[i * len(at) // kept] for i in range(kept)):
            yield Case(group, told[: index + 1], [turns(item, row["actor"]) for item in row["refs"]])


def moved(cases: Sequence[Case]) -> list[Case]:
    """The same turns with the references of the next person: another dialogue of the same one may be the very turn."""
    by_person: dict[str, Case] = {}
    for case in cases:
        by_person.setdefault(case.person or case.group, case)
    names = list(by_person)
    following = dict(zip(names, [*names[1:], names[0]], strict=True))
    return [replace(case, references=by_person[following[case.person or case.group]].references) for case in cases]


def bare(cases: Sequence[Case]) -> list[Case]:
    """The same turns, with nothing."""
    return [Case(case.group, case.conversation) for case in cases]


def again(document: bytes) -> list[Case]:
    """People of several dialogues: their turns in one, the others as references."""
    dialogues = list(json_lines(document))
    rows = {(group, row["actor"]): row for group, row in persona_rows(document, Counter())}
    places: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    for number, dialogue in enumerate(dialogues):
        for side in ("1", "2"):
            places[tuple(dialogue[f"user{side}_persona"])].append((str(number), f"u{side}"))
    found: list[Case] = []
    for name, those in places.items():
        for here in those if len(those) > 1 else ():
            others = [turns(rows[there]["target"], there[1]) for there in those if there != here]
            for case in people([(here[0], rows[here])], each=4):
                found.append(replace(case, references=others, person=" ".join(name)))
    return found


def persona(args: argparse.Namespace) -> dict[str, Any]:
    """Persona-Chat."""
    document = (data_dir() / "dialogue" / "synthetic_persona_chat_valid.jsonl").read_bytes()
    rows = [item for item in persona_rows(document, Counter()) if item[1]["refs"]]
    judged = [(group, row) for group, row in rows if int(group) % 5 == 0][: 2 * args.dialogues]
    learned = [row for group, row in rows if int(group) % 5 != 0][: 2 * args.learned]
    own = list(people(judged, each=4))
    settings = {"own": own, "another's": moved(own), "none": bare(own)}
    several = again(document)
    repeated = {"own": several, "another's": moved(several), "none": bare(several)}
    with tempfile.TemporaryDirectory() as name, opened(model_dir(MODEL)) as llm:
        numbers = {"zero_shot": table(llm, settings, None), "other_dialogues": table(llm, repeated, None)}
        result = learn(Path(name), "dialogue", learned, args)
        numbers["lora"] = table(llm, settings, result.export)
        numbers["lora_other_dialogues"] = table(llm, repeated, result.export)
    return {**numbers, "rows_learned": len(learned), "seconds": result.seconds, "tokens": result.tokens}


# -- knowledge --------------------------------------------------------------------------------------------------


def said(rows: Sequence[Row]) -> list[Case]:
    """Replies of BEGIN with their knowledge."""
    return [
        Case(str(i), turns(row["target"], row["actor"]), (), [item["text"] for item in row["knowledge"]])
        for i, row in enumerate(rows)
    ]


def shuffled(cases: Sequence[Case]) -> list[Case]:
    """The same turns with the knowledge of the next."""
    return [
        Case(case.group, case.conversation, case.references, other.knowledge)
        for case, other in zip(cases, [*cases[1:], cases[0]], strict=True)
    ]


def not_attributable(document: bytes) -> list[Row]:
    """Replies that do not say what their knowledge says, by a person's judgement."""
    rows = [row for row in json_lines(document) if row["label"] == "Not fully attributable" and row["response"].strip()]
    assert rows, "BEGIN names its labels otherwise"
    return [
        {
            "actor": "u1",
            "target": [{"author": "u2", "text": row["message"].strip()}, {"author": "u1", "text": row["response"]}],
            "knowledge": [{"text": row["knowledge"]}],
        }
        for row in rows
        if row["message"].strip()
    ]


def topical(document: bytes, count: int) -> list[Case]:
    """Turns of Topical-Chat with their knowledge; what was said before the last six is the earlier conversation."""
    whole = {row["id"]: row["turns"] for row in json_lines(document)}
    found, taken = [], Counter[str]()
    for group, row in topical_rows(document, Counter()):
        told = [{"author": turn["agent"], "text": turn["text"].strip()} for turn in whole[group]]
        past = [turn for turn in told[: max(0, told.index(row["target"][-1]) - CONTEXT_TURNS)] if turn["text"]]
        if len(past) >= 4 and row["knowledge"] and taken[group] < 2:
            taken[group] += 1
            facts = [item["text"] for item in row["knowledge"]]
            found.append(Case(group, turns(row["target"], row["actor"]), [turns(past, row["actor"])], facts))
    return found[:count]


def replies(llm: LLM, cases: Sequence[Case], adapter: Path | None) -> list[str]:
    """What the model says, greedily, where the turn of each case stands."""
    packs = [FORMAT.pack(case.conversation[:-1], llm.tokenizer, knowledge=case.knowledge) for case in cases]
    params = SamplingParams(temperature=0, max_tokens=48, stop=("\n",))
    found: list[str] = []
    for first in range(0, len(packs), BATCH):
        prompts = [Sequenced(ids=pack.tokens) for pack in packs[first : first + BATCH]]
        found += [output.choices[0].text.strip() for output in llm.generate(prompts, params, adapter=adapter)]
    return found


def written(llm: LLM, cases: Sequence[Case], adapter: Path | None) -> dict[str, float]:
    """Knowledge F1 of written replies with knowledge and without, and F1 with the true ones."""
    known = [" ".join(case.knowledge) for case in cases]
    gold = [case.conversation[-1].text for case in cases]
    numbers = {}
    for name, asked in (("with", cases), ("without", bare(cases))):
        texts = replies(llm, asked, adapter)
        numbers |= {f"knowledge_f1_{name}": mean_word_f1(texts, known), f"f1_{name}": mean_word_f1(texts, gold)}
    return numbers


def grounded(args: argparse.Namespace) -> dict[str, Any]:
    """BEGIN and Topical-Chat."""
    document = (data_dir() / "dialogue" / "begin_wow.jsonl").read_bytes()
    rows = [row for _, row in begin_rows(document, Counter())]
    judged, held, learned = said(rows[:200]), said(rows[200:240]), rows[240 : 240 + args.learned_replies]
    others = said(not_attributable(document)[:200])
    chat = topical((data_dir() / "dialogue" / "topical_chat_valid_freq.jsonl").read_bytes(), args.chats)
    ablations = {
        "both": chat,
        "knowledge": [Case(c.group, c.conversation, (), c.knowledge) for c in chat],
        "references": [Case(c.group, c.conversation, c.references) for c in chat],
        "none": bare(chat),
    }

    def numbers_of(adapter: Path | None) -> dict[str, Any]:
        return {
            "attributable": table(llm, {"own": judged, "another's": shuffled(judged), "none": bare(judged)}, adapter),
            "not_attributable": table(
                llm, {"own": others, "another's": shuffled(others), "none": bare(others)}, adapter
            ),
            "topical_chat": table(llm, ablations, adapter),
            "written": written(llm, held, adapter),
        }

    with tempfile.TemporaryDirectory() as name, opened(model_dir(MODEL)) as llm:
        numbers = {"zero_shot": numbers_of(None)}
        result = learn(Path(name), "grounded_dialogue", learned, args)
        numbers["lora"] = numbers_of(result.export)
    return {**numbers, "rows_learned": len(learned), "seconds": result.seconds, "tokens": result.tokens}


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("what", choices=["persona", "grounded"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--dialogues", type=int, default=25, help="to judge by")
    parser.add_argument("--learned", type=int, default=120, help="dialogues to learn")
    parser.add_argument("--learned-replies", type=int, default=400)
    parser.add_argument("--chats", type=int, default=200, help="turns of Topical-Chat to judge by")
    args = parser.parse_args()
    numbers = {"persona": persona, "grounded": grounded}[args.what](args)
    record(f"dialogue_{args.what}", {"settings": settings(args), **numbers})


if __name__ == "__main__":
    main()
