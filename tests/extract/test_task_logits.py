"""The engine answers with the logits of a task head: at every layout, in every batch, beside vectors."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engine_driver import Answer, Driver
from tiny_tasks import HEADS, Task

from trilithon_server.engine import encoder_scheduler
from trilithon_server.engine.wire_pb2 import Pooling

Start = Callable[..., Driver]
LOGITS = Pooling(task_logits=True)
VECTOR = Pooling(kind=Pooling.MEAN, normalize=True)
TASKS: tuple[Task, ...] = ("ner", "span_qa", "classify")
LAYOUT_TOLERANCE = 1e-5  # fp32, absolute and relative: the tiny heads' logits are of size 1 to 30
TRANSFORMERS_TOLERANCE = 1e-4

Array = npt.NDArray[np.float32]
Text = tuple[list[int], list[int]]


def texts(count: int, seed: int = 0) -> list[Text]:
    """Token ids and types of some sequences, of 1 to 60 tokens."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        ids = [rng.randrange(5, 250) for _ in range(rng.randint(1, 60))]
        seam = rng.randint(0, len(ids))
        out.append((ids, [0] * seam + [1] * (len(ids) - seam)))
    return out


def logits_of(answer: Answer, task: Task) -> Array:
    """The logits of an answer, a row a token, or one row."""
    values = np.frombuffer(answer.last.task_logits, np.float32)
    return values.reshape(-1, {"ner": 5, "span_qa": 2, "classify": 3, "relation": 3}[task])


def ask_all(driver: Driver, asked: list[Text], pooling: Pooling = LOGITS) -> list[Answer]:
    """All at once."""
    handles = [driver.submit(ids, types=types, pooling=pooling) for ids, types in asked]
    driver.run()
    return [driver.answers[handle, 0] for handle in handles]


@pytest.mark.parametrize("task", TASKS)
def test_E10_logits_are_those_of_transformers(start: Start, task_dirs: dict[Task, Path], task: Task) -> None:
    """
    For each kind of head the engine's logits of a batch are those of `transformers`, token types included.

    Inverse: plans without types (`plan.types = []`) turn it red.
    """
    driver = start(task_dirs[task])
    model = HEADS[task].from_pretrained(task_dirs[task]).eval()
    asked = texts(8)

    for (ids, types), answer in zip(asked, ask_all(driver, asked), strict=True):
        with torch.no_grad():
            told = model(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
        if task == "span_qa":
            expected = torch.stack([told.start_logits[0], told.end_logits[0]], dim=-1)
        else:
            expected = told.logits[0] if task == "ner" else told.logits
        np.testing.assert_allclose(logits_of(answer, task), expected.numpy(), atol=TRANSFORMERS_TOLERANCE, rtol=0)


@pytest.mark.parametrize("task", TASKS)
def test_E1_every_layout_gives_the_same_logits(start: Start, task_dirs: dict[Task, Path], task: Task) -> None:
    """(1,1), (2,1), (1,2) and (3,1) agree to 1e-5 and choose the same labels; pp alone is bitwise equal."""
    asked = texts(6, seed=1)
    expected = [logits_of(answer, task) for answer in ask_all(start(task_dirs[task]), asked)]

    for tp, pp in ((2, 1), (1, 2), (3, 1)):
        found = [logits_of(answer, task) for answer in ask_all(start(task_dirs[task], tp=tp, pp=pp), asked)]
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(other, one, atol=LAYOUT_TOLERANCE, rtol=LAYOUT_TOLERANCE)
            assert (one.argmax(-1) == other.argmax(-1)).all()
            assert tp > 1 or (one == other).all()


@pytest.mark.parametrize("invariant", [False, True], ids=["fp32", "invariant"])
@pytest.mark.parametrize("task", TASKS)
def test_E2_alone_equals_in_any_batch(start: Start, task_dirs: dict[Task, Path], task: Task, invariant: bool) -> None:
    """
    A sequence alone has the logits that it has among others, vectors included: to 1e-5, bitwise when invariant.

    Inverse: pooling a `sequence` head at the batch's first token instead of the sequence's turns it red.
    """
    driver = start(task_dirs[task], max_batch_tokens=128, batch_invariant=invariant)
    asked = texts(12, seed=2)
    alone = [driver.answer(ids, types=types, pooling=LOGITS) for ids, types in asked]
    rng = random.Random(3)
    order = rng.sample(range(len(asked)), len(asked))
    handles = {}
    for place in order:
        ids, types = asked[place]
        handles[place] = driver.submit(ids, types=types, pooling=LOGITS)
        if rng.random() < 0.5:
            driver.submit(ids, types=types, pooling=VECTOR)
    driver.run()

    for place, handle in handles.items():
        one, other = logits_of(alone[place], task), logits_of(driver.answers[handle, 0], task)
        if invariant:
            assert one.tobytes() == other.tobytes()
        else:
            np.testing.assert_allclose(other, one, atol=LAYOUT_TOLERANCE, rtol=LAYOUT_TOLERANCE)


def test_vectors_and_logits_share_a_batch(start: Start, task_dirs: dict[Task, Path]) -> None:
    """A plan that holds both kinds answers each with what it asked for, in one step."""
    driver = start(task_dirs["ner"])
    (ids, types), *_ = texts(1, seed=4)
    logits = driver.submit(ids, types=types, pooling=LOGITS)
    vector = driver.submit(ids, types=types, pooling=VECTOR)
    driver.run()

    assert driver.num_steps == 1
    assert len(driver.answers[vector, 0].last.embedding) == 96
    assert not driver.answers[vector, 0].last.task_logits
    assert logits_of(driver.answers[logits, 0], "ner").shape == (len(ids), 5)
    assert not driver.answers[logits, 0].last.embedding


def test_a_model_without_a_head_refuses(start: Start, tmp_path: Path) -> None:
    """Logits of a plain encoder are refused in words; it goes on embedding."""
    from tiny import tiny_bert

    driver = start(tiny_bert(tmp_path / "plain"))
    refused = driver.answer([5, 6], pooling=LOGITS).last.error

    assert refused.code == "unsupported_task"
    assert "no task head" in refused.message
    assert driver.answer([5, 6], pooling=VECTOR).last.embedding


def test_large_answers_take_several_steps(
    start: Start, task_dirs: dict[Task, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A step's logits stay within the bound on their bytes, whatever the token budget would let through.

    Inverse: a scheduler that counts no bytes answers all in one step.
    """
    monkeypatch.setattr(encoder_scheduler, "MAX_OUTPUT_BYTES", 4 * 5 * 20)
    driver = start(task_dirs["ner"], max_batch_tokens=256)
    for _ in range(6):
        driver.submit([7] * 10, pooling=LOGITS)
    driver.run()

    assert driver.num_steps == 3


def test_heads_of_half_precision_answer_in_fp32(start: Start, task_dirs: dict[Task, Path]) -> None:
    """At bf16 the logits still travel as fp32, close to those of fp32."""
    asked = texts(3, seed=5)
    exact = ask_all(start(task_dirs["classify"]), asked)
    coarse = ask_all(start(task_dirs["classify"], dtype="bfloat16"), asked)

    for one, other in zip(exact, coarse, strict=True):
        np.testing.assert_allclose(logits_of(other, "classify"), logits_of(one, "classify"), atol=1.0)


def test_the_front_learns_of_the_head(start: Start, task_dirs: dict[Task, Path]) -> None:
    """The greeting tells how many columns the logits have."""
    hello = start(task_dirs["ner"]).engine.hello  # type: ignore[attr-defined]  # both engines have one

    assert hello.task_labels == 5
