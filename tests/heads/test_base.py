"""Models that begin from another one's directory: what is kept, what is new, and MiniLM itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from task_models import ENCODER, HEADS, MODELS, batch_of, make_model, sequences
from torch import Tensor

from trilithon_parallel.checkpoint import CheckpointError, import_base
from trilithon_parallel.config import ModelConfig, ModelError, TaskHead, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.init import extend_state
from trilithon_parallel.placement import global_shapes
from trilithon_parallel.step import TrainingModel
from trilithon_parallel.task_head import for_masked_lm, for_task
from trilithon_parallel.weights.base import SIGMA, BaseReader
from trilithon_parallel.weights.loader import load_state
from trilithon_parallel.weights.store import home

MINILM = home() / "models" / "all-minilm-l6-v2"
needs_minilm = pytest.mark.skipif(not MINILM.is_dir(), reason="all-minilm-l6-v2 was not pulled")


def begun(directory: Path, config: ModelConfig, *, seed: int = 1, fresh: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Every tensor of a new model, whole."""
    state = {}
    with BaseReader(directory, config=config, seed=seed, fresh=fresh) as reader:
        for name, shape in global_shapes(config).items():
            state[name] = torch.empty(shape)
            reader.fill(state[name], name, tuple(slice(0, size) for size in shape))
    return state


def begin(directory: Path, config: ModelConfig, **options: Any) -> TrainingModel:
    """A model that learns from there on, in fp32."""
    model = make_model(config, dtype=torch.float32, **options)
    weights = [piece for piece in model.optimizer.targets() if ".exp_avg" not in piece.name]
    import_base(directory, weights, config=config, axis=Grid.single().world, seed=1)
    model.optimizer.publish()
    model.weights_changed()
    return model


def test_the_trunk_is_kept_and_the_head_is_new(models: Path) -> None:
    """The pooler comes from the files though a bare encoder has none; the head is drawn; neither from the other."""
    trunk = load_state(models / "base", config=load_config(models / "base"))
    files = safetensors.torch.load_file(models / "base" / "model.safetensors")
    config = for_task(load_config(models / "base"), HEADS["sequence"])
    state, other = begun(models / "base", config), begun(models / "base", config, seed=2)

    assert all(torch.equal(state[name], tensor) for name, tensor in trunk.items())
    for part in ("weight", "bias"):
        assert torch.equal(state[f"pooler.dense.{part}"], files[f"pooler.dense.{part}"])
    assert not state["task_head.bias"].any()
    assert abs(float(state["task_head.weight"].std()) / SIGMA - 1) < 0.2
    assert not torch.equal(state["task_head.weight"], other["task_head.weight"])


def test_without_a_pooler_in_the_files_it_is_new(models: Path, tmp_path: Path) -> None:
    """As the head is; the rest stays."""
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_bytes((models / "base" / "config.json").read_bytes())
    files = safetensors.torch.load_file(models / "base" / "model.safetensors")
    kept = {name: tensor for name, tensor in files.items() if not name.startswith("pooler.")}
    safetensors.torch.save_file(kept, directory / "model.safetensors")
    config = for_task(load_config(directory), HEADS["sequence"])
    with BaseReader(directory, config=config, seed=1) as reader:
        new = reader.new_names

    assert new == ["pooler.dense.weight", "pooler.dense.bias", "task_head.weight", "task_head.bias"]
    assert abs(float(begun(directory, config)["pooler.dense.weight"].std()) / SIGMA - 1) < 0.1


def test_a_head_is_kept_with_its_very_labels_alone(models: Path) -> None:
    """
    A model that was trained for a task goes on with it; for other labels, or in another order, the head is new.

    Inverse seen red: any task head kept where there is one.
    """
    config = load_config(models / "tokens")
    assert config.task_head is not None
    turned = for_task(config, TaskHead("tokens", config.task_head.labels[::-1]))
    whole = load_state(models / "tokens", config=config)

    same, other = begun(models / "tokens", config), begun(models / "tokens", turned)

    assert all(torch.equal(same[name], tensor) for name, tensor in whole.items())
    assert not torch.equal(other["task_head.weight"], whole["task_head.weight"])
    extended = extend_state(whole, config, into=turned, seed=1, sigma=SIGMA)
    assert all(torch.equal(extended[name], tensor) for name, tensor in other.items())


def test_a_vocabulary_grows_shrinks_or_is_another(models: Path) -> None:
    """
    Rows that both have are kept, new ones drawn; of another vocabulary all rows are new, the trunk stays.

    Inverse seen red: a tensor that grows drawn anew as a whole.
    """
    base = load_config(models / "base")
    old = load_state(models / "base", config=base)
    name = "model.embed_tokens.weight"
    size = base.vocab_size
    grown, smaller, other = (
        begun(models / "base", for_masked_lm(base, vocab_size=rows), fresh=fresh)
        for rows, fresh in ((size + 7, ()), (size - 7, ()), (size, (name,)))
    )

    assert torch.equal(grown[name][:size], old[name])
    assert grown[name][size:].abs().min() > 0
    assert torch.equal(smaller[name], old[name][:-7])
    assert not (other[name] == old[name]).any()
    assert all(torch.equal(other[key], tensor) for key, tensor in old.items() if key != name)
    assert torch.equal(other["lm_transform.norm.weight"], torch.ones(base.hidden_size))
    assert not other["lm_head.bias"].any()


def test_R11_what_does_not_fit_is_refused(models: Path) -> None:
    """Another width or depth names the tensor; a misspelt name is an error; so is a broken base."""
    base = load_config(models / "base")
    wider = for_task(replace(base, ffn_size=100), HEADS["tokens"])
    with pytest.raises(
        ModelError, match=r"mlp\.up_proj\.weight must have shape \[100, 48\] in the new model"
    ) as caught:
        begun(models / "base", wider)
    assert caught.value.code == "weights_shape"
    with pytest.raises(KeyError, match="embed_token"):
        begun(models / "base", for_masked_lm(base), fresh=("model.embed_token.weight",))
    model = make_model(MODELS["tokens"])
    with pytest.raises(CheckpointError, match="a model directory has weights alone"):
        import_base(
            models / "base", list(model.optimizer.targets()), config=model.config, axis=Grid.single().world, seed=1
        )


def test_continued_pretraining_of_a_bare_encoder(models: Path) -> None:
    """A fresh tied masked-LM head on a kept trunk learns what was masked."""
    config = for_masked_lm(load_config(models / "base"))
    model = begin(models / "base", config)
    batch = batch_of("vocabulary", sequences("vocabulary", 0), 0)

    losses = [model.train_step([batch], learning_rate=3e-3, step=step).loss for step in range(30)]

    assert losses[-1] < 0.5 * losses[0], losses


@needs_minilm
@pytest.mark.parametrize("kind", sorted(HEADS))
def test_minilm_gets_a_task_head(kind: str) -> None:
    """The real encoder begins a task from its files, and learns the batch within a few steps."""
    base = load_config(MINILM)
    config = for_task(base, HEADS[kind])
    model = begin(MINILM, config)
    batch = batch_of(kind, sequences(kind, 0, vocab=base.vocab_size), 0)
    losses = [model.train_step([batch], learning_rate=3e-4, step=step).loss for step in range(8)]
    files = safetensors.torch.load_file(MINILM / "model.safetensors")
    with BaseReader(MINILM, config=config, seed=1) as reader:
        new = reader.new_names

    parts = (
        ["first.weight", "last.weight", "first.bias", "score.weight"] if kind == "joint_span" else ["weight", "bias"]
    )
    assert new == [f"task_head.{part}" for part in parts]
    if kind == "sequence":
        state = begun(MINILM, config)
        assert torch.equal(state["pooler.dense.weight"], files["pooler.dense.weight"])
    assert losses[-1] < 0.8 * losses[0], losses


@needs_minilm
def test_minilm_gets_a_masked_lm_head_and_another_vocabulary() -> None:
    """Its trunk stays, its vocabulary is one of 500 tokens, and the loss begins where guessing does."""
    config = for_masked_lm(load_config(MINILM), vocab_size=500)
    state = begun(MINILM, config, fresh=("model.embed_tokens.weight",))
    trunk = load_state(MINILM, config=load_config(MINILM))
    model = begin(MINILM, config)
    batch = batch_of("vocabulary", sequences("vocabulary", 0, vocab=500), 0)
    loss = model.evaluate([batch]).loss

    same = [name for name, tensor in trunk.items() if tensor.shape == state[name].shape]
    assert len(same) == len(trunk) - 1
    assert all(torch.equal(trunk[name], state[name]) for name in same)
    assert abs(loss - torch.tensor(500.0).log().item()) < 1.0


def test_the_label_order_is_part_of_the_file(models: Path) -> None:
    """Labels of a directory whose ids were written in another order are still those of their ids."""
    document = json.loads((models / "tokens" / "config.json").read_text())

    assert tuple(document["id2label"].values()) == HEADS["tokens"].labels
    assert load_config(models / "tokens") == replace(
        for_task(ENCODER, HEADS["tokens"]), dtype="float32", pad_id=load_config(models / "tokens").pad_id
    )
