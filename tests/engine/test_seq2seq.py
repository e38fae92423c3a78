"""Encoder-decoders through the real engine: the answers of transformers, whatever layout, batch, cache and memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import Answer, Driver
from tiny import tiny_t5
from torch import Tensor

from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import build_seq2seq
from trilithon_parallel.weights.loader import load_stage
from trilithon_server.engine.wire_pb2 import Beam, Finish, Pooling, Submit, ToEngine

Start = Callable[..., Driver]
Texts = Sequence[Sequence[int]]

TOLERANCE = 5e-5  # of log-probabilities at fp32: these random weights have logits many times larger than real ones
START = 0
LAYERS = {"encoder_layers": 3, "decoder_layers": 3, "scale": 0.35}
RANDOM = random.Random(5)
PASSAGES = [[RANDOM.randrange(3, 250) for _ in range(size)] for size in (40, 7, 33, 16, 90)]
SAMPLED = {"temperature": 1.0, "seed": 42, "max_tokens": 16}
BLOCK_BYTES = 16 * 3 * 2 * 4 * 16 * 4  # tokens x decoder layers x kinds x heads x channels x fp32


@pytest.fixture(scope="module")
def t5_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers each, so that two and three stages cut it beside the border and within either stack."""
    return tiny_t5(tmp_path_factory.mktemp("t5"), **LAYERS)


def sources(texts: Texts, biases: Sequence[float] = ()) -> dict[str, Any]:
    """The encoder's side of a request."""
    flat = [token for text in texts for token in text]
    return {"source_tokens": flat, "source_lengths": [len(text) for text in texts], "source_biases": biases}


def ask(
    driver: Driver, texts: Texts, biases: Sequence[float] = (), *, forced: Sequence[int] = (), **more: Any
) -> Answer:
    """One answer to texts, behind tokens that it must begin with."""
    return driver.answer([START, *forced], **sources(texts, biases), **more)


def assert_equal(one: Answer, other: Answer) -> None:
    assert one.tokens == other.tokens
    assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)


def hugging_face(model_dir: Path) -> Any:
    import transformers

    return transformers.T5ForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32).eval()


def logprobs_of(logits_TV: Tensor, tokens: Sequence[int]) -> list[float]:
    """Of each token, by the row before it."""
    rows = logits_TV.double().log_softmax(-1)
    return [float(rows[i, token]) for i, token in enumerate(tokens)]


@pytest.mark.parametrize("shape", [{}, {"gated": True, "tied": False}], ids=["1.0", "1.1"])
def test_E10_answers_are_those_of_transformers(start: Start, tmp_path: Path, shape: dict[str, Any]) -> None:
    """
    Greedy tokens, their log-probabilities, those of given tokens, and beams, of texts of several lengths.

    Inverse seen: a decoder without its bias by distance, a score that is divided by sqrt(head_dim).
    """
    driver, model = start(tiny_t5(tmp_path, **LAYERS, **shape)), hugging_face(tmp_path)
    for text in PASSAGES:
        one = ask(driver, [text], sampling={"max_tokens": 24})
        with torch.no_grad():
            theirs = model.generate(torch.tensor([text]), max_new_tokens=24, do_sample=False, eos_token_id=255)
            assert one.tokens == theirs[0, 1:].tolist()
            logits = model(input_ids=torch.tensor([text]), decoder_input_ids=theirs[:, :-1]).logits[0]
        expected = logprobs_of(logits, one.tokens)
        scored = ask(driver, [text], forced=one.tokens, sampling={"max_tokens": 0, "prompt_logprobs": 0})
        assert one.logprobs == pytest.approx(expected, abs=TOLERANCE)
        assert scored.prompt_logprobs == pytest.approx(expected, abs=TOLERANCE)
        beam = {"num_sequences": 4, "temperature": 1.0, "beam": Beam(num_answers=1, length_penalty=1.0)}
        with torch.no_grad():
            best = model.generate(
                torch.tensor([text]), max_new_tokens=9, num_beams=4, do_sample=False, eos_token_id=255
            )
        assert ask(driver, [text], sampling={"max_tokens": 9, **beam}).tokens == best[0, 1:].tolist()


@pytest.mark.parametrize("biases", [(), (0.0,) * 5, (0.4, -0.3, 2.0, 0.0, 1.1)], ids=["none", "zero", "some"])
def test_E4_texts_read_together_are_read_as_in_training(t5_dir: Path, start: Start, biases: Sequence[float]) -> None:
    """
    Several texts with a bias each: the log-probabilities of the trained forward pass, to which no biases are as zeros.

    Inverse seen: a bias for the wrong text; padding between two texts that is read.
    """
    config, grid = load_config(t5_dir), Grid.single()
    stage = build_seq2seq(config, grid=grid, backend=select("torch"), dtype=torch.float32)
    load_stage(stage, t5_dir, config=config, grid=grid)
    tokens = [17, 4, 99, 230]
    bounds = [0, *torch.tensor([len(text) for text in PASSAGES]).cumsum(0).tolist()]
    given = torch.tensor(biases or [0.0] * 5).repeat_interleave(torch.tensor([len(text) for text in PASSAGES]))
    with torch.no_grad():
        hidden = stage(
            None,
            encoder_tokens_E=torch.tensor([token for text in PASSAGES for token in text]),
            encoder_cu_seqlens=bounds,
            decoder_tokens_T=torch.tensor([START, *tokens[:-1]]),
            decoder_cu_seqlens=[0, len(tokens)],
            passages=len(PASSAGES),
            cross_bias_E=given,
        )
        expected = logprobs_of(stage.gather_logits(hidden), tokens)
    scores = {"max_tokens": 0, "prompt_logprobs": 0}
    served = ask(start(t5_dir), PASSAGES, biases, forced=tokens, sampling=scores)

    assert served.prompt_logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_acc_A06_the_order_of_texts_does_not_matter(t5_dir: Path, start: Start) -> None:
    """Shuffled, with their biases, they give the answer's log-probability within 1e-4."""
    driver, biases = start(t5_dir), [0.4, -0.3, 2.0, 0.0, 1.1]
    one = ask(driver, PASSAGES, biases)
    order = [3, 1, 4, 0, 2]
    other = ask(driver, [PASSAGES[i] for i in order], [biases[i] for i in order])
    straight = ask(driver, PASSAGES, [biases[i] for i in order])

    assert other.tokens == one.tokens
    assert sum(other.logprobs) == pytest.approx(sum(one.logprobs), abs=1e-4)
    assert straight.logprobs != pytest.approx(one.logprobs, abs=1e-2)  # a bias does matter


CASES: list[tuple[Texts, Sequence[float], dict[str, Any]]] = [
    (PASSAGES[:1], (), {"prompt_logprobs": 0}),
    (PASSAGES, (0.4, -0.3, 2.0, 0.0, 1.1), {"logprobs": 3}),
    (PASSAGES[1:3], (), {"num_sequences": 3, **SAMPLED}),
    (PASSAGES[4:], (), {"num_sequences": 3, "temperature": 1.0, "beam": Beam(num_answers=2, length_penalty=1.0)}),
    (PASSAGES[:2], (1.0, 0.0), {"repetition_penalty": 1.3, "no_repeat_ngram": 2, **SAMPLED}),
]


def run_all(driver: Driver) -> dict[tuple[int, int], Answer]:
    """Every case, all at once."""
    for texts, biases, sampling in CASES:
        driver.submit([START, 9, 9], sampling=sampling, **sources(texts, biases))
    driver.run()
    return driver.answers


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (1, 3)])
def test_E1_E5_ranks_equal_one(t5_dir: Path, start: Start, tp: int, pp: int) -> None:
    """
    Greedy, scored, biased, drawn, forked and searched answers of several ranks are those of one; then all is freed.

    Stages cut the model at the border of its stacks (2) and within both (3); texts come in plans of their own.
    """
    one, many = start(t5_dir), start(t5_dir, tp=tp, pp=pp, max_batch_tokens=32)
    expected, found = run_all(one), run_all(many)

    assert expected.keys() == found.keys()
    for key, answer in expected.items():
        assert_equal(found[key], answer)
        assert found[key].prompt_logprobs == pytest.approx(answer.prompt_logprobs, abs=TOLERANCE)
    assert many.stats.blocks_in_use == 0


@pytest.mark.parametrize("budget", [1, 24, 256])
def test_E2_E5_alone_equals_any_batch(t5_dir: Path, start: Start, budget: int) -> None:
    """A request alone gives what it gives among others, in steps of any size."""
    together, alone = run_all(start(t5_dir, max_batch_tokens=budget)), start(t5_dir, prefix_cache=False)
    for handle, (texts, biases, sampling) in enumerate(CASES, 1):
        number = alone.submit([START, 9, 9], sampling=sampling, **sources(texts, biases))
        alone.run()
        for index in range(2 if "num_sequences" in sampling else 1):
            assert_equal(together[handle, index], alone.answers[number, index])


def test_E3_the_cache_knows_texts_apart(t5_dir: Path, start: Start) -> None:
    """
    A text that was read before is not encoded again, for another request either; what the decoder has written to other
    texts or biases is never taken for its own.

    Inverse seen: a root key without the sources, or without their biases.
    """
    driver, fresh = start(t5_dir), start(t5_dir, prefix_cache=False)
    forced = [5 + i for i in range(40)]
    one, two, three = PASSAGES[:3]
    requests: list[tuple[Texts, Sequence[float], int]] = [
        ([one, two], (), 0),
        ([one, two], (), 47 + 32),  # both texts, and the decoder's full blocks
        ([two, one], (), 47),  # in another order: the decoder's bits may differ
        ([one, two], (0.5, 0.0), 47),
        ([one, two], (0.0, 0.5), 47),
        ([three, two], (), 7),
        ([one, two], (0.5, 0.0), 47 + 32),
    ]
    for texts, biases, hit in requests:
        answer = ask(driver, texts, biases, forced=forced)
        assert answer.cached_tokens == hit
        assert_equal(answer, ask(fresh, texts, biases, forced=forced))
    salted = ask(driver, [one, two], forced=forced, cache_salt=b"another tenant")
    passing = ask(driver, [one, two], forced=forced, bypass_cache=True)
    scored = ask(driver, [one, two], forced=forced, sampling={"prompt_logprobs": 0})
    assert (salted.cached_tokens, passing.cached_tokens, scored.cached_tokens) == (0, 0, 47)
    assert len(scored.prompt_logprobs) == len(forced)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_E3_what_waits_for_memory_gives_the_same_answers(t5_dir: Path, start: Start, prefix_cache: bool) -> None:
    """
    More requests than memory: they wait, or lose their blocks and are encoded again, and all finish as ever.

    Inverse seen: sources that a preempted request keeps are never freed.
    """
    ample = start(t5_dir)
    tight = start(t5_dir, prefix_cache=prefix_cache, kv_cache_bytes=15 * BLOCK_BYTES)
    wanted = {"max_tokens": 40}
    texts = [[PASSAGES[i], [*PASSAGES[1], i]] for i in (0, 1, 2, 3, 0, 1, 2, 3)]
    for driver in (ample, tight):
        for given in texts:
            driver.submit([START], sampling=wanted, **sources(given))
        driver.run()

    assert tight.stats.preemptions > 0
    for key, answer in ample.answers.items():
        assert_equal(tight.answers[key], answer)
    assert tight.stats.blocks_in_use == 0


def test_R4_what_can_never_fit_is_refused_with_numbers(t5_dir: Path, start: Start) -> None:
    """Each text begins in a block of its own: 5 texts of 186 tokens take 14 blocks, an answer of 40 tokens 3."""
    driver = start(t5_dir, kv_cache_bytes=16 * BLOCK_BYTES)
    refused = ask(driver, PASSAGES, sampling={"max_tokens": 40}).last
    taken = ask(driver, PASSAGES, sampling={"max_tokens": 32})

    assert (refused.finish, refused.error.code) == (Finish.ERROR, "kv_capacity_exceeded")
    assert "at most 256 cache tokens on this server. Given: 272" in refused.error.message
    assert len(taken.tokens) == 32


@pytest.mark.parametrize("seed", range(3))
def test_R6_aborts_at_any_time_free_the_memory(t5_dir: Path, start: Start, seed: int) -> None:
    """Requests end while they wait, while texts are encoded, while they decode: the law holds after every step."""
    rng = random.Random(seed)
    driver = start(t5_dir, max_batch_tokens=24, kv_cache_bytes=24 * BLOCK_BYTES)
    handles = []
    for number in range(14):
        texts = rng.sample(PASSAGES, rng.randrange(1, 4))
        handles.append(
            driver.submit([START], sampling={"max_tokens": 30, "num_sequences": 1 + number % 2}, **sources(texts))
        )
    for handle in rng.sample(handles, 10):
        steps = driver.num_steps + rng.randrange(4)
        driver.run(until=lambda steps=steps: driver.num_steps >= steps)  # type: ignore[misc]  # a default is no inference
        driver.abort(handle, index=rng.choice([-1, 0]), cause=rng.choice(["cancelled", "disconnect", "deadline"]))
    driver.run()

    assert all(answer.last.finish for answer in driver.answers.values())
    assert driver.stats.blocks_in_use == 0


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({}, "unsupported_task", "needs a text for its encoder"),
        (sources([[]]), "prompt_too_long", "must have 1 to 512 tokens. Given: 0 to 0"),
        (sources([[5], [7] * 513]), "prompt_too_long", "Given: 1 to 513"),
        ({"source_tokens": [1, 2], "source_lengths": [3]}, "invalid_value", "must sum to 2. Given: 3"),
        (sources([[4, 256]]), "token_id_range", "below 256. Given: 256"),
        (sources([[4], [5]], [1.0]), "invalid_value", "one for each of 2 sources. Given: 1"),
        (sources([[4]], [float("inf")]), "invalid_value", "must be finite numbers"),
        ({**sources([[4]]), "positions": [0]}, "invalid_value", "positions are for decoders"),
    ],
)
def test_R11_the_engine_refuses_sources_that_it_cannot_read(
    t5_dir: Path, start: Start, fields: dict[str, Any], code: str, says: str
) -> None:
    """One sentence, and the engine goes on."""
    driver = start(t5_dir)
    refused = driver.answer([START], **fields).last

    assert (refused.finish, refused.error.code) == (Finish.ERROR, code)
    assert says in refused.error.message
    assert len(ask(driver, PASSAGES[:1]).tokens) == 12


def test_R11_models_are_asked_for_what_they_do(t5_dir: Path, start: Start) -> None:
    """A decoder reads no sources, an encoder-decoder makes no vectors, and has no batch-invariant mode."""
    of_decoder = start().answer([3], **sources([[4]])).last
    driver = start(t5_dir)
    driver.engine.send(ToEngine(submit=Submit(handle=9, prompt=[3], pooling=Pooling())))
    vector = next(delta for step in driver.engine.steps() for delta in step.deltas)

    assert "has no encoder" in of_decoder.error.message
    assert vector.error.code == "unsupported_task"
    with pytest.raises(ModelError, match="has no batch-invariant mode"):
        start(t5_dir, batch_invariant=True)
