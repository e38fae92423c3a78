"""Training of adapters: every layout against one process (bar E8), what is frozen, what is kept and allocated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import LIMIT_S, load_script, run_ranks
from torch import nn

from trilithon_parallel.backend import native, native_training, select
from trilithon_parallel.buckets import SHARE_MULTIPLE, Buckets
from trilithon_parallel.config import ModelError, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.layers import ColumnParallelLinear
from trilithon_parallel.layout import Layout
from trilithon_parallel.lora.adapter import attach
from trilithon_parallel.lora.spec import owned_shapes, parse_name
from trilithon_parallel.models import CausalStage, build_stage
from trilithon_parallel.objective import log_probabilities
from trilithon_parallel.optimizer import AdamWSettings, Optimizer
from trilithon_parallel.step import TrainingModel
from trilithon_parallel.weights.loader import load_stage, load_state

SCRIPT = Path(__file__).with_name("training_cases.py")
runs = load_script(Path(__file__).with_name("lora_runs.py"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model directory of each kind."""
    directory: Path = tmp_path_factory.mktemp("models")
    runs.make_models(directory)
    return directory


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Callable[[int], list[dict[str, str]]]:
    """A function from a number of ranks to what each rank reports of each case."""

    @functools.cache
    def run(world_size: int) -> list[dict[str, str]]:
        return run_ranks(SCRIPT, world_size, tmp_path_factory.mktemp(f"world{world_size}"), models)

    return run


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize(
    ("world_size", "case"),
    [
        pytest.param(size, case.name, id=f"{size}ranks-{case.name}")
        for size, cases in runs.CASES.items()
        for case in cases
    ],
)
def test_E8_steps_equal_one_process(
    world_size: int, case: str, outcomes: Callable[[int], list[dict[str, str]]]
) -> None:
    """
    Losses, gradient norms, moments and the adapter after three steps are those of one process, at every layout.

    Seen red: without the sum over tp of the replicated halves; with dropout masks drawn for a rank's own columns.
    """
    reports = outcomes(world_size)

    assert [report.get(case, "never ran") for report in reports] == ["ok"] * world_size


def _model(models: Path, name: str = "llama", **lora: object) -> TrainingModel:
    model: TrainingModel = runs.make_model(models / name, Layout(), Grid.single(), lora=lora)
    return model


def _stage(model: TrainingModel) -> CausalStage:
    stage = model.chunks[0].stage
    assert isinstance(stage, CausalStage)
    return stage


@pytest.mark.parametrize("layout", ["per_projection", "fused"])
def test_a_new_adapter_changes_nothing(models: Path, layout: str) -> None:
    """Before the first step the log-probabilities are the base's, to the last bit: B is zero."""
    model = _model(models, layout=layout)
    config = load_config(models / "llama")
    base = build_stage(config, grid=Grid.single(), backend=select("torch"), dtype=torch.float32)
    load_stage(base, models / "llama", config=config, grid=Grid.single())
    select("torch").train(base)
    (batch, *_) = runs.batches_of(config, 0, Layout(), 0)
    assert isinstance(base, CausalStage)

    assert torch.equal(log_probabilities(_stage(model), batch), log_probabilities(base, batch))


def test_A_is_drawn_as_peft_draws_it(models: Path) -> None:
    """Uniform within 1 / sqrt(inputs) (Kaiming with a = sqrt(5)), another one for each product; B is zero."""
    parameters = dict(_model(models).chunks[0].stage.named_parameters())
    a, other = (parameters[f"model.layers.{i}.mlp.down_proj.lora_A.weight"].detach() for i in (0, 1))
    bound = 100**-0.5

    assert a.shape == (4, 100)
    assert 0.9 * bound < float(a.abs().max()) <= bound
    assert abs(float(a.mean())) < 0.1 * bound
    assert abs(float(a.std()) - bound / 3**0.5) < 0.1 * bound
    assert not torch.equal(a, other)
    assert all(not p.any() for name, p in parameters.items() if name.endswith("lora_B.weight"))


def test_the_base_is_frozen(models: Path) -> None:
    """Steps move every half of the adapter and not one bit of the base."""
    model = _model(models)
    config = load_config(models / "llama")
    before = {name: p.detach().clone() for name, p in model.chunks[0].stage.named_parameters()}

    results = runs.steps(model, 0, 3)

    base = load_state(models / "llama", config=config)
    for name, parameter in model.chunks[0].stage.named_parameters():
        if parse_name(name) is None:
            assert torch.equal(parameter, base[name]), name
            assert not parameter.requires_grad
        else:
            assert not torch.equal(parameter, before[name]), name
    assert all(result.grad_norm > 0 for result in results)


@pytest.mark.parametrize("layout", ["per_projection", "fused"])
def test_gradients_and_moments_are_the_adapters_alone(models: Path, layout: str) -> None:
    """
    Memory: gradients and optimizer state have the adapter's elements, rounded up once a bucket, and no weight of the
    base has a gradient.

    Seen red: with the base's norms left trainable.
    """
    model = _model(models, layout=layout)
    runs.steps(model, 0, 1)

    assert model.config.lora is not None
    sizes = [torch.Size(shape).numel() for shape in owned_shapes(model.config, model.config.lora).values()]
    total = -(-sum(sizes) // SHARE_MULTIPLE) * SHARE_MULTIPLE
    assert [bucket.grad.numel() for bucket in model.buckets.buckets] == [total]
    assert [state.numel() for states in model.optimizer.states() for state in states.values()] == [total, total]
    frozen = [p for name, p in model.chunks[0].stage.named_parameters() if parse_name(name) is None]
    assert all(p.grad is None and not hasattr(p, "main_grad") for p in frozen)


@pytest.mark.skipif(bool(native.unavailable_reason()), reason="the products' C kernels don't run here")
def test_no_gradient_of_a_frozen_weight_is_computed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass multiplies for the adapter's weights alone, and a step packs no frozen weight again."""
    model = _model(models)
    names = {id(p): name for name, p in model.chunks[0].stage.named_parameters()}
    seen = []

    def spy(weight: torch.Tensor, grad_TO: torch.Tensor, x_TK: torch.Tensor) -> torch.Tensor | None:
        seen.append(names[id(weight)])
        return add(weight, grad_TO, x_TK)

    add = native_training.add_weight_gradient
    monkeypatch.setattr(native_training, "add_weight_gradient", spy)
    q_proj = model.chunks[0].stage.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(q_proj, ColumnParallelLinear)
    assert isinstance(q_proj.product, native_training.TrainingProduct)
    packed = q_proj.product.packed()
    runs.steps(model, 0, 1)

    assert model.config.lora is not None
    assert set(seen) == set(owned_shapes(model.config, model.config.lora))
    assert q_proj.product.packed() is packed


@pytest.mark.parametrize(("targets", "kept"), [(("q_proj",), 2), (("q_proj", "down_proj"), 3)], ids=["without", "with"])
def test_inputs_are_kept_for_adapted_products_alone(models: Path, targets: tuple[str, ...], kept: int) -> None:
    """Of a layer's MLP the activation keeps its two inputs; the down product's is kept where it has an adapter."""
    model = _model(models, targets=targets)
    widths = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        widths.append(tuple(x.shape))
        return x

    (batch, *_) = runs.batches_of(model.config, 0, Layout(), 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        log_probabilities(_stage(model), batch)

    assert widths.count((runs.LENGTH, 100)) == kept * model.config.num_layers


def test_a_rank_without_trained_parameters_works(models: Path) -> None:
    """Everything of its stages is frozen: it takes steps with the others, has no state and gives no piece."""
    config, grid = load_config(models / "llama"), Grid.single()
    stage = build_stage(config, grid=grid, backend=select("torch"), dtype=torch.float32).requires_grad_(False)
    buckets = Buckets([(stage, grid)], config, grid, virtual=1, distributed=True)
    optimizer = Optimizer(buckets, config, AdamWSettings())
    buckets.zero()
    outcome = optimizer.step(1e-3)

    assert (outcome.grad_norm, outcome.is_skipped) == (0.0, False)
    assert optimizer.num_steps == 1
    optimizer.num_steps = 7
    assert optimizer.num_steps == 7
    assert list(optimizer.pieces()) == list(optimizer.targets()) == optimizer.states() == []


def test_bfloat16_trains_with_masters(models: Path) -> None:
    """Adapters in bfloat16 beside such a base: the loss falls, and masters in fp32 keep what bfloat16 cannot."""
    model: TrainingModel = runs.make_model(
        models / "llama", Layout(), Grid.single(), lora={}, dtype=torch.bfloat16, settings=AdamWSettings()
    )
    batches = runs.batches_of(model.config, 0, Layout(), 0)
    losses = [model.train_step(batches, learning_rate=1e-2, step=step).loss for step in range(6)]

    assert losses[-1] < 0.8 * losses[0]
    masters = [target.tensor for target in model.optimizer.targets() if target.name.endswith(".master")]
    assert masters
    assert any(not torch.equal(master, master.bfloat16().float()) for master in masters)


def test_continuing_from_an_adapter_takes_its_weights(models: Path, tmp_path: Path) -> None:
    """A new run that begins from an adapter has its weights, and refuses one of another description."""
    peft = pytest.importorskip("trilithon_parallel.lora.peft")
    model = _model(models, "gpt2")
    runs.steps(model, 0, 2)
    assert model.config.lora is not None
    state = {t.name: t.tensor for t in model.optimizer.targets() if ".exp_avg" not in t.name}
    peft.write_adapter(
        tmp_path / "adapter", state, config=model.config.without_lora(), spec=model.config.lora, base_model="", facts={}
    )  # fmt: skip
    adapter = peft.read_adapter(tmp_path / "adapter", config=model.config)
    again = runs.make_model(models / "gpt2", Layout(), Grid.single(), lora={}, adapter=adapter)

    assert {t.name: t.tensor.tolist() for t in again.optimizer.targets() if ".exp_avg" not in t.name} == {
        name: tensor.tolist() for name, tensor in state.items()
    }
    with pytest.raises(ModelError, match=r"lora must be what the adapter .* is, .*rank=4.* Given: .*rank=8"):
        runs.make_model(models / "gpt2", Layout(), Grid.single(), lora={"rank": 8}, adapter=adapter)


def test_dropout_drops_the_adapters_input_alone(models: Path) -> None:
    """With B at zero dropout changes no loss; after a step it does, and differently each step."""
    plain, dropped = _model(models), _model(models, dropout=0.5)
    first = [runs.steps(model, 0, 1)[0].loss for model in (plain, dropped)]
    batches = runs.batches_of(plain.config, 0, Layout(), 0)
    later = [dropped.train_step(batches, learning_rate=0.0, step=step).loss for step in (1, 2, 2)]

    assert first[0] == first[1]
    assert later[0] != later[1]
    assert later[1] == later[2]
    assert dropped.evaluate(batches) == dropped.evaluate(batches)
    assert replace(dropped.config, lora=None) == plain.config.without_lora()


def test_other_backends_products_take_no_adapter(models: Path) -> None:
    """Products that are not this project's own are named as the reason, before anything trains."""
    config = load_config(models / "llama")
    config = replace(config, lora=runs.spec_of(config, targets=("q_proj",)))
    block = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(48, 96)})})

    with pytest.raises(
        ModelError, match=r"adapters are trained by backend torch alone\..* Use backend torch"
    ) as caught:
        attach(block, nn.ModuleDict({"0": block}), config=config, grid=Grid.single(), dtype=torch.float32)
    assert caught.value.code == "backend_unavailable"
