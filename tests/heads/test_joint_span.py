"""The joint span head: its scores against brute force, its softmax, its gradients, and what a server gets of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from task_models import MODELS, batch_of, make_model, sequences
from torch import Tensor

from trilithon_parallel.attention import PackedView
from trilithon_parallel.backend import select
from trilithon_parallel.config import ModelError, TaskHead, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.loss import joint_span_losses, spans_allowed
from trilithon_parallel.models import EncoderStage, build_stage
from trilithon_parallel.objective import JointSpanBatch
from trilithon_parallel.task_head import span_lengths
from trilithon_parallel.weights.export import export_model, full_state
from trilithon_parallel.weights.loader import load_stage

CONFIG = MODELS["joint_span"]
LENGTHS = 5


def scores_by_hand(stage: EncoderStage, hidden_SH: Tensor) -> dict[tuple[int, int], Tensor]:
    """Every span's score by the definition: an MLP of both ends, joined."""
    head = stage.task_head
    joined = torch.cat((head.first.weight, head.last.weight), 1)
    found = {}
    for first in range(len(hidden_SH)):
        for last in range(first, min(first + LENGTHS, len(hidden_SH))):
            both = torch.cat((hidden_SH[first], hidden_SH[last]))
            found[first, last] = (F.gelu(F.linear(both, joined, head.first.bias)) * head.score.weight[0]).sum()
    return found


def test_acc_E01_scores_are_the_definition_and_share_one_softmax() -> None:
    """
    At 12 tokens every span within the context has the score of the definition, and its share of one softmax over all of
    them is what the loss learns; the shares add up to 1, no span is longer than there are lengths, and [CLS], [SEP] and
    what lies behind are none. Inverses seen red: places beyond the sequence that are not held within it; a context
    that is not looked at.
    """
    model, size = make_model(CONFIG), 12
    stage = model.chunks[0].stage
    assert isinstance(stage, EncoderStage)
    rows = sequences("joint_span", 0, lengths=(size, size))
    for row in rows:
        row["context"] = (torch.arange(size) > 0) & (torch.arange(size) < size - 1)
    batch = batch_of("joint_span", rows, 0)
    assert isinstance(batch, JointSpanBatch)
    with torch.no_grad():
        hidden_TH = batch.run(stage, None, dropout=None)
        logits_TL = stage.task_logits(hidden_TH, batch.cu_seqlens)
        losses = {}
        for start, stop in pairwise(batch.cu_seqlens):
            by_hand = scores_by_hand(stage, hidden_TH[start:stop])
            real = {span: score for span, score in by_hand.items() if span[0] > 0 and span[1] < size - 1}
            total = torch.stack(list(real.values())).logsumexp(0)
            for (first, last), score in by_hand.items():
                assert abs(logits_TL[start + first, last - first] - score) <= 1e-12
            for first, last in real:
                at = torch.tensor([start + first]), torch.tensor([start + last])
                alone = joint_span_losses(
                    logits_TL[start:stop], at[0] - start, at[1] - start, batch.context_T[start:stop], [0, size]
                )
                losses[start + first, start + last] = float(alone)
                assert abs(float(alone) - float(total - real[first, last])) <= 1e-12
        shares = torch.tensor([-loss for loss in losses.values()], dtype=torch.float64).exp()
        allowed_TL = spans_allowed(batch.context_T, LENGTHS, batch.cu_seqlens)

    assert abs(float(shares.sum()) - 2) <= 1e-6
    assert int(allowed_TL.sum()) == len(losses) == 2 * sum(min(LENGTHS, 10 - i) for i in range(10))


def test_acc_E01_gradients_are_those_of_small_differences() -> None:
    """torch's own check of the head and its loss in fp64, of what goes in and of every weight."""
    model = make_model(CONFIG)
    stage = model.chunks[0].stage
    assert isinstance(stage, EncoderStage)
    bounds, context_T = [0, 5, 9], torch.tensor([False, True, True, True, False, False, True, True, False])
    hidden_TH = torch.randn(9, CONFIG.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = [name for name, _ in stage.task_head.named_parameters()]
    weights = [parameter.detach().clone().requires_grad_() for parameter in stage.task_head.parameters()]

    def lost(hidden: Tensor, *given: Tensor) -> Tensor:
        logits = torch.func.functional_call(stage.task_head, dict(zip(names, given, strict=True)), (hidden, bounds))
        return joint_span_losses(logits, torch.tensor([1, 7]), torch.tensor([3, 7]), context_T, bounds)

    assert torch.autograd.gradcheck(lost, (hidden_TH.requires_grad_(), *weights), fast_mode=True)


def test_acc_E01_a_batch_of_sequences_is_each_alone() -> None:
    """No span reaches into the next sequence: a sequence's scores don't know its neighbours."""
    model = make_model(CONFIG)
    rows = sequences("joint_span", 0)
    (together,) = model.predict([batch_of("joint_span", rows, 0)])
    alone = [model.predict([batch_of("joint_span", [row], 0)])[0] for row in rows]

    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-6, atol=1e-6)


def test_E4_served_scores_are_those_of_training(tmp_path: Path) -> None:
    """An export, read and packed as a server does, gives the bits of the training forward; its configuration too."""
    model = make_model(CONFIG, dtype=torch.float32)
    state = full_state([(model.chunks[0].stage, Grid.single())], model.config)
    export_model(state, model.config, tmp_path / "model", side_files_from=None, dtype=torch.float32)
    config, grid, batch = (
        load_config(tmp_path / "model"),
        Grid.single(),
        batch_of("joint_span", sequences("joint_span", 0), 0),
    )
    found = []
    for is_served in (False, True):
        backend = select("torch")
        stage = build_stage(config, grid=grid, backend=backend, dtype=torch.float32)
        load_stage(stage, tmp_path / "model", config=config, grid=grid)
        stage.prepare() if is_served else backend.train(stage)
        assert isinstance(stage, EncoderStage)
        with torch.no_grad():
            view = PackedView(batch.cu_seqlens, causal=False)
            hidden_TH = stage(batch.tokens_T, positions_T=batch.positions_T, types_T=batch.types_T, view=view)
            parts = list(pairwise(batch.cu_seqlens)) if is_served else [(0, batch.cu_seqlens[-1])]
            bounds = [[0, stop - start] for start, stop in parts] if is_served else [list(batch.cu_seqlens)]
            rows = [stage.task_logits(hidden_TH[start:stop], b) for (start, stop), b in zip(parts, bounds, strict=True)]
        found.append(torch.cat(rows))
    (trained,) = model.predict([batch])

    assert config.task_head == CONFIG.task_head
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(trained, found[0], rtol=1e-5, atol=1e-5)


def test_R11_lengths_are_the_labels() -> None:
    """Other labels would stand for nothing; one sentence says so."""
    assert TaskHead("joint_span", span_lengths(4)).labels == ("1", "2", "3", "4")
    with pytest.raises(ModelError, match=r"labels of joint spans must be lengths, 1, 2 \.\.\. Given: \('1', '3'\)"):
        TaskHead("joint_span", ("1", "3"))
