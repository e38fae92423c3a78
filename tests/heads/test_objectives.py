"""What batches of each kind lose and predict, in one process: against plain formulas, and however they are split."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from task_models import BETA, MODELS, SETTINGS, batch_of, make_model, relative, sequences
from tiny_configs import LLAMA
from torch import Tensor

from trilithon_parallel.config import ModelError
from trilithon_parallel.loss import span_losses
from trilithon_parallel.objective import Batch, ClassBatch, PackedBatch, PreferenceBatch, TagBatch
from trilithon_parallel.step import TrainingModel

SPLIT = 1e-6  # relative; fp64 is far below, what is meant is that no split changes what is learned
EXACT = 1e-12


@functools.cache
def model_of(kind: str) -> TrainingModel:
    return make_model(MODELS.get(kind, LLAMA), optimizer=replace(SETTINGS, clip_norm=None))


def gradients(model: TrainingModel, batches: list[PackedBatch]) -> tuple[float, Tensor]:
    """The loss of a global batch, and all of its gradients in one vector; weights stay as they are."""
    loss = model.train_step(batches, learning_rate=0.0, step=0).loss
    return loss, torch.cat([bucket.grad.clone() for bucket in model.buckets.buckets])


@pytest.mark.parametrize("kind", sorted(MODELS))
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_any_split_is_the_same_step(kind: str, data: st.DataObject) -> None:
    """
    The same sequences in micro-batches of any sizes have one loss and one gradient.

    Inverse seen red: a loss that is a micro-batch's mean.
    """
    model = model_of(kind)
    rows = sequences(kind, data.draw(st.integers(0, 5)))
    pair = 2 if kind == "preference" else 1
    cuts = data.draw(st.sets(st.integers(1, len(rows) // pair - 1)))
    bounds = [0, *(pair * cut for cut in sorted(cuts)), len(rows)]
    parts = [batch_of(kind, rows[start:stop], start) for start, stop in pairwise(bounds)]

    loss, gradient = gradients(model, parts)
    expected, whole = gradients(model, [batch_of(kind, rows, 0)])

    assert abs(loss - expected) <= SPLIT * abs(expected)
    assert (gradient - whole).abs().max() <= SPLIT * whole.abs().max()


def plain_logprobs(model: TrainingModel, rows: list[dict[str, Any]]) -> Tensor:
    """Each row's summed log-probability, by torch's own log_softmax over whole logits, a row at a time."""
    stage = model.chunks[0].stage
    sums = []
    for row in rows:
        batch = batch_of("vocabulary", [row], 0)
        hidden_TH = replace(batch, types_T=None).run(stage, None, dropout=None)
        logits_TV = stage.gather_logits(hidden_TH)  # type: ignore[operator]  # of a stage, which torch doesn't know
        logprobs_T = F.log_softmax(logits_TV, -1).gather(1, row["targets"][:, None])[:, 0]
        sums.append((logprobs_T * row["weights"]).sum())
    return torch.stack(sums)


def test_preferences_are_the_plain_formula() -> None:
    """
    Loss and gradients of direct preference optimisation in fp64 are those of its formula written down.

    Inverses seen red: chosen and rejected exchanged; beta inside the margin twice; the mean log-probability in place of
    the sum.
    """
    model = model_of("preference")
    rows = sequences("preference", 3)
    batch = batch_of("preference", rows, 0)
    assert isinstance(batch, PreferenceBatch)
    loss, _ = gradients(model, [batch])
    ours = {slot.owner: bucket.grad[slot.start : slot.stop].clone() for bucket, slot in model.buckets.slots()}

    parameters = {slot.owner: slot.parameter for _, slot in model.buckets.slots()}
    sums_P2 = plain_logprobs(model, rows).view(-1, 2)
    margins_P = (sums_P2[:, 0] - batch.reference_P2[:, 0]) - (sums_P2[:, 1] - batch.reference_P2[:, 1])
    expected = -torch.log(torch.sigmoid(BETA * margins_P)).mean()
    model.buckets.zero()
    expected.backward()  # type: ignore[no-untyped-call]  # torch's is untyped; gradients arrive in the buckets
    theirs = {slot.owner: bucket.grad[slot.start : slot.stop] for bucket, slot in model.buckets.slots()}

    assert abs(loss - expected.item()) <= EXACT
    assert ours.keys() == parameters.keys()
    for name, gradient in ours.items():
        assert relative(gradient, theirs[name]) <= EXACT, name
    (said,) = model.predict([batch])
    assert relative(batch.margins(said[:, 0]), margins_P.detach()) <= 1e-5


def test_predictions_of_a_decoder_are_its_log_probabilities() -> None:
    """Summed by sequence, with how many are right, or a token each, 0 where none counts; without any all is zeros."""
    model, rows = model_of("vocabulary"), sequences("vocabulary", 1)
    batch = replace(batch_of("vocabulary", rows, 0), types_T=None)
    assert isinstance(batch, Batch)
    silent = replace(batch, weights_T=torch.zeros_like(batch.weights_T))
    with torch.no_grad():
        expected_B = plain_logprobs(model, rows)

    (sums_B2, none_B2), (each_T, _) = (model.predict([batch, silent], per_token=flag) for flag in (False, True))

    assert relative(sums_B2[:, 0], expected_B) <= 1e-5
    assert not none_B2.any()
    assert relative(torch.stack([part.sum() for part in each_T.split(list(batch.lengths))]), expected_B) <= 1e-5
    assert not each_T[batch.weights_T == 0].any()
    assert sums_B2.dtype == each_T.dtype == torch.float32


def test_tokens_are_right_where_torch_says_the_target_is_the_largest() -> None:
    """
    What a step, an evaluation and a prediction count as right is what argmax over whole logits finds, in one process.

    Inverse seen red: tokens of prompts, which don't count, counted too.
    """
    model = model_of("vocabulary")
    batch = replace(batch_of("vocabulary", sequences("vocabulary", 4), 0), types_T=None)
    assert isinstance(batch, Batch)
    stage = model.chunks[0].stage
    with torch.no_grad():
        logits_TV = stage.gather_logits(batch.run(stage, None, dropout=None))  # type: ignore[operator]  # of a stage
    likeliest_T = logits_TV.argmax(-1)
    batch = replace(batch, targets_T=torch.where(torch.arange(len(likeliest_T)) % 3 > 0, likeliest_T, batch.targets_T))
    right_T = (likeliest_T == batch.targets_T) & (batch.weights_T > 0)
    judged = int((batch.weights_T > 0).sum())
    found = model.evaluate([batch])
    (said_B2,) = model.predict([batch])
    step = model.train_step([batch], learning_rate=0.0, step=0)

    assert 0 < int(right_T.sum()) < judged
    assert bool((likeliest_T == batch.targets_T)[batch.weights_T == 0].any())
    assert (found.num_correct, found.num_judged) == (int(right_T.sum()), judged)
    assert step.accuracy == found.accuracy == int(right_T.sum()) / judged
    assert said_B2[:, 1].tolist() == [int(part.sum()) for part in right_T.split(list(batch.lengths))]


@pytest.mark.parametrize("kind", ["tokens", "sequence", "span", "preference"])
def test_single_labels_are_judged_and_wholes_are_not(kind: str) -> None:
    """Labels of tokens are right where their logit is the largest; texts, spans and pairs have no such number."""
    model, batch = model_of(kind), batch_of(kind, sequences(kind, 5), 0)
    accuracy = model.train_step([batch], learning_rate=0.0, step=0).accuracy

    if kind != "tokens":
        assert accuracy is None
        return
    assert isinstance(batch, TagBatch)
    (logits_TL,) = model.predict([batch])
    counts_T = batch.weights_T > 0
    right_R = logits_TL.argmax(-1)[counts_T] == batch.targets_T[counts_T]
    assert accuracy == int(right_R.sum()) / len(right_R)
    assert 0 < accuracy < 1


def test_predicting_changes_nothing() -> None:
    """No gradient, no dropout, no step: a prediction between two steps leaves the second as it was."""
    rows = sequences("tokens", 0)
    batch = batch_of("tokens", rows, 0)
    weights = []
    for predicts in (False, True):
        model = make_model(MODELS["tokens"])
        for step in range(2):
            model.train_step([batch], learning_rate=1e-2, step=step)
            if predicts:
                first, second = model.predict([batch]), model.predict([batch])
                assert torch.equal(first[0], second[0])
                assert not first[0].requires_grad
        weights.append(torch.cat([bucket.data for bucket in model.buckets.buckets]))

    assert torch.equal(*weights)


def test_what_has_no_weight_is_not_learned() -> None:
    """Labels whose weight is 0 may be anything and are not counted; half a weight is half a loss."""
    model, rows = model_of("tokens"), sequences("tokens", 2)
    batch = batch_of("tokens", rows, 0)
    assert isinstance(batch, TagBatch)
    other = replace(batch, targets_T=torch.where(batch.weights_T > 0, batch.targets_T, 0))
    half = replace(batch, weights_T=batch.weights_T / 2)
    found, halved = model.evaluate([batch]), model.evaluate([half])

    assert found.num_tokens == found.num_judged == int((batch.weights_T > 0).sum())
    assert model.evaluate([other]) == found
    assert halved == replace(found, loss=halved.loss)
    assert halved.loss == pytest.approx(found.loss / 2, rel=1e-12)


def test_a_batch_without_anything_to_learn_is_refused() -> None:
    """Zero tokens, or zero sequences, in a whole global batch are a typed error."""
    model, rows = model_of("sequence"), sequences("sequence", 0)
    batch = batch_of("sequence", rows, 0)
    assert isinstance(batch, ClassBatch)
    with pytest.raises(ModelError, match="Given: 0 in the whole global batch") as caught:
        model.train_step([replace(batch, weights_B=torch.zeros(len(rows)))], learning_rate=0.1, step=0)

    assert caught.value.code == "batch_empty"


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_span_losses_are_the_definition(lengths: list[int], seed: int) -> None:
    """-log of the share that the start and the end have among what may be chosen, averaged over the two."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    logits = torch.randn(total, 2, generator=generator, dtype=torch.float64)
    allowed = torch.rand(total, generator=generator) < 0.5
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
        allowed[bounds[-2]] = True
    places = [
        [int(i) + start for i in torch.randint(stop - start, (2,), generator=generator)]
        for start, stop in pairwise(bounds)
    ]
    for pair in places:
        allowed[pair] = True
    starts, ends = torch.tensor(places).unbind(1)
    expected = []
    for sequence, (start, stop) in enumerate(pairwise(bounds)):
        weights = logits[start:stop].exp() * allowed[start:stop, None]
        shares = weights / weights.sum(0)
        chosen = shares[starts[sequence] - start, 0], shares[ends[sequence] - start, 1]
        expected.append(-(chosen[0].log() + chosen[1].log()) / 2)

    losses = span_losses(logits, starts, ends, allowed, bounds)

    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=1e-12)
