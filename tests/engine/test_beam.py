"""Beam search: against transformers, against trying everything, and whatever else the engine does meanwhile."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import Answer, Driver, make_sampling
from hypothesis import given
from hypothesis import strategies as st

from trilithon_server.engine.batch import Limits
from trilithon_server.engine.beam import BeamSearch, End
from trilithon_server.engine.constraints import ConstraintCompiler
from trilithon_server.engine.core import EngineCore
from trilithon_server.engine.intake import Facts
from trilithon_server.engine.logprobs import TokenInfo
from trilithon_server.engine.plan import Kind, StepOutput
from trilithon_server.engine.sampler import Drawn
from trilithon_server.engine.wire_pb2 import Beam, Constraint, Finish, Submit

Start = Callable[..., Driver]

PROMPT = [(7 * i * i + 3 * i + 11) % 370 + 5 for i in range(37)]
TOLERANCE = 1e-5  # of a log-probability, fp32, another order of additions
EARLY = {Beam.HEURISTIC: False, Beam.FIRST: True, Beam.NEVER: "never"}


def beams(width: int, n: int = 1, *, penalty: float = 1.0, early: Any = Beam.HEURISTIC, **rest: Any) -> dict[str, Any]:
    """A sampling that searches."""
    beam = Beam(num_answers=n, length_penalty=penalty, early=early)
    return {"num_sequences": width, "temperature": 1.0, "beam": beam} | rest


def answers(driver: Driver, handle: int, n: int) -> list[Answer]:
    return [driver.answers[handle, index] for index in range(n)]


def search(driver: Driver, prompt: Sequence[int], n: int, sampling: dict[str, Any]) -> list[Answer]:
    handle = driver.submit(prompt, sampling=sampling)
    driver.run()
    return answers(driver, handle, n)


def told(found: Sequence[Answer]) -> list[tuple[list[int], int]]:
    """Tokens and finish reasons: what two searches are compared by."""
    return [(answer.tokens, answer.last.finish) for answer in found]


def up_to_an_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """What stands before the padding."""
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: at + 1]


@pytest.mark.parametrize("early", EARLY, ids=lambda early: Beam.Early.Name(early).lower())
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize(("width", "n"), [(2, 1), (4, 4), (7, 3)])
def test_E3_beams_are_those_of_transformers(
    start: Start, tiny_dir: Path, width: int, n: int, penalty: float, early: Any
) -> None:
    """
    The same answers in the same order with the same worth, whatever the length penalty and the way to stop.

    Inverse seen: ranking ended beams by their sums alone turns the penalties other than 0 red.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    driver, ends = start(), [2, 17, 230, 301]
    for prompt in (PROMPT, PROMPT[5:20]):
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), num_beams=width,
            num_return_sequences=n, max_new_tokens=14, do_sample=False, length_penalty=penalty,
            early_stopping=EARLY[early], eos_token_id=ends, pad_token_id=0, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        ours = search(
            driver, prompt, n, beams(width, n, penalty=penalty, early=early, max_tokens=14, end_token_ids=ends)
        )

        expected = [up_to_an_end(row[len(prompt) :].tolist(), ends) for row in theirs.sequences]
        assert [answer.tokens for answer in ours] == expected
        worth = [sum(answer.logprobs) / len(answer.tokens) ** penalty for answer in ours]
        assert worth == pytest.approx(theirs.sequences_scores.tolist(), abs=TOLERANCE * 14**2)


@given(data=st.data(), width=st.integers(1, 4), penalty=st.sampled_from([0.0, 1.0, -0.5]))
def test_enough_beams_find_the_best_of_all(data: st.DataObject, width: int, penalty: float) -> None:
    """With a beam for every way to go on, `never` stopping early, the answers are the best of all there are."""
    vocab, length = 3, 3
    gains = {
        path: data.draw(st.lists(st.floats(-5, -0.01), min_size=vocab, max_size=vocab))
        for size in range(length)
        for path in itertools.product(range(vocab), repeat=size)
    }
    everything = {
        path: sum(gains[path[:i]][token] for i, token in enumerate(path)) / length**penalty
        for path in itertools.product(range(vocab), repeat=length)
    }
    found = BeamSearch(vocab**length, num_answers=width, length_penalty=penalty, early="never", max_new_tokens=length)
    paths: list[tuple[int, ...]] = [()] * vocab**length
    while True:
        rows = [
            sorted(((gain, TokenInfo(token, gain, 1)) for token, gain in enumerate(gains[path])), key=lambda c: -c[0])
            for path in paths
        ]
        moves = found.advance(rows, lambda beam, info: None)
        if not moves:
            break
        paths = [(*paths[move.parent], move.token) for move in moves]

    worth = [one.worth for one in found.answers()]
    assert worth == pytest.approx(sorted(everything.values(), reverse=True)[:width])


def test_one_beam_is_greedy(start: Start) -> None:
    """Width 1 takes the most likely token each time, and tells it only at the end."""
    driver = start()
    greedy = driver.answer(PROMPT, sampling={"max_tokens": 12})
    (single,) = search(driver, PROMPT, 1, beams(1))

    assert single.tokens == greedy.tokens
    assert [len(delta.tokens) for delta in single.deltas if delta.tokens] == [12]


CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "plain": (4, 3, {"max_tokens": 30}),
    "ends": (5, 2, {"max_tokens": 40, "end_token_ids": list(range(3, 60))}),
    "no repeats": (3, 3, {"max_tokens": 40, "no_repeat_ngram": 1}),
    "penalties": (4, 2, {"max_tokens": 20, "frequency_penalty": 0.7, "repetition_penalty": 1.3}),
    "late end": (3, 2, {"max_tokens": 20, "min_tokens": 12, "end_token_ids": list(range(3, 200))}),
    "log-probabilities": (3, 2, {"max_tokens": 10, "logprobs": 4, "prompt_logprobs": 2}),
}


def all_cases(driver: Driver) -> list[list[Answer]]:
    handles = [driver.submit(PROMPT[i:], sampling=beams(w, n, **rest)) for i, (w, n, rest) in enumerate(CASES.values())]
    driver.run()
    return [answers(driver, handle, n) for handle, (_, n, _) in zip(handles, CASES.values(), strict=True)]


@pytest.fixture(scope="module")
def expected() -> list[list[Answer]]:
    """Filled by the first test that needs it: every case alone, with room to spare."""
    return []


@pytest.fixture
def alone(start: Start, expected: list[list[Answer]]) -> list[list[Answer]]:
    if not expected:
        driver = start(prefix_cache=False)
        for i, (width, n, rest) in enumerate(CASES.values()):
            expected.append(search(driver, PROMPT[i:], n, beams(width, n, **rest)))
    return expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_batch_sequences": 3},  # a search steps in several plans
        {"max_batch_tokens": 16},
        {"tp": 2},
        {"pp": 2},
    ],
    ids=["together", "few rows", "small chunks", "tp2", "pp2"],
)
def test_E1_E3_beams_see_nothing_of_each_other(
    start: Start, alone: list[list[Answer]], changes: dict[str, Any]
) -> None:
    """
    Searches that share steps, are split over steps or laid out over ranks: the answers that each has alone.

    Inverse seen: leaving out the copies of shared blocks, or the claim before the release.
    """
    driver = start(**changes)

    found = all_cases(driver)

    assert [told(one) for one in found] == [told(one) for one in alone]
    for mine, theirs in zip(itertools.chain(*found), itertools.chain(*alone), strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=TOLERANCE)
        assert mine.prompt_logprobs == pytest.approx(theirs.prompt_logprobs, abs=TOLERANCE)
    assert driver.stats.blocks_in_use == 0


@pytest.mark.parametrize(("pp", "prefix_cache"), [(1, True), (1, False), (2, True)])
def test_E3_preempted_searches_equal_those_never_preempted(start: Start, pp: int, prefix_cache: bool) -> None:
    """
    Searches that take each other's blocks, in the middle of a step too: the answers of an ample cache.

    Inverse seen: preempting without taking the blocks of every beam back (the engine then waits for ever).
    """
    block_bytes = 16 * (2 // pp) * 2 * 3 * 8 * 4  # tokens x layers of a stage x kinds x groups x channels x fp32
    wanted = [(PROMPT[i : i + 9], beams(3, 2, max_tokens=100, no_repeat_ngram=3)) for i in range(5)]
    ample = start(prefix_cache=prefix_cache)
    expected = [told(search(ample, prompt, 2, sampling)) for prompt, sampling in wanted]
    tight = start(prefix_cache=prefix_cache, kv_cache_bytes=24 * block_bytes, pp=pp)
    handles = [tight.submit(prompt, sampling=sampling) for prompt, sampling in wanted]
    tight.run()

    assert tight.stats.preemptions > 0
    assert [told(answers(tight, handle, 2)) for handle in handles] == expected
    assert tight.stats.blocks_in_use == 0


def test_rules_hold_in_every_beam(start: Start) -> None:
    """
    No bigram twice, no early end, log-probabilities of rivals: each beam carries its own past.

    Inverse seen: leaving out the sampler's forks.
    """
    driver = start()
    found = dict(zip(CASES, all_cases(driver), strict=True))
    free = search(driver, PROMPT[2:], 3, beams(3, 3, max_tokens=40))

    assert any(len(set(answer.tokens)) < 40 for answer in free), "nothing repeats by itself: the test is blind"
    assert all(len(set(answer.tokens) - set(PROMPT[2:])) == 40 for answer in found["no repeats"])
    for answer in found["late end"]:
        assert (len(answer.tokens) >= 13, answer.last.finish) == (True, Finish.EOS_TOKEN)
    for answer in found["log-probabilities"]:
        tokens = [token for delta in answer.deltas for token in delta.tokens]
        assert all(len(token.top) == 4 and token.top[0].rank == 1 for token in tokens)


def test_R8_beams_keep_to_a_constraint(start: Start) -> None:
    """The answers are those that the constraint admits, best first; more than there are is the sender's error."""
    words = ["ab", "abba", "cab", "dad"]
    constraint = Constraint(choice=Constraint.Choice(values=words))
    driver = start()
    rest = {"constraint": constraint, "end_token_ids": [2], "max_tokens": 12}
    all_four = search(driver, PROMPT, 4, beams(4, 4, penalty=0.0, early=Beam.NEVER, **rest))
    too_many = search(driver, PROMPT, 6, beams(6, 6, early=Beam.NEVER, **rest))
    plain = driver.answer(PROMPT)

    texts = [tuple(answer.tokens) for answer in all_four]
    assert len(set(texts)) == 4
    assert all(answer.last.constraint_complete for answer in all_four)
    sums = [sum(answer.logprobs) for answer in all_four]
    assert sums == sorted(sums, reverse=True)
    assert {answer.last.error.code for answer in too_many} == {"constraint_dead_end"}
    assert "leave" in too_many[0].last.error.message
    assert len(plain.tokens) == 12


def test_R7_a_search_out_of_time_tells_the_best_so_far(start: Start, long_dir: Path) -> None:
    """Its answers end as TIME_LIMIT with what each beam had."""
    driver = start(long_dir, kv_cache_bytes=32 << 20)
    handle = driver.submit(PROMPT, sampling=beams(3, 2, max_tokens=9000), time_limit_ms=200)
    driver.run()
    found = answers(driver, handle, 2)

    assert [answer.last.finish for answer in found] == [Finish.TIME_LIMIT] * 2
    assert len({len(answer.tokens) for answer in found}) == 1
    assert driver.stats.blocks_in_use == 0


@pytest.mark.parametrize("layout", [{}, {"pp": 2}], ids=["one rank", "pp2"])
def test_R6_cancelled_searches_leave_no_block(start: Start, layout: dict[str, Any]) -> None:
    """Searches dropped after any number of steps, others going on: what was held is free, and the others are whole."""
    rng = random.Random(5)
    driver = start(**layout)
    expected = told(search(driver, PROMPT, 2, beams(3, 2, max_tokens=25)))
    for _ in range(60 if not layout else 15):
        kept = driver.submit(PROMPT, sampling=beams(3, 2, max_tokens=25))
        width = rng.randint(1, 6)
        dropped = driver.submit(PROMPT[: rng.randint(1, 37)], sampling=beams(width, 1, max_tokens=30))
        stop_at = driver.num_steps + rng.randint(0, 30)
        driver.run(until=lambda stop_at=stop_at: driver.num_steps >= stop_at)
        driver.abort(dropped)
        driver.run()
        assert told(answers(driver, kept, 2)) == expected
        assert driver.stats.blocks_in_use == 0


def test_a_search_ends_with_its_last_way(start: Start) -> None:
    """`End` at the first token of every beam: the answers are single tokens, the likeliest first."""
    found = BeamSearch(3, num_answers=2, length_penalty=1.0, early="heuristic", max_new_tokens=9)
    row = [(-0.1 * token, TokenInfo(token, -0.1 * token, token + 1)) for token in range(6)]

    moves = found.advance([row, [], []], lambda beam, info: End(Finish.EOS_TOKEN, matched=info.id))

    assert moves == []
    assert [one.path.info.id for one in found.answers() if one.path is not None] == [0, 1]


def test_a_sign_of_life_tells_of_beams_before_it_tells_of_ends() -> None:
    """
    A search that went on and was dropped before the next plan: the sampler hears of both, in one message.

    Inverse seen: signs of life that carry the ends alone leave the next plan with a fork of a forgotten answer.
    """
    facts = Facts(model_digest="m", vocab_size=400, max_context=64, is_encoder=False, num_blocks=20)
    limits = Limits(max_batch_tokens=64, max_batch_sequences=8)
    core = EngineCore(facts, limits, compiler=ConstraintCompiler(lambda: None), check_blocks=True)  # type: ignore[arg-type, return-value]  # no constraint here
    core.submit(0, Submit(handle=1, prompt=PROMPT, sampling=make_sampling(**beams(2))), 0.0)
    plan = core.plan(0.0)
    assert plan is not None
    row = tuple((-0.1 * token, TokenInfo(token, -0.1 * token, token + 1)) for token in range(4))
    core.land(StepOutput(plan.number, drawn=[Drawn(0, candidates=row)]), 0.1)
    core.abort(0, 1, -1, "cancelled", 0.2)

    told_of = core.signal(Kind.TICK)
    later = core.signal(Kind.TICK)

    assert {fork.sequence_id for fork in told_of.forks} == set(told_of.forgotten) == {0, 1}
    assert (later.forks, later.forgotten) == ([], [])
    core.verify_idle()
