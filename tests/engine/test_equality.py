"""The same answer however it was computed, on a tiny model through the real engine (E1, E2, E3, E5)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from engine_driver import Answer, Driver

# Of log-probabilities at fp32. The bar's 1e-5 is for real models; these random weights have logits many times larger.
TOLERANCE = 5e-5
PROMPT = [(7 * i * i + 3 * i + 1) % 380 + 3 for i in range(70)]
SAMPLED = {"temperature": 1.0, "seed": 42, "max_tokens": 24}
Start = Callable[..., Driver]


def assert_equal(one: Answer, other: Answer) -> None:
    assert one.tokens == other.tokens
    assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_E3_prefix_hit_equals_miss(start: Start, sampling: dict[str, Any]) -> None:
    """A prompt found in the prefix cache gives the answer that it gives when computed.

    Inverse seen red: leave the parent out of a block's key.
    """
    driver = start()
    miss = driver.answer(PROMPT, sampling=sampling)
    hit = driver.answer(PROMPT, sampling=sampling)
    other = driver.answer([9, *PROMPT[1:]], sampling=sampling)
    # Blocks of both prompts are cached by now, but the second one of `PROMPT` only after its first.
    crossed = driver.answer([9, *PROMPT[1:16], *PROMPT[32:]], sampling=sampling)

    assert [x.cached_tokens for x in (miss, hit, other, crossed)] == [0, 64, 0, 16]
    assert_equal(hit, miss)


@pytest.mark.parametrize("budget", [1, 7, 16, 33])
def test_E3_chunked_prefill_equals_whole(start: Start, budget: int) -> None:
    """
    A prompt computed in chunks of any size gives the answer of the whole.

    Inverse seen red: score a chunk's rows from the wrong offset.
    """
    whole = start(max_batch_tokens=256).answer(PROMPT, sampling={"prompt_logprobs": 2})
    chunked = start(max_batch_tokens=budget).answer(PROMPT, sampling={"prompt_logprobs": 2})

    assert_equal(chunked, whole)
    assert len(whole.prompt_logprobs) == len(PROMPT) - 1
    assert chunked.prompt_logprobs == pytest.approx(whole.prompt_logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_E3_preempted_equals_never_preempted(start: Start, prefix_cache: bool) -> None:
    """Requests that lose their blocks and are computed again give what they give alone, n > 1 included.

    Inverse seen red: drop the generated tokens of a preempted answer.
    """
    requests = [
        (PROMPT[:20], {"max_tokens": 60}),
        (PROMPT[10:45], {"max_tokens": 50, "temperature": 1.0, "seed": 3, "repetition_penalty": 1.2}),
        (PROMPT[5:22], {"max_tokens": 60, "temperature": 1.0, "seed": 4, "num_sequences": 3, "no_repeat_ngram": 3}),
        (PROMPT[30:50], {"max_tokens": 60, "frequency_penalty": 0.3}),
    ]
    ample = start(prefix_cache=prefix_cache)
    alone = []
    for prompt, sampling in requests:
        handle = ample.submit(prompt, sampling=sampling)
        ample.run()
        alone.append([ample.answers[handle, index] for index in range(sampling.get("num_sequences", 1))])
    block_bytes = 16 * 2 * 2 * 3 * 8 * 4  # tokens x layers x kinds x groups x channels x fp32
    tight = start(prefix_cache=prefix_cache, kv_cache_bytes=18 * block_bytes)
    handles = [tight.submit(prompt, sampling=sampling) for prompt, sampling in requests]
    tight.run()

    assert tight.stats.preemptions > 0
    for handle, expected in zip(handles, alone, strict=True):
        for index, answer in enumerate(expected):
            assert_equal(tight.answers[handle, index], answer)


def test_E3_prompt_logprobs_are_given_on_a_cached_prompt_too(start: Start) -> None:
    """A request for prompt log-probabilities computes what the cache holds. Inverse seen red: let it read the cache."""
    driver = start()
    driver.answer(PROMPT)
    scored = driver.answer(PROMPT, sampling={"prompt_logprobs": 0})
    plain = start(prefix_cache=False).answer(PROMPT, sampling={"prompt_logprobs": 0})

    assert scored.cached_tokens == 0
    assert len(scored.prompt_logprobs) == len(PROMPT) - 1
    assert scored.prompt_logprobs == pytest.approx(plain.prompt_logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("first", [1, 16, 17, 20, len(PROMPT) - 1])
def test_E3_prompt_tokens_before_the_first_scored_one_are_read_from_the_cache(start: Start, first: int) -> None:
    """
    Log-probabilities that are wanted from one token on are those of the whole prompt read anew, and whole blocks before
    it are cached. Inverse seen red: read one block more.
    """
    driver = start()
    driver.answer(PROMPT)
    scored = driver.answer(PROMPT, sampling={"prompt_logprobs": 0, "prompt_logprobs_from": first, "max_tokens": 0})
    plain = start(prefix_cache=False).answer(PROMPT, sampling={"prompt_logprobs": 0, "max_tokens": 0})

    assert scored.cached_tokens == (first - 1) // 16 * 16
    assert scored.prompt_logprobs == pytest.approx(plain.prompt_logprobs[first - 1 :], abs=TOLERANCE)


def test_prompt_logprobs_equal_those_of_generation(start: Start) -> None:
    """Scoring a generated text gives the log-probabilities that generation reported; max_tokens 0 only scores."""
    driver = start()
    generated = driver.answer(PROMPT[:10], sampling={"max_tokens": 20})
    scored = driver.answer(PROMPT[:10] + generated.tokens, sampling={"prompt_logprobs": 0, "max_tokens": 0})

    assert scored.tokens == []
    assert scored.prompt_logprobs[9:] == pytest.approx(generated.logprobs, abs=TOLERANCE)


def test_E2_a_request_alone_equals_the_request_in_a_batch(start: Start) -> None:
    """Neighbours that come and go change nothing."""
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 380) for _ in range(rng.randrange(1, 60))] for _ in range(12)]
    params = [{"max_tokens": rng.randrange(1, 30), "temperature": float(i % 2), "seed": i} for i in range(12)]
    driver = start(max_batch_tokens=48, max_batch_sequences=5)
    handles = [driver.submit(prompt, sampling=p) for prompt, p in zip(prompts, params, strict=True)]
    driver.run()
    alone = start(prefix_cache=False)

    for handle, prompt, p in zip(handles, prompts, params, strict=True):
        assert_equal(driver.answers[handle, 0], alone.answer(prompt, sampling=p))


def test_E2_the_batch_invariant_mode_is_bitwise(start: Start) -> None:
    """With batch_invariant on, log-probabilities are the same bits alone, in a batch, and in chunks, at bf16.

    Inverse seen red: the same comparison without the flag.
    """
    prompts = [PROMPT[start_ : start_ + 30] for start_ in (0, 7, 20)]
    busy = start(dtype="bfloat16", batch_invariant=True, max_batch_tokens=17)
    handles = [busy.submit(prompt, sampling={"logprobs": 3}) for prompt in prompts]
    busy.run()
    alone = start(dtype="bfloat16", batch_invariant=True, prefix_cache=False)

    for handle, prompt in zip(handles, prompts, strict=True):
        expected = alone.answer(prompt, sampling={"logprobs": 3})
        assert busy.answers[handle, 0].tokens == expected.tokens
        assert busy.answers[handle, 0].logprobs == expected.logprobs


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_E1_E5_two_ranks_equal_one(start: Start, tp: int, pp: int) -> None:
    """
    Greedy, seeded, scored, penalised and forked answers at (tp, pp) equal those of one rank; afterwards all is freed.

    Inverse seen red: seed the draw by rank; leave the block copies out of the plan.
    """
    cases: list[dict[str, Any]] = [
        {"prompt_logprobs": 3, "logprobs": 5, "logprob_token_ids": [7]},
        {"temperature": 1.0, "seed": 9, "num_sequences": 3, "max_tokens": 20},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 1, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"no_repeat_ngram": 2, "min_tokens": 6, "end_token_ids": [2], "logit_bias": {5: 3.0}},
    ]
    drivers = [start(), start(tp=tp, pp=pp, max_batch_tokens=32)]
    for driver in drivers:
        for number, sampling in enumerate(cases):
            driver.submit(PROMPT[number:], sampling=sampling)
        driver.run()
    one, many = drivers

    assert one.answers.keys() == many.answers.keys()
    for key, answer in one.answers.items():
        assert_equal(many.answers[key], answer)
        assert many.answers[key].prompt_logprobs == pytest.approx(answer.prompt_logprobs, abs=TOLERANCE)
        tops = [[(top.id, top.rank) for top in token.top] for delta in answer.deltas for token in delta.tokens]
        others = [[(t.id, t.rank) for t in token.top] for d in many.answers[key].deltas for token in d.tokens]
        assert tops == others
    assert many.stats.blocks_in_use == 0


def test_E5_a_seeded_sample_is_the_same_after_a_restart(start: Start) -> None:
    """The same seed draws the same text in a fresh engine; another seed does not."""
    first = start().answer(PROMPT, sampling=SAMPLED)
    again = start().answer(PROMPT, sampling=SAMPLED)
    other = start().answer(PROMPT, sampling=SAMPLED | {"seed": 43})

    assert again.tokens == first.tokens
    assert other.tokens != first.tokens
