"""E1, E2, E3, E5 on the real model and server: the answer depends on neither layout, batch nor protocol."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import Server, serving

from trilithon import Client, Completion

# Natural-logarithm units, fp32. Where our kernels run the difference is zero; without a C compiler it is this at most.
LOGPROB_TOLERANCE = 1e-5
NUM_TOKENS = 32
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Gravity is the force by which a planet or other body draws objects toward its center. " * 6,
    "Once upon a time, in a village by the sea,",
)
FLAGS = ("--dtype", "float32", "--kv-cache-bytes", "256MiB", "--max-context", "1024")
INVARIANT = ("--dtype", "bfloat16", "--batch-invariant", *FLAGS[2:])
# Unlikely words: their log-probabilities are the large and noisy ones.
UNLIKELY = (
    "Violet ledgers hum; seventeen otters annul a zinc cathedral. Quixotic yes, but who irons the moon? 31-B. " * 4
)

Answer = tuple[tuple[int, ...], tuple[float, ...]]


def greedy(client: Client, prompt: str) -> Answer:
    """Token ids and their log-probabilities, always `NUM_TOKENS` of them."""
    return token_answer(client.generate(prompt, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0))


def sampled(client: Client, prompt: str) -> Answer:
    """A seeded draw with every truncation switched on."""
    return token_answer(
        client.generate(
            prompt, seed=7, temperature=0.9, top_k=200, top_p=0.95, min_p=0.01, repetition_penalty=1.1,
            max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0,
        )
    )  # fmt: skip


def token_answer(completion: Completion) -> Answer:
    """What two runs are compared by."""
    tokens = completion.tokens
    assert len(tokens) == NUM_TOKENS
    return tuple(t.id for t in tokens), tuple(t.logprob for t in tokens if t.logprob is not None)


def scored(client: Client) -> Answer:
    """A long text's own log-probabilities: what a layout or a batch would show in first."""
    completion = client.generate(UNLIKELY, temperature=0, max_tokens=1, prompt_logprobs=0)
    tokens = completion.prompt_tokens
    assert len(tokens) > 100
    return tuple(t.id for t in tokens), tuple(t.logprob for t in tokens if t.logprob is not None)


def worst_difference(expected: list[Answer], actual: list[Answer]) -> float:
    """The largest difference of two runs' log-probabilities, which must be of the same tokens."""
    assert [tokens for tokens, _ in expected] == [tokens for tokens, _ in actual]
    runs = zip(expected, actual, strict=True)
    return max(abs(a - b) for (_, left), (_, right) in runs for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def one_rank(smollm2_dir: Path) -> Iterator[Server]:
    """The model on one rank: what every layout is compared with."""
    with serving(smollm2_dir, *FLAGS) as server:
        yield server


@pytest.fixture(scope="module")
def expected(one_rank: Server) -> dict[str, list[Answer]]:
    """Greedy and sampled answers of one rank, one request at a time."""
    with Client(one_rank.url) as client:
        return answers(client)


def answers(client: Client) -> dict[str, list[Answer]]:
    """Everything that is compared, one request at a time."""
    return {
        "greedy": [greedy(client, prompt) for prompt in PROMPTS],
        "sampled": [sampled(client, prompt) for prompt in PROMPTS],
        "scored": [scored(client)],
    }


def in_a_batch(client: Client) -> dict[str, list[Answer]]:
    """The same, all at once and among others."""
    with ThreadPoolExecutor(13) as pool:
        noise = [pool.submit(client.generate, f"Noise number {i}: " * (i + 1), max_tokens=64, seed=i) for i in range(4)]
        greedy_runs = [pool.submit(greedy, client, prompt) for prompt in PROMPTS]
        sampled_runs = [pool.submit(sampled, client, prompt) for prompt in PROMPTS]
        scored_run = pool.submit(scored, client)
        for job in noise:
            job.result()
        return {
            "greedy": [run.result() for run in greedy_runs],
            "sampled": [run.result() for run in sampled_runs],
            "scored": [scored_run.result()],
        }


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2), (3, 1)], ids=lambda n: str(n))
def test_E1_E5_same_answer_in_every_layout(
    smollm2_dir: Path, expected: dict[str, list[Answer]], tp: int, pp: int
) -> None:
    """
    Greedy tokens are identical and log-probabilities close (see the constants) at every layout, bitwise when only pp
    differs; seeded
    draws are the same tokens. tp = 2 pads this model's 3 key/value groups to 4.
    """
    with serving(smollm2_dir, *FLAGS, "--tp", str(tp), "--pp", str(pp)) as server, Client(server.url) as client:
        actual = answers(client)

    for kind in ("greedy", "scored"):
        assert worst_difference(expected[kind], actual[kind]) <= (LOGPROB_TOLERANCE if tp > 1 else 0.0)
    assert [tokens for tokens, _ in expected["sampled"]] == [tokens for tokens, _ in actual["sampled"]]


def test_E2_E5_alone_equals_any_batch(one_rank: Server, expected: dict[str, list[Answer]]) -> None:
    """A request alone has the tokens, greedy and drawn, that it has among others, and the log-probabilities."""
    with Client(one_rank.url) as client:
        actual = in_a_batch(client)

    for kind, alone in expected.items():
        assert worst_difference(alone, actual[kind]) <= LOGPROB_TOLERANCE


def test_E1_E2_E5_the_invariant_mode_is_bitwise_at_bf16(smollm2_dir: Path) -> None:
    """
    With the mode, at bfloat16: alone, among others and on four ranks, tokens and log-probabilities are the same bits.

    Inverse seen: with `--no-batch-invariant` four ranks differ from one.
    """
    with serving(smollm2_dir, *INVARIANT) as server, Client(server.url) as client:
        alone, batched = answers(client), in_a_batch(client)
    with serving(smollm2_dir, *INVARIANT, "--tp", "2", "--pp", "2") as server, Client(server.url) as client:
        four_ranks = answers(client)

    assert batched == alone
    assert four_ranks == alone


def test_E3_grpc_equals_http(one_rank: Server, expected: dict[str, list[Answer]]) -> None:
    """The other protocol gives the same answers; the prompts are in the prefix cache by now, which changes nothing."""
    with Client(one_rank.grpc_target) as client:
        actual = [greedy(client, prompt) for prompt in PROMPTS]

    assert worst_difference(expected["greedy"], actual) <= LOGPROB_TOLERANCE
