"""Readers of several passages: what both objectives come to, where their gradients go, and that they learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny_configs import T5
from torch import Tensor

from trilithon_parallel.backend import select
from trilithon_parallel.grid import Grid
from trilithon_parallel.init import initialise
from trilithon_parallel.models import Seq2SeqStage, build_seq2seq
from trilithon_parallel.reading import (
    ReaderBatch,
    individual_answers,
    individual_losses,
    joint_answers,
    joint_losses,
    passage_logprobs,
)

START, END, SPACE = 0, 1, 2
NANO = replace(
    T5,
    vocab_size=64,
    hidden_size=128,
    ffn_size=256,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    num_layers=4,
    num_encoder_layers=2,
    max_context=64,
    decoder_start_id=START,
)


def reader(*, seed: int = 1, dtype: torch.dtype = torch.float64, sigma: float = 0.3) -> Seq2SeqStage:
    """An encoder-decoder of new weights."""
    grid = Grid.single()
    stage = build_seq2seq(NANO, grid=grid, backend=select("torch"), dtype=dtype)
    initialise(stage, config=NANO, grid=grid, seed=seed, sigma=sigma)
    return stage


def batch_of(passages: Sequence[Sequence[Sequence[int]]], answers: Sequence[Sequence[int]]) -> ReaderBatch:
    """`passages`: of each question, each with the question in front of it."""
    flat = [passage for some in passages for passage in some]
    bounds = torch.tensor([0, *map(len, flat)]).cumsum(0).tolist()
    ends = torch.tensor([0, *(len(answer) + 1 for answer in answers)]).cumsum(0).tolist()
    return ReaderBatch(
        encoder_tokens_E=torch.tensor([token for passage in flat for token in passage]),
        encoder_cu_seqlens=bounds,
        tokens_T=torch.tensor([token for answer in answers for token in (START, *answer)]),
        targets_T=torch.tensor([token for answer in answers for token in (*answer, END)]),
        cu_seqlens=ends,
    )


def drawn(num: int, count: int, *, seed: int = 3) -> ReaderBatch:
    """Questions of random tokens with passages and answers of several lengths."""
    generator = torch.Generator().manual_seed(seed)

    def some(least: int, most: int) -> list[int]:
        size = int(torch.randint(least, most + 1, (1,), generator=generator))
        return (torch.randint(3, 64, (size,), generator=generator)).tolist()

    return batch_of([[some(4, 9) for _ in range(count)] for _ in range(num)], [some(1, 4) for _ in range(num)])


def priors(num: int, count: int, *, seed: int = 5) -> Tensor:
    """log p(z|q), with a gradient."""
    scores = torch.randn(num, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores.log_softmax(1).requires_grad_()


def plain_losses(stage: Seq2SeqStage, batch: ReaderBatch) -> Tensor:
    """The negative log-likelihood of an encoder-decoder that reads one sequence, by torch's own cross-entropy."""
    hidden = stage(
        None,
        encoder_tokens_E=batch.encoder_tokens_E,
        encoder_cu_seqlens=batch.encoder_cu_seqlens,
        decoder_tokens_T=batch.tokens_T,
        decoder_cu_seqlens=batch.cu_seqlens,
        passages=batch.num_passages,
    )
    by_token = torch.nn.functional.cross_entropy(stage.gather_logits(hidden), batch.targets_T, reduction="none")
    lengths = [b - a for a, b in pairwise(batch.cu_seqlens)]
    return torch.stack([part.sum() for part in by_token.split(lengths)])


def test_acc_A03_one_passage_is_a_plain_encoder_decoder() -> None:
    """
    At K = 1 both objectives, both marginals, and any strength of the bias are the negative log-likelihood. Inverse
    seen: p(z|q) left unnormalised.
    """
    stage, batch = reader(), drawn(3, 1)
    one = passage_logprobs(torch.randn(3, 8), torch.randn(3, 1, 8), scale=8**-0.5)
    expected = plain_losses(stage, batch)
    sequence = individual_losses(stage, batch, one)
    token = individual_losses(stage, batch, one, marginal="token")

    torch.testing.assert_close(sequence, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(token, expected, rtol=1e-9, atol=1e-9)
    for strength in (None, torch.tensor(0.0), torch.tensor(3.0, dtype=torch.float64)):
        joint = joint_losses(stage, batch, one, strength=strength)
        torch.testing.assert_close(joint, expected, rtol=1e-9, atol=1e-9)


def test_acc_A03_without_strength_it_is_fusion_in_the_decoder() -> None:
    """A strength of 0 is no bias; another one is another loss, and passages together are not passages apart."""
    stage, batch, prior = reader(), drawn(3, 4), priors(3, 4)
    fusion = plain_losses(stage, batch)
    without = joint_losses(stage, batch, prior, strength=None)
    zero = joint_losses(stage, batch, prior, strength=torch.tensor(0.0, dtype=torch.float64))
    strong = joint_losses(stage, batch, prior, strength=torch.tensor(4.0, dtype=torch.float64))

    torch.testing.assert_close(without, fusion, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(zero, fusion, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(strong, fusion, atol=1e-4)
    assert not torch.allclose(individual_losses(stage, batch, prior), fusion, atol=1e-4)


@pytest.mark.parametrize("strength", [0.0, 0.5, -2.0])
def test_acc_A03_the_retriever_learns_exactly_where_the_bias_has_strength(strength: float) -> None:
    """
    dL/d(vectors) of the retriever is 0 if and only if the strength is, at K = 2; the strength itself has a gradient
    always. Inverse seen: the probabilities detached.
    """
    stage, batch = reader(), drawn(2, 2)
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(2, 8, generator=generator).requires_grad_()
    passages = torch.randn(2, 2, 8, generator=generator).requires_grad_()
    scalar = torch.tensor(strength, dtype=torch.float64, requires_grad=True)
    prior = passage_logprobs(queries, passages, scale=8**-0.5)
    joint_losses(stage, batch, prior, strength=scalar).sum().backward()

    assert queries.grad is not None
    assert passages.grad is not None
    assert scalar.grad is not None
    for gradient in (queries.grad, passages.grad):
        assert (float(gradient.abs().max()) == 0) == (strength == 0)
    assert float(scalar.grad.abs()) > 1e-9


def test_acc_A03_marginals_agree_on_one_passage_and_differ_on_two() -> None:
    """By sequence and by token; both are the formula over each passage's own answer."""
    stage, batch, prior = reader(), drawn(2, 2), priors(2, 2)
    sequence = individual_losses(stage, batch, prior)
    token = individual_losses(stage, batch, prior, marginal="token")
    bounds, ends = batch.encoder_cu_seqlens, batch.cu_seqlens
    expected = []
    for i in range(2):
        answer = slice(ends[i], ends[i + 1])
        alone = [
            ReaderBatch(
                encoder_tokens_E=batch.encoder_tokens_E[bounds[2 * i + k] : bounds[2 * i + k + 1]],
                encoder_cu_seqlens=[0, bounds[2 * i + k + 1] - bounds[2 * i + k]],
                tokens_T=batch.tokens_T[answer],
                targets_T=batch.targets_T[answer],
                cu_seqlens=[0, ends[i + 1] - ends[i]],
            )
            for k in range(2)
        ]
        sums = torch.stack([-plain_losses(stage, one)[0] for one in alone])
        expected.append(-(prior[i] + sums).logsumexp(0))

    torch.testing.assert_close(sequence, torch.stack(expected), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(sequence, token, atol=1e-4)


def facts(num: int, count: int) -> tuple[list[list[list[int]]], list[list[int]]]:
    """Each question is a token; one of its passages has that token and its answer, the others those of other ones."""
    generator = torch.Generator().manual_seed(7)
    values = [torch.randint(40, 64, (2,), generator=generator).tolist() for _ in range(num)]
    passages, answers = [], []
    for i in range(num):
        others = [(i + 1 + int(torch.randint(num - 1, (1,), generator=generator))) % num for _ in range(count - 1)]
        place = int(torch.randint(count, (1,), generator=generator))
        rows = [*others[:place], i, *others[place:]]
        passages.append([[4 + i, SPACE, 4 + row, *values[row]] for row in rows])
        answers.append(values[i])
    return passages, answers


def written(stage: Seq2SeqStage, passages: list[list[int]], strength: Tensor, prior: Tensor) -> list[int]:
    """The likeliest answer, token by token, over the losses that training uses."""
    answer: list[int] = []
    while len(answer) < 4:
        batch = batch_of([passages], [[*answer, END]])
        bounds = batch.encoder_cu_seqlens
        memory = stage.encode(batch.encoder_tokens_E, cu_seqlens=bounds)
        lengths = torch.tensor([b - a for a, b in pairwise(bounds)])
        bias = (strength * prior.exp()).flatten().repeat_interleave(lengths).to(memory.dtype)
        tokens = torch.tensor([START, *answer])
        hidden = stage.decode(
            tokens, memory, cu_seqlens=[0, len(tokens)], encoder_cu_seqlens=[0, bounds[-1]], cross_bias_E=bias
        )
        best = int(stage.gather_logits(hidden)[-1].argmax())
        if best == END:
            break
        answer.append(best)
    return answer


def test_acc_A06_a_small_joint_reader_learns_by_heart_in_any_order_of_passages() -> None:
    """
    32 questions with four passages each: every answer is written exactly; shuffled passages change the answer's
    log-probability by less than 1e-4. Inverse seen: a question's passages encoded as one sequence.
    """
    stage = reader(dtype=torch.float32, sigma=0.05)
    passages, answers = facts(32, 4)
    batch = batch_of(passages, answers)
    prior = torch.full((32, 4), 0.25, dtype=torch.float64).log()
    strength = torch.tensor(1.0, requires_grad=True)
    optimizer = torch.optim.Adam([*stage.parameters(), strength], lr=1e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = joint_losses(stage, batch, prior, strength=strength).mean()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        exact = [
            written(stage, some, strength, prior[:1]) == answer for some, answer in zip(passages, answers, strict=True)
        ]
        shuffled = batch_of([some[::-1] for some in passages], answers)
        before = joint_losses(stage, batch, prior, strength=strength)
        after = joint_losses(stage, shuffled, prior, strength=strength)

    assert all(exact), sum(exact)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-4)


@torch.no_grad()
def test_written_answers_are_the_likeliest_ones() -> None:
    """
    Together: token by token the likeliest. Apart: of the answers to each passage the one with the largest p(a|q), which
    is not always that to the likeliest passage. Inverse seen: the least likely one taken.
    """
    stage, batch, prior = reader(), drawn(4, 3), priors(4, 3)
    strength, bounds, most = torch.tensor(2.0, dtype=torch.float64), batch.encoder_cu_seqlens, 4
    passages = [batch.encoder_tokens_E[a:b].tolist() for a, b in pairwise(bounds)]
    together = joint_answers(stage, batch, prior, strength=strength, end_id=END, max_tokens=most)
    apart = individual_answers(stage, batch, prior, end_id=END, max_tokens=most)
    none, one = torch.zeros(1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    likeliest = 0
    for i in range(4):
        own = passages[3 * i : 3 * i + 3]
        proposed = [written(stage, [passage], none, one) for passage in own]
        lost = [float(individual_losses(stage, batch_of([own], [answer]), prior[i : i + 1])) for answer in proposed]
        best = lost.index(min(lost))
        likeliest += best == int(prior[i].argmax())

        assert together[i] == written(stage, own, strength, prior[i : i + 1])
        assert apart[i] == proposed[best]
    assert likeliest < 4
