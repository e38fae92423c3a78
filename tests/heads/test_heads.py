"""Task heads in one process against transformers: logits, exports, losses, a whole training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hub_heads import CLASSES, loss_of, said_by
from task_models import MODELS, SETTINGS, batch_of, batches_of, make_model, relative, sequences, weights_of

from trilithon_parallel.attention import PackedView
from trilithon_parallel.backend import select
from trilithon_parallel.config import load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.layout import Layout
from trilithon_parallel.models import EncoderStage, build_stage
from trilithon_parallel.objective import SpanBatch
from trilithon_parallel.step import TrainingModel
from trilithon_parallel.weights.export import export_model, full_state
from trilithon_parallel.weights.loader import load_stage
from trilithon_parallel.weights.names import name_table

KINDS = sorted(CLASSES)
LOGITS = 1e-4  # fp32 sums in another order
EXACT = 1e-10  # fp64 sums in another order, after AdamW's division by roots


def written(model: TrainingModel, directory: Path) -> Path:
    """The model's directory, in fp32."""
    state = full_state([(model.chunks[0].stage, Grid.single())], model.config)
    export_model(state, model.config, directory, side_files_from=None, dtype=torch.float32)
    return directory


def opened(kind: str, directory: Path) -> Any:
    """transformers' model of a directory, each of whose tensors has a place and the other way round."""
    model, found = CLASSES[kind].from_pretrained(directory, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_E10_exports_open_in_transformers(kind: str, tmp_path: Path) -> None:
    """
    Our export, whose names are those that it writes itself, gives transformers our logits and labels, and us the model.

    Inverses seen red: without the pooler's tanh; with the names of a bare encoder.
    """
    model = make_model(MODELS[kind], dtype=torch.float32)
    directory = written(model, tmp_path / "model")
    batches = batches_of(kind, 0, Layout(micro_batch_size=8), 0)

    theirs, config = opened(kind, directory), load_config(directory)

    with torch.no_grad():
        assert (model.predict(batches)[0] - said_by(theirs, batches[0])).abs().max() <= LOGITS
    names = {name for name, _ in theirs.named_parameters()}
    assert set(safetensors.torch.load_file(directory / "model.safetensors")) == names
    assert config == replace(MODELS[kind], dtype="float32")
    assert config.task_head is not None
    if kind != "span":
        assert tuple(theirs.config.id2label.values()) == config.task_head.labels


def even(name: str) -> float:
    """Every parameter learns alike."""
    return 1.0


def uneven(name: str) -> float:
    """The head learns ten times as fast, norms half as fast, the embedding not at all."""
    if name.startswith(("task_head.", "pooler.")):
        return 10.0
    return 0.0 if name.startswith("model.embed_tokens") else 0.5 if "norm" in name else 1.0


@pytest.mark.parametrize("rate_of", [even, uneven])
@pytest.mark.parametrize("kind", KINDS)
def test_E8_a_step_is_that_of_transformers(kind: str, rate_of: Callable[[str], float], tmp_path: Path) -> None:
    """
    Loss and weights after two steps in fp64 are those of transformers' model under torch's AdamW and its groups.

    Inverses seen red: the mean over all tokens in place of the labelled ones; ends' loss added and not averaged; a
    span's softmax over the question too; a factor that scales the decay's rate alone.
    """
    settings = replace(SETTINGS, clip_norm=None)
    model = make_model(MODELS[kind], optimizer=settings, rate_of=rate_of)
    theirs = opened(kind, written(model, tmp_path / "model")).double()
    parameters, table = dict(theirs.named_parameters()), name_table(model.config)
    named = {name: parameters[table.spellings(source.file_name)[0]] for name, source in table.sources.items()}
    assert len(named) == len(parameters)
    groups = [
        {"params": [parameter], "weight_decay": 0.1 * (parameter.dim() > 1), "lr": 1e-2 * rate_of(name)}
        for name, parameter in named.items()
    ]
    adamw = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    for step in range(2):
        adamw.zero_grad()
        loss = loss_of(theirs, kind, sequences(kind, step))
        loss.backward()
        adamw.step()
        layout = Layout(micro_batch_size=2)
        result = model.train_step(batches_of(kind, step, layout, 0), learning_rate=1e-2, step=step)
        assert abs(result.loss - loss.item()) <= EXACT

    for name, ours in weights_of(model).items():
        place = tuple(slice(0, size) for size in named[name].shape)  # without the rows that pad a vocabulary
        assert relative(ours[place], named[name].detach()) <= EXACT, name


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_R11_a_rate_that_is_none_is_refused(rate: float) -> None:
    """The error names the parameter and the value."""
    with pytest.raises(ValueError, match=rf"learning-rate factor of [a-z_.]+ must be .*Given: {rate}"):
        make_model(MODELS["tokens"], rate_of=lambda name: rate)


def test_a_span_without_context_is_transformers_own_loss(tmp_path: Path) -> None:
    """Where every token may be chosen and nothing is padded, BertForQuestionAnswering computes the loss itself."""
    model = make_model(MODELS["span"])
    theirs = opened("span", written(model, tmp_path / "model")).double()
    rows = sequences("span", 0, lengths=(12,) * 5)
    batch = batch_of("span", rows, 0)
    assert isinstance(batch, SpanBatch)
    free = replace(batch, context_T=torch.ones_like(batch.context_T))
    with torch.no_grad():
        expected = theirs(
            torch.stack([row["tokens"] for row in rows]),
            token_type_ids=torch.stack([row["types"] for row in rows]),
            start_positions=torch.tensor([row["start"] for row in rows]),
            end_positions=torch.tensor([row["end"] for row in rows]),
        ).loss

    assert abs(model.evaluate([free]).loss - expected.item()) <= EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_E4_served_logits_are_those_of_training(kind: str, models: Path) -> None:
    """
    The packed stage that serves gives, sequence by sequence, the bits of the training forward over all of them.

    Inverse seen red: the head's product left to torch while the rest is packed.
    """
    config, grid = load_config(models / kind), Grid.single()
    stages = []
    for is_served in (False, True):
        backend = select("torch")
        stage = build_stage(config, grid=grid, backend=backend, dtype=torch.float32)
        load_stage(stage, models / kind, config=config, grid=grid)
        stage.prepare() if is_served else backend.train(stage)
        assert isinstance(stage, EncoderStage)
        stages.append(stage)
    (batch,) = batches_of(kind, 0, Layout(micro_batch_size=8), 0)
    training, serving = stages
    view = PackedView(batch.cu_seqlens, causal=False)
    hidden_TH = training(batch.tokens_T, positions_T=batch.positions_T, types_T=batch.types_T, view=view)
    trained = training.task_logits(hidden_TH, batch.cu_seqlens).detach()
    served = []
    with torch.no_grad():
        for start, stop in pairwise(batch.cu_seqlens):
            assert batch.types_T is not None
            part, bounds = slice(start, stop), [0, stop - start]
            hidden_SH = serving(
                batch.tokens_T[part], positions_T=batch.positions_T[part], types_T=batch.types_T[part],
                view=PackedView(bounds, causal=False),
            )  # fmt: skip
            served.append(serving.task_logits(hidden_SH, bounds))

    expected = safetensors.torch.load_file(models / kind / "expected" / "logits.safetensors")["logits"]
    assert torch.equal(torch.cat(served), trained)
    assert (trained - expected).abs().max() <= LOGITS
