"""How requests end, on a tiny model through the real engine: finish reasons, limits, aborts, errors (R6, R7, R8)."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_driver import Driver
from safetensors.numpy import load_file, save_file
from tiny import tiny_gpt2

from trilithon_parallel.config import ModelError
from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.engine.wire_pb2 import Beam, Constraint, Control, Finish, Pooling, ToEngine

PROMPT = [(5 * i * i + i + 7) % 370 + 5 for i in range(40)]
Start = Callable[..., Driver]


def choice(*values: str) -> Constraint:
    return Constraint(choice=Constraint.Choice(values=values))


def test_end_and_stop_tokens_finish_with_their_reason(start: Start) -> None:
    """An end token ends as EOS_TOKEN, a stop token as STOP_TOKEN; both name the token and include it."""
    driver = start()
    tokens = driver.answer(PROMPT).tokens
    at = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    ended = driver.answer(PROMPT, sampling={"end_token_ids": [tokens[at]]})
    stopped = driver.answer(PROMPT, sampling={"stop_token_ids": [tokens[at]]})
    plain = driver.answer(PROMPT, sampling={"max_tokens": at})

    assert (ended.tokens, ended.last.finish) == (tokens[: at + 1], Finish.EOS_TOKEN)
    assert (stopped.tokens, stopped.last.finish) == (tokens[: at + 1], Finish.STOP_TOKEN)
    assert ended.last.matched_token_id == stopped.last.matched_token_id == tokens[at]
    assert (plain.tokens, plain.last.finish) == (tokens[:at], Finish.MAX_TOKENS)


def test_min_tokens_holds_end_tokens_back(start: Start) -> None:
    """An end token can't come before `min_tokens`."""
    driver = start()
    first = driver.answer(PROMPT).tokens[0]
    answer = driver.answer(PROMPT, sampling={"end_token_ids": [first], "min_tokens": 5})

    assert len(answer.tokens) >= 5
    assert first not in answer.tokens[:5]


def test_a_full_window_finishes_as_context_length(start: Start) -> None:
    """The window is never shifted: the answer ends where it is full."""
    answer = start(max_context=48).answer(PROMPT, sampling={"max_tokens": 100})

    assert answer.last.finish == Finish.CONTEXT_LENGTH
    assert len(PROMPT) + len(answer.tokens) == 48


def test_R7_a_time_limit_ends_with_what_there_is(start: Start, long_dir: Path) -> None:
    """A request that runs out of time ends as TIME_LIMIT and keeps its tokens; its blocks are free."""
    driver = start(long_dir, kv_cache_bytes=32 << 20)
    handle = driver.submit(PROMPT, sampling={"max_tokens": 16000}, time_limit_ms=200)
    driver.run()
    answer = driver.answers[handle, 0]

    assert answer.last.finish == Finish.TIME_LIMIT
    assert 0 < len(answer.tokens) < 16000
    assert driver.stats.blocks_in_use == 0


def test_a_request_that_never_starts_ends_with_queue_timeout(start: Start) -> None:
    """The queue timeout is an error of the request that waited, and of no other."""
    driver = start(max_batch_sequences=1)
    running = driver.submit(PROMPT, sampling={"max_tokens": 60})
    waiting = driver.submit(PROMPT, queue_timeout_ms=5)
    driver.run()

    assert driver.answers[waiting, 0].last.error.code == "queue_timeout"
    assert driver.answers[running, 0].last.finish == Finish.MAX_TOKENS


@pytest.mark.parametrize("num_sequences", [1, 3])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 8], ids=["queued", "prefill", "first token", "decode"])
def test_R6_an_abort_frees_everything_within_a_step(start: Start, num_steps: int, num_sequences: int) -> None:
    """Aborted while queued, in prefill or in decode, a request leaves no block behind; its neighbour goes on.

    Inverse seen red: do not release a finished sequence's blocks.
    """
    driver = start(max_batch_tokens=32)
    sampling = {"max_tokens": 100, "temperature": 1.0, "num_sequences": num_sequences}
    other = driver.submit(PROMPT[:5], sampling={"max_tokens": 30})
    handle = driver.submit(PROMPT, sampling=sampling)
    driver.run(until=lambda: driver.num_steps >= num_steps)
    driver.abort(handle)
    driver.run()

    assert all(driver.answers[handle, index].last.finish == Finish.CANCELLED for index in range(num_sequences))
    assert len(driver.answers[other, 0].tokens) == 30
    assert driver.stats.blocks_in_use == 0


def test_R6_one_answer_of_several_can_be_aborted(start: Start) -> None:
    """Aborting the first answer, the one that computes the prompt for all, leaves the others what they were."""
    sampling = {"max_tokens": 15, "temperature": 1.0, "num_sequences": 3, "seed": 8}
    whole = start()
    expected = whole.submit(PROMPT, sampling=sampling)
    whole.run()
    for num_steps in (0, 1, 2, 5):
        driver = start(max_batch_tokens=24)
        handle = driver.submit(PROMPT, sampling=sampling)
        driver.run(until=lambda driver=driver, num_steps=num_steps: driver.num_steps >= num_steps)  # type: ignore[misc]
        driver.abort(handle, index=0)
        driver.run()

        assert driver.answers[handle, 0].last.finish == Finish.CANCELLED
        for index in (1, 2):
            assert driver.answers[handle, index].tokens == whole.answers[expected, index].tokens
        assert driver.stats.blocks_in_use == 0


def test_R6_random_aborts_through_the_engine_leak_nothing(start: Start) -> None:
    """Two hundred requests, half of them aborted at random moments, with tight memory: checked after every step."""
    rng = random.Random(4)
    driver = start(kv_cache_bytes=30 * 9216, max_batch_tokens=40, max_batch_sequences=8)
    for _ in range(200):
        prompt = PROMPT[: rng.randrange(1, 40)]
        sampling = {"max_tokens": rng.randrange(1, 40), "temperature": 1.0, "num_sequences": rng.choice([1, 1, 2, 3])}
        handle = driver.submit(prompt, sampling=sampling)
        goal = driver.num_steps + rng.randrange(3)
        driver.run(until=lambda goal=goal: driver.num_steps >= goal)  # type: ignore[misc]
        if rng.random() < 0.5:
            driver.abort(handle - rng.randrange(3), index=rng.choice([-1, -1, 0, 1]))
    driver.run()

    assert driver.stats.blocks_in_use == 0
    assert all(answer.last.finish for answer in driver.answers.values())


def test_a_shutdown_ends_everything_and_takes_nothing_more(start: Start) -> None:
    """SHUTDOWN ends running requests with that reason; later ones are refused."""
    driver = start()
    running = driver.submit(PROMPT, sampling={"max_tokens": 100})
    driver.run(until=lambda: driver.num_steps >= 2)
    driver.engine.send(ToEngine(control=Control(kind=Control.SHUTDOWN)))
    late = driver.submit(PROMPT)
    driver.run()

    assert driver.answers[running, 0].last.finish == Finish.SHUTDOWN
    assert driver.answers[late, 0].last.error.code == "engine_lost"


def test_resetting_the_prefix_cache_makes_the_next_prompt_miss(start: Start) -> None:
    """After RESET_PREFIX_CACHE nothing is found."""
    driver = start()
    driver.answer(PROMPT)
    driver.engine.send(ToEngine(control=Control(kind=Control.RESET_PREFIX_CACHE)))

    assert driver.answer(PROMPT).cached_tokens == 0


def test_S8_the_prefix_cache_is_partitioned_by_salt(start: Start) -> None:
    """The same prompt under another tenant's salt misses; `bypass_cache` neither reads nor writes."""
    driver = start()
    driver.answer(PROMPT, cache_salt=b"a", bypass_cache=True)
    counts = [driver.answer(PROMPT, cache_salt=salt).cached_tokens for salt in (b"a", b"b", b"a")]

    assert counts == [0, 0, 32]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": []}, "empty_prompt"),
        ({"prompt": [400]}, "token_id_range"),
        ({"prompt": [5] * 512}, "context_length_exceeded"),
        ({"sampling": {"num_sequences": 65}}, "invalid_value"),
        ({"sampling": {"num_sequences": 60, "max_tokens": 400}}, "kv_capacity_exceeded"),
        ({"sampling": {"top_p": 0.0}}, "invalid_value"),
        ({"sampling": {"temperature": float("nan")}}, "invalid_value"),
        ({"sampling": {"logit_bias": {9999: 1.0}}}, "token_id_range"),
        ({"sampling": {"num_sequences": 2, "beam": Beam(num_answers=3)}}, "invalid_value"),
        ({"sampling": {"num_sequences": 2, "beam": Beam()}}, "invalid_value"),
        ({"sampling": {"num_sequences": 2, "beam": Beam(num_answers=1, early=9)}}, "invalid_value"),  # type: ignore[arg-type]  # the fault under test
        ({"sampling": {"num_sequences": 2, "beam": Beam(num_answers=1, length_penalty=float("nan"))}}, "invalid_value"),
        ({"pooling": Pooling()}, "unsupported_task"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_request_is_refused_and_the_next_one_answered(start: Start, fields: dict[str, Any], code: str) -> None:
    """What can't be run ends with a typed error for its sender; the engine goes on."""
    driver = start(kv_cache_bytes=60 * 9216)
    values: dict[str, Any] = {"prompt": PROMPT} | fields
    refused = driver.answer(values.pop("prompt"), **values)

    assert (refused.last.finish, refused.last.error.code) == (Finish.ERROR, code)
    assert len(driver.answer(PROMPT).tokens) == 12


def test_numerical_failure_ends_one_request_only(start: Start, tmp_path: Path) -> None:
    """A position whose embedding overflows breaks the requests that reach it; the others get their usual answers."""
    model_dir = tiny_gpt2(tmp_path)
    tensors = load_file(model_dir / "model.safetensors")
    tensors["transformer.wpe.weight"][20] = 3e38
    save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
    driver = start(model_dir)
    alone = driver.answer(PROMPT[:8], sampling={"max_tokens": 10}, bypass_cache=True)
    healthy = driver.submit(PROMPT[:8], sampling={"max_tokens": 10})
    reaching = driver.submit(PROMPT[:10], sampling={"max_tokens": 30, "temperature": 1.0})
    scored = driver.submit(PROMPT[:30], sampling={"prompt_logprobs": 0, "max_tokens": 0})
    driver.run()

    assert driver.answers[reaching, 0].last.error.code == "numerical_failure"
    assert len(driver.answers[reaching, 0].tokens) == 11
    assert driver.answers[scored, 0].last.error.code == "numerical_failure"
    assert driver.answers[healthy, 0].tokens == alone.tokens
    assert driver.stats.blocks_in_use == 0


@pytest.mark.parametrize("kind", [Pooling.MEAN, Pooling.FIRST, Pooling.LAST])
def test_E2_embeddings_alone_equal_those_in_a_batch(start: Start, tiny_bert_dir: Path, kind: Any) -> None:
    """An encoder answers with one vector a text, normalised if asked, whatever else is in the batch."""
    driver = start(tiny_bert_dir, max_batch_tokens=64)
    prompts = [[token % 250 for token in PROMPT[:n]] for n in (3, 17, 40, 8)]
    alone = [driver.answer(prompt, pooling=Pooling(kind=kind, normalize=True)) for prompt in prompts]
    handles = [driver.submit(prompt, pooling=Pooling(kind=kind, normalize=True)) for prompt in prompts]
    driver.run()

    for handle, expected in zip(handles, alone, strict=True):
        vector = list(driver.answers[handle, 0].last.embedding)
        assert vector == pytest.approx(list(expected.last.embedding), abs=1e-5)
        assert sum(value * value for value in vector) == pytest.approx(1.0, abs=1e-5)


def test_an_encoder_refuses_to_generate(start: Start, tiny_bert_dir: Path) -> None:
    """A generation request to an encoder is refused in words."""
    assert start(tiny_bert_dir).answer([5, 6]).last.error.code == "unsupported_task"


def test_R8_constraints_hold_and_end(start: Start) -> None:
    """Every kind of constraint shapes the answer; one that admits nothing more ends as CONSTRAINT_END."""
    driver = start()
    tokenizer = load_tokenizer(Path(driver.engine.spec.model_dir))  # type: ignore[attr-defined]
    cases = {
        "regex": (Constraint(regex="[0-9]{3}-[0-9]{2}"), r"\d{3}-\d{2}"),
        "choice": (choice("left", "right+", "a|b"), r"left|right\+|a\|b"),
        "schema": (Constraint(json_schema='{"type": "boolean"}'), r"\s*(true|false)"),
        "grammar": (Constraint(grammar='start: "ab" ("c" | "d")'), "ab[cd]"),
    }
    for constraint, pattern in cases.values():
        for temperature in (0.0, 1.0):
            answer = driver.answer(
                PROMPT, sampling={"constraint": constraint, "max_tokens": 60, "temperature": temperature}
            )
            text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
            assert re.fullmatch(pattern, text), text
            assert answer.last.finish == Finish.CONSTRAINT_END
            assert answer.last.constraint_complete


def test_R8_a_constraint_cut_by_max_tokens_says_so(start: Start) -> None:
    """MAX_TOKENS with constraint_complete false tells that the text is not whole."""
    answer = start().answer(PROMPT, sampling={"constraint": Constraint(regex="[0-9]{30}"), "max_tokens": 3})

    assert (answer.last.finish, answer.last.constraint_complete) == (Finish.MAX_TOKENS, False)


def test_R8_a_dead_end_is_an_error_for_its_sender_alone(start: Start) -> None:
    """A constraint that meets masks which forbid its tokens fails, never an unconstrained text; others go on.

    Inverse seen red: sample from the unmasked row when nothing is allowed, and ignore that the matcher refuses it.
    """
    driver = start()
    # The only token allowed is no digit.
    dead = driver.submit(PROMPT, sampling={"constraint": Constraint(regex="[0-9]{30}"), "allowed_token_ids": [40]})
    other = driver.submit(PROMPT)
    driver.run()

    assert driver.answers[dead, 0].last.error.code == "constraint_dead_end"
    assert len(driver.answers[other, 0].tokens) == 12


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(regex="a(b"),
        Constraint(json_schema='{"enum": []}'),
        Constraint(json_schema="not json"),
        Constraint(grammar='start: "a" undefined'),
        choice(),
        choice("a", ""),
        Constraint(),
    ],
    ids=["regex", "empty enum", "not JSON", "grammar", "no choice", "empty choice", "nothing"],
)
def test_R8_a_bad_constraint_is_refused_and_the_engine_lives(start: Start, constraint: Constraint) -> None:
    """A constraint that does not compile is its sender's error (vllm#17248, #52011)."""
    driver = start()

    assert driver.answer(PROMPT, sampling={"constraint": constraint}).last.error.code == "invalid_constraint"
    assert len(driver.answer(PROMPT).tokens) == 12


@pytest.mark.parametrize("schema", ["{}", "true", '{"type": "object"}', '{"properties": {}}'])
def test_R8_an_empty_schema_does_not_hurt(start: Start, schema: str) -> None:
    """A schema that allows anything is served (vllm#37642)."""
    answer = start().answer(PROMPT, sampling={"constraint": Constraint(json_schema=schema), "temperature": 1.0})

    assert answer.last.finish in (Finish.MAX_TOKENS, Finish.CONSTRAINT_END, Finish.EOS_TOKEN)


def test_R11_too_little_memory_is_refused_at_start(start: Start) -> None:
    """A KV cache that can't fit is one sentence with the sum, before anything is served."""
    with pytest.raises(ModelError, match=r"memory must hold weights .* KV cache .* Given: ") as refused:
        start(kv_cache_bytes=1 << 50)

    assert refused.value.code == "memory_insufficient"


def test_R11_a_window_beyond_the_model_is_refused(start: Start) -> None:
    """`max_context` above the model's window names both."""
    with pytest.raises(ModelError, match="must be at most 512, the model's window"):
        start(max_context=4096)
