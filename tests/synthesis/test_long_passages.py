"""
Long passages leave the server to others: what takes long is done beside the loop, once a passage, in bounded pieces.

The engines are stood in for: here it counts who does the work around them, where, and how often.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import tiny_bert

from trilithon.errors import DeadlineExceeded
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server import synthesis
from trilithon_server.assembly import FinishReason
from trilithon_server.prompts import INLINE_CHARS
from trilithon_server.question_writing import Writer
from trilithon_server.synthesis import AHEAD, Synthesis
from trilithon_server.synthesis_records import Passage, PassageDone, Triple, Wanted
from trilithon_server.task_model import TaskModel
from trilithon_server.tasks import plain_questions, question_format
from trilithon_server.tasks.answer_spans import Candidates
from trilithon_server.tasks.pieces import Encoded, Pieces, WordPieces
from trilithon_server.tasks.spans import Logits, SpanFormat

LONG = " ".join(f"Stone {n} of the wall was laid by Noor in {1700 + n}." for n in range(450))
SPANS = SpanFormat(max_tokens=128, doc_stride=64, max_question_tokens=12)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> WordPieces:
    return WordPieces(load_tokenizer(tiny_bert(tmp_path_factory.mktemp("bert") / "m")))


@dataclass
class _Engine:
    """Writes a question that depends on its seed, and reads windows by their tokens; remembers how many at once."""

    fails: DeadlineExceeded | None = None
    read: list[int] = field(default_factory=list)

    async def generate(self, call: Any, model: str, prompts: Any, values: Any, *, field: str) -> Any:
        if self.fails is not None:
            raise self.fails
        return _Generation(f"Who laid stone {values['seed'] % 450}?")

    async def logits(self, model: Any, task: Any, sequences: Sequence[Encoded], *, field: str) -> list[Logits]:
        self.read.append(len(sequences))
        await asyncio.sleep(0)
        return [_scored(np.array(one.tokens), np.array(one.types)) for one in sequences]


def _scored(ids: Any, types: Any) -> Logits:
    """Of each token by itself and by the question."""
    asked = int(ids[types == 0].sum())
    return (np.stack([(ids * 37 + asked) % 101, (ids * 53 + asked) % 97], axis=1) / 10).astype(np.float32)


class _Generation:
    """What was written, as the service tells it."""

    def __init__(self, text: str) -> None:
        self.choices = [SimpleNamespace(finish=FinishReason.STOP_SEQUENCE, take=lambda: (text, [], 0))]
        self.usage = SimpleNamespace(prompt_tokens=1, generated_tokens=1, cached_tokens=0)

    async def __aenter__(self) -> _Generation:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing is held."""

    async def joined(self) -> None:
        """It is whole."""


def told(
    engine: _Engine, pieces: WordPieces, *texts: str, windows: int = 32
) -> tuple[list[Triple | PassageDone], Synthesis]:
    """All events of a request, and the request, where so many windows may be read at once."""
    service: Any = SimpleNamespace(
        generate=engine.generate, limits=SimpleNamespace(max_extract_windows=windows, max_queue_requests=10_000)
    )
    model: Any = SimpleNamespace(name="words", capabilities=("generate",))

    async def asked() -> tuple[list[Triple | PassageDone], Synthesis]:
        call: Any = None
        writer = Writer(service, call, model, None, {}, asyncio.Semaphore(4))
        run: Any = SimpleNamespace(service=service, logits=engine.logits, tokens=0)
        reader = synthesis._Encoder(run, model, TaskModel(SPANS, pieces, 2))
        passages = [Passage(str(n), text) for n, text in enumerate(texts)]
        request = Synthesis(call, Wanted(passages=passages, answers=3, questions=4), writer, None, reader, 7)
        return [event async for event in request.events()], request

    return asyncio.run(asked())


def watched(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, bool]]) -> None:
    """Note each call of what takes as long as a passage, and whether it was on the loop."""
    loop = threading.get_ident()

    def watch(owner: Any, name: str) -> None:
        work: Callable[..., Any] = getattr(owner, name)

        def noted(*args: Any, **options: Any) -> Any:
            calls.append((name, threading.get_ident() == loop))
            return work(*args, **options)

        monkeypatch.setattr(owner, name, noted)

    for owner, name in (
        (synthesis, "split_sentences"), (question_format, "split_sentences"), (synthesis, "seed_of"),
        (synthesis, "capitals_and_numbers"), (plain_questions, "question_prompt"), (Candidates, "worded"),
        (SpanFormat, "encode"), (SpanFormat, "windows"), (SpanFormat, "decode"),
    ):  # fmt: skip
        watch(owner, name)


def test_a_long_passage_is_looked_at_once_and_beside_the_loop(
    pieces: WordPieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Its sentences are found once, its words are read once, a prompt is made once for all questions of an answer; each
    question's windows are made and decoded in a thread. Inverses seen red: the prompt, and decoding, on the loop; a
    prompt without the sentences; the passage's words for each question.
    """
    calls: list[tuple[str, bool]] = []
    texts: list[str] = []
    read = WordPieces.text
    watched(monkeypatch, calls)

    def noted(self: WordPieces, text: str) -> Pieces:
        texts.append(text)
        return read(self, text)

    monkeypatch.setattr(WordPieces, "text", noted)
    events, _ = told(_Engine(), pieces, LONG)
    times = Counter(name for name, _ in calls)

    assert len(LONG) > INLINE_CHARS
    assert len(events) == 3 * 4 + 1
    assert [call for call in calls if call[1]] == []
    assert (times["split_sentences"], times["question_prompt"], texts.count(LONG)) == (1, 3, 1)
    assert times["windows"] == times["decode"] == 12


def test_windows_are_held_for_as_many_questions_as_are_read_at_once(
    pieces: WordPieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Of a long passage those of one question, of short ones those of several; the engine gets no more than its share at
    once. Inverse seen red: all questions packed before the first is read.
    """
    held: list[tuple[int, int]] = []
    packed = synthesis._packed

    def counted(*args: Any, **options: Any) -> Any:
        windows = packed(*args, **options)
        held.append((len(windows), sum(map(len, windows))))
        return windows

    monkeypatch.setattr(synthesis, "_packed", counted)
    long, short = _Engine(), _Engine()
    told(long, pieces, LONG, windows=32 * AHEAD)
    of_long, held[:] = list(held), []
    told(short, pieces, LONG[:300], windows=32 * AHEAD)

    assert [questions for questions, _ in of_long] == [1] * 12
    assert min(windows for _, windows in of_long) > 64
    assert max(long.read) == 32
    assert [questions for questions, _ in held] == [12]
    assert short.read == [sum(windows for _, windows in held)]


def test_acc_E09_triples_are_those_of_any_share_of_the_engine(pieces: WordPieces) -> None:
    """However many windows and questions are read at once. Inverse seen red: logits given to the next question."""
    texts = (LONG, LONG[:900], LONG[300:520])
    whole, _ = told(_Engine(), pieces, *texts, windows=100_000)

    assert len(whole) == 3 * 12 + 3
    assert len({event.qa_answer for event in whole[:12] if isinstance(event, Triple)}) > 1
    for windows in (1, 24, 320):
        assert told(_Engine(), pieces, *texts, windows=windows)[0] == whole


def test_R7_only_the_time_limit_ends_a_request_early(pieces: WordPieces) -> None:
    """
    Where a question waited too long for an engine the request fails, for trying again later helps. Inverse seen red:
    every deadline read as the time limit.
    """
    events, request = told(_Engine(DeadlineExceeded("the time limit passed.", code="timeout")), pieces, "Ada.")
    with pytest.raises(DeadlineExceeded, match="waited") as error:
        told(_Engine(DeadlineExceeded("the request waited 5 ms.", code="queue_timeout")), pieces, "Ada.")

    assert (events, request.summary.is_complete) == ([], False)
    assert error.value.code == "queue_timeout"
