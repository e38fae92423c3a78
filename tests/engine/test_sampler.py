"""The sampler against a slow reference that sorts everything, parameter by parameter."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_server.engine.logprobs import IMPOSSIBLE, rank_of, sorted_head, token_info
from trilithon_server.engine.philox import philox4x32, uniform
from trilithon_server.engine.rules import Answer, Rules
from trilithon_server.engine.sampler import DEAD_END, NUMERICAL_FAILURE, Draw, Sampler, draw_one
from trilithon_server.engine.wire_pb2 import Sampling, Submit, TokenSequence

Row = npt.NDArray[np.float32]
VOCAB = 60


def sampling(**changes: Any) -> Sampling:
    """Everything off, greedy."""
    values: dict[str, Any] = {
        "num_sequences": 1,
        "top_p": 1.0,
        "typical_p": 1.0,
        "top_p_decay": 1.0,
        "repetition_penalty": 1.0,
        "max_tokens": 100,
        "logprobs": -1,
        "prompt_logprobs": -1,
    }
    return Sampling(**(values | changes))


def answer(prompt: list[int], generated: list[int], *, choice: int = 0, **changes: Any) -> Answer:
    result = Answer(Rules(sampling(**changes)), prompt, choice=choice)
    for token in generated:
        result.append(token)
    return result


def reference_logits(raw: Row, p: Sampling, prompt: list[int], generated: list[int]) -> list[float]:
    """Steps 1 to 3 of the contract, one token at a time."""
    x = [float(value) for value in raw]
    for token, bias in p.logit_bias.items():
        x[token] = float(np.float32(x[token]) + np.float32(bias))
    for token in set(prompt + generated):
        x[token] = float(np.float32(x[token]) * np.float32(p.repetition_penalty)) if x[token] <= 0 else float(
            np.float32(x[token]) / np.float32(p.repetition_penalty)
        )  # fmt: skip
    for token, count in Counter(generated).items():
        x[token] = float(np.float32(x[token]) - np.float32(p.frequency_penalty * count + p.presence_penalty))
    text = prompt + generated
    for token in range(len(x)):
        banned = bool(p.allowed_token_ids) and token not in p.allowed_token_ids
        banned |= p.logit_bias.get(token, 0.0) <= -100
        for word in p.bad_words:
            banned |= ([*text, token])[-len(word.ids) :] == list(word.ids)
        size = p.no_repeat_ngram
        if size and len(text) >= size - 1:
            grams = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
            banned |= tuple(([*text, token])[-size:]) in grams
        banned |= len(generated) < p.min_tokens and token in [*p.end_token_ids, *p.stop_token_ids]
        if banned:
            x[token] = -math.inf
    return x


def reference_survivors(x: list[float], p: Sampling, *, since_reset: int = 0) -> list[tuple[int, float]]:
    """Steps 4 to 9 with full sorts: (token, probability), most likely first."""
    maximum = np.float32(max(x))
    scaled = [(np.float32(value) - maximum) / np.float32(p.temperature) for value in x]
    weights = [(token, math.exp(float(value))) for token, value in enumerate(scaled) if value > -math.inf]
    weights.sort(key=lambda item: (-float(scaled[item[0]]), item[0]))

    def normalised(items: list[tuple[int, float]]) -> list[tuple[int, float]]:
        total = sum(weight for _, weight in items)
        return [(token, weight / total) for token, weight in items]

    def head(items: list[tuple[int, float]], mass: float) -> list[tuple[int, float]]:
        kept, total = [], 0.0
        for item in items:
            kept.append(item)
            total += item[1]
            if total >= mass:
                break
        return kept

    if p.top_k:
        weights = weights[: p.top_k]
    weights = normalised(weights)
    if p.typical_p < 1:
        entropy = -sum(w * math.log(w) for _, w in weights)
        by_surprise = sorted(weights, key=lambda item: (abs(-math.log(item[1]) - entropy), -item[1], item[0]))
        typical = {token for token, _ in head(by_surprise, p.typical_p)}
        weights = normalised([item for item in weights if item[0] in typical])
    top_p = p.top_p if p.top_p_decay >= 1 else max(p.top_p_floor, p.top_p * p.top_p_decay**since_reset)
    if top_p < 1:
        weights = normalised(head(weights, top_p))
    if p.min_p:
        weights = normalised([item for item in weights if item[1] >= p.min_p * weights[0][1]])
    return weights


def reference_draw(survivors: list[tuple[int, float]], random: float) -> int:
    total = 0.0
    for token, probability in survivors:
        total += probability
        if total > random:
            return token
    return survivors[-1][0]


ROWS = st.lists(st.floats(-12, 12, width=32), min_size=VOCAB, max_size=VOCAB).map(lambda v: np.array(v, np.float32))
TOKENS = st.integers(0, VOCAB - 1)
TEXTS = st.lists(TOKENS, max_size=12)
TRUNCATIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.7, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 3, 20, 1000]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5, 0.01]),
        "typical_p": st.sampled_from([1.0, 0.9, 0.2]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "seed": st.integers(0, 2**63 - 1),
    }
)
CHANGES = st.fixed_dictionaries(
    {
        "logit_bias": st.dictionaries(TOKENS, st.sampled_from([-100.0, -3.0, 2.5, 100.0]), max_size=4),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "frequency_penalty": st.sampled_from([0.0, 0.5, -1.0]),
        "presence_penalty": st.sampled_from([0.0, 1.0]),
        "no_repeat_ngram": st.sampled_from([0, 1, 2, 3]),
        "allowed_token_ids": st.lists(TOKENS, max_size=10, unique=True),
        "min_tokens": st.sampled_from([0, 3]),
        "end_token_ids": st.just([2]),
        "stop_token_ids": st.lists(TOKENS, max_size=2, unique=True),
    }
)


@settings(max_examples=120, deadline=None)
@given(raw=ROWS, prompt=st.lists(TOKENS, min_size=1, max_size=12), generated=TEXTS, changes=CHANGES, words=st.lists(
    st.lists(TOKENS, min_size=1, max_size=3), max_size=3))  # fmt: skip
def test_biases_penalties_and_masks_follow_the_contract(
    raw: Row, prompt: list[int], generated: list[int], changes: dict[str, Any], words: list[list[int]]
) -> None:
    """Steps 1 to 3 equal the token-by-token reference. Inverse seen red: masks before biases; counting the prompt."""
    changes = changes | {"bad_words": [TokenSequence(ids=word) for word in words]}
    who = answer(prompt, generated, **changes)
    x = raw.copy()
    who.change(x)

    expected = reference_logits(raw, sampling(**changes), prompt, generated)
    np.testing.assert_allclose(x, np.array(expected, np.float32), rtol=1e-6)


@settings(max_examples=200, deadline=None)
@given(raw=ROWS, changes=TRUNCATIONS, generated=TEXTS, choice=st.integers(0, 15))
def test_draws_follow_the_contract(raw: Row, changes: dict[str, Any], generated: list[int], choice: int) -> None:
    """Steps 4 to 9 equal the reference that sorts everything, for any combination of truncations."""
    who = answer([1, 2], generated, choice=choice, **changes)
    random = uniform(changes["seed"], choice=choice, position=2 + len(generated))
    survivors = reference_survivors([float(value) for value in raw], sampling(**changes))
    # A draw that falls on an edge between two tokens may round either way.
    edges = np.cumsum([probability for _, probability in survivors])
    if np.abs(edges - random).min() < 1e-5:
        return
    mass_edges = np.abs(np.cumsum([w for _, w in reference_survivors(list(map(float, raw)), sampling(**(changes | {
        "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0})))]) - changes["top_p"])  # fmt: skip
    if changes["top_p"] < 1 and mass_edges.min() < 1e-5:
        return

    assert draw_one(raw, who).token == reference_draw(survivors, random)


def test_greedy_ties_go_to_the_lowest_id() -> None:
    """The argmax of equals is the lowest id, in the fast path and in the slow one."""
    row = np.zeros(VOCAB, np.float32)
    row[[7, 9, 30]] = 5.0
    sampler = Sampler()
    sampler.register(0, Submit(prompt=[1], sampling=sampling()))
    sampler.register(1, Submit(prompt=[1], sampling=sampling(presence_penalty=0.5)))
    drawn = sampler.draw(torch.from_numpy(np.stack([row, row])), [Draw(0, 0), Draw(1, 1)])

    assert [item.token for item in drawn] == [7, 7]


def test_a_bias_never_revives_a_forbidden_token() -> None:
    """Masks come after biases; a bias of -100 bans outright. Inverse seen red: masks applied before biases."""
    row = np.zeros(VOCAB, np.float32)
    row[5], row[6] = 500.0, 400.0
    who = answer([1], [], logit_bias={5: -100.0, 6: 100.0}, bad_words=[TokenSequence(ids=[6])])

    assert draw_one(row, who).token not in (5, 6)


def test_top_p_decays_until_a_reset_token() -> None:
    """Factual-nucleus sampling: p shrinks with every token down to its floor and starts anew after a reset token."""
    rng = np.random.default_rng(3)
    changes: dict[str, Any] = {
        "temperature": 1.0,
        "top_p": 0.9,
        "top_p_decay": 0.5,
        "top_p_floor": 0.2,
        "top_p_reset_token_ids": [4],
        "seed": 11,
        "logprobs": 20,
        "logprobs_after_processing": True,
    }
    p = sampling(**changes)
    for generated, since in (([], 0), ([9], 1), ([9, 9], 2), ([9, 9, 9, 9], 4), ([9, 9, 4], 0), ([9, 4, 9], 1)):
        row = rng.standard_normal(VOCAB).astype(np.float32)
        info = draw_one(row, answer([1], generated, **changes)).info
        assert info is not None
        survivors = reference_survivors([float(value) for value in row], p, since_reset=since)

        assert [token for token, _, _ in info.top] == [token for token, _ in survivors][:20]


def test_numerical_failure_and_dead_end_concern_one_row_only() -> None:
    """NaN logits and masks that forbid everything are reported for their own answer, its neighbours go on."""
    rows = np.tile(np.arange(VOCAB, dtype=np.float32), (4, 1))
    rows[1, 3] = np.nan
    rows[2, 3] = np.inf
    sampler = Sampler()
    for number in range(4):
        sampler.register(number, Submit(prompt=[1], sampling=sampling(temperature=0.5 if number % 2 else 0.0)))
    mask = bytes(VOCAB // 8 + 1)
    drawn = sampler.draw(torch.from_numpy(rows), [Draw(0, 0), Draw(1, 1), Draw(2, 2), Draw(3, 3, mask)])

    assert [item.token for item in drawn] == [VOCAB - 1, NUMERICAL_FAILURE, NUMERICAL_FAILURE, DEAD_END]


def test_a_constraint_mask_allows_its_bits_only() -> None:
    """Bit i of the mask, little-endian, stands for token i; tokens beyond the mask are forbidden."""
    mask = bytearray(4)
    mask[2] |= 1 << 3
    row = np.arange(VOCAB, dtype=np.float32)

    assert draw_one(row, answer([1], []), mask=bytes(mask)).token == 19


def test_E5_a_draw_depends_on_seed_choice_and_position_only() -> None:
    """The same row draws the same token alone and among others; another choice or position draws its own."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 500)).astype(np.float32)
    changes: dict[str, Any] = {"temperature": 1.0, "seed": 5}
    alone = [draw_one(row, answer([1], [], choice=2, **changes)).token for row in rows]
    sampler = Sampler()
    for number in range(6):
        sampler.register(10 * number, Submit(prompt=[1], sampling=sampling(num_sequences=3, **changes)))
    together = sampler.draw(torch.from_numpy(rows), [Draw(row, 10 * row + 2) for row in range(6)])

    assert [item.token for item in together] == alone
    flat = np.zeros(500, np.float32)
    others = {draw_one(flat, answer([1] * length, [], choice=choice, **changes)).token
              for length in (1, 2, 3) for choice in (0, 1, 2)}  # fmt: skip
    assert len(others) > 5


def test_draws_are_distributed_as_the_model_says() -> None:
    """10,000 positions of one seed give each token its share."""
    row = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    counts = Counter(draw_one(row, answer([0] * n, [], temperature=1.0, seed=1)).token for n in range(1, 4001))

    for token, share in enumerate([0.5, 0.25, 0.15, 0.1]):
        assert abs(counts[token] / 4000 - share) < 0.03


@settings(max_examples=200, deadline=None)
@given(raw=ROWS, token=TOKENS, top=st.integers(0, 20))
def test_logprobs_ranks_and_top_tokens(raw: Row, token: int, top: int) -> None:
    """Log-softmax in float64, ranks by probability then id, the top k in that order, extras as asked."""
    exact = raw.astype(np.float64) - np.log(np.exp(raw.astype(np.float64)).sum())
    order = sorted(range(VOCAB), key=lambda index: (-raw[index], index))
    info = token_info(raw, token, top=top, extra=[3, 1])

    assert info.logprob == pytest.approx(exact[token], abs=2e-6)
    assert info.rank == order.index(token) + 1
    assert [index for index, _, _ in info.top] == [*order[:top], 3, 1]
    assert [rank for _, _, rank in info.top] == [*range(1, top + 1), rank_of(raw, 3), rank_of(raw, 1)]
    for index, logprob, _ in info.top:
        assert logprob == pytest.approx(exact[index], abs=2e-6)


def test_impossible_tokens_have_a_finite_logprob_and_are_no_top_tokens() -> None:
    """JSON has no infinity: a token that was cut away reports -9999."""
    row = np.array([1.0, -np.inf, 0.0], np.float32)
    info = token_info(row, 0, top=3, extra=[1])

    assert [token for token, _, _ in info.top] == [0, 2, 1]
    assert info.top[-1][1] == IMPOSSIBLE


def test_the_head_of_a_flat_distribution_is_everything() -> None:
    """When no depth suffices all tokens are sorted."""
    row = np.zeros(1000, np.float32)

    assert sorted_head(row, maximum=0.0, count=3).tolist() == list(range(1000))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter: tuple[int, int, int, int], key: tuple[int, int], expected: str) -> None:
    """The published known-answer vectors of Philox4x32-10 (Random123)."""
    assert " ".join(f"{word:08x}" for word in philox4x32(counter, key)) == expected


def test_uniforms_fill_the_unit_interval() -> None:
    """Uniforms lie in [0, 1) and have the mean of a uniform distribution."""
    values = [uniform(2**63 - 1, choice=choice, position=p) for choice in range(2) for p in range(2000)]

    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) == len(values)
    assert abs(sum(values) / len(values) - 0.5) < 0.02
