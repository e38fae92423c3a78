"""A checkpoint is a model directory as it stands; weights go out to other software and come in for a new run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint.checkpoint_cases import make_saver, progress
from tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

from trilithon_parallel.backend import select
from trilithon_parallel.checkpoint import CheckpointError, Piece, export, import_model_directory, optimizer_names
from trilithon_parallel.config import ModelConfig, load_config
from trilithon_parallel.grid import Axis, Grid
from trilithon_parallel.models import build_stage
from trilithon_parallel.placement import global_shapes
from trilithon_parallel.weights.export import full_state
from trilithon_parallel.weights.loader import load_stage, load_state
from trilithon_server import LLM, SamplingParams

GRID = Grid.single()

MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": lambda p: tiny_llama(p, heads=9, groups=3, hidden=72, ffn=100, vocab=391, tied=False),
    "llama-tied": lambda p: tiny_llama(p, vocab=391),
    "gpt2": lambda p: tiny_gpt2(p, vocab=391),
    "bert": lambda p: tiny_bert(p, pooler=False),
    "t5": lambda p: tiny_t5(p),
}


def blank(config: ModelConfig, *, dtype: torch.dtype, masters: bool = False) -> list[Piece]:
    """The whole model as targets of one rank."""
    found = []
    for name, shape in global_shapes(config).items():
        where = tuple(slice(0, size) for size in shape)
        found.append(Piece(name, where, torch.empty(shape, dtype=dtype)))
        if masters:
            found.append(Piece(f"{name}.master", where, torch.empty(shape)))
    return found


def train_nothing(model_dir: Path, run_dir: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Begin a run from a model directory and save it at step 0, as a trainer would."""
    config = load_config(model_dir)
    weights = blank(config, dtype=dtype)
    import_model_directory(model_dir, weights, config=config, axis=GRID.world)
    moments = [
        Piece(state, piece.slices, torch.zeros(piece.shape))
        for piece in weights
        for state in optimizer_names(piece.name, dtype)
    ]
    saver = make_saver(run_dir, config, GRID, dtype=dtype, side_files_from=model_dir)
    saver.start([*weights, *moments], progress(0))
    directory = saver.wait()
    saver.close()
    assert directory is not None
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Model name -> its model directory and a checkpoint of the same weights."""
    root = tmp_path_factory.mktemp("transfer")
    directories = {name: make(root / name) for name, make in MODELS.items()}
    return {name: (path, train_nothing(path, root / f"run-{name}")) for name, path in directories.items()}


def place(tp: int, pp: int, tp_rank: int, pp_rank: int) -> Grid:
    sizes = {"tp": (tp_rank, tp), "pp": (pp_rank, pp), "dp": (0, 1), "world": (tp_rank + tp * pp_rank, tp * pp)}
    axes = {name: Axis(name, rank, size, tuple(range(size))) for name, (rank, size) in sizes.items()}
    return Grid(**axes, device=torch.device("cpu"))


@pytest.mark.parametrize("model", [name for name in MODELS if name != "t5"])  # which is trained, not served
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_E7_the_serving_loader_reads_a_checkpoint_at_any_layout(
    model: str, tp: int, pp: int, made: dict[str, tuple[Path, Path]]
) -> None:
    """Stages filled from the checkpoint by the loader that serving uses make up the model it was begun from."""
    model_dir, checkpoint = made[model]
    config = load_config(checkpoint)
    stages = []
    for tp_rank in range(tp):
        for pp_rank in range(pp):
            grid = place(tp, pp, tp_rank, pp_rank)
            stage = build_stage(config, grid=grid, backend=select("torch"), dtype=torch.float32)
            load_stage(stage, checkpoint, config=config, grid=grid)
            stages.append((stage, grid))
    expected, state = load_state(model_dir, config=config), full_state(stages, config)

    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("tp", [1, 2])
def test_E7_a_checkpoint_is_served_as_it_stands(tp: int, made: dict[str, tuple[Path, Path]]) -> None:
    """The engine, started on the step's directory, writes what it writes on the model directory."""
    params = SamplingParams(temperature=0, max_tokens=12)
    texts = []
    for directory in made["llama"]:
        with LLM(directory, tp=tp, kv_cache_bytes=4 << 20, num_threads=1) as model:
            texts.append(model.generate("Once upon a time", params)[0].choices[0].token_ids)

    assert texts[0] == texts[1]


@pytest.mark.parametrize("model", MODELS)
def test_E10_transformers_computes_the_same_on_a_checkpoint(model: str, made: dict[str, tuple[Path, Path]]) -> None:
    """
    The checkpoint's directory, opened by transformers, gives bitwise the outputs of the model it was begun from.

    Seen elsewhere: rotary pairs permuted on the way (torchtitan#1291). Inverse: seen to fail with GPT-2's parts written
    in another order, and with the rows of q written pair by pair.
    """
    transformers = pytest.importorskip("transformers")
    tokens = torch.arange(3, 40)[None]
    outputs = []
    for directory in made[model]:
        kinds = {"bert": transformers.AutoModel, "t5": transformers.AutoModelForSeq2SeqLM}
        kind = kinds.get(model, transformers.AutoModelForCausalLM)
        loaded = kind.from_pretrained(directory, dtype=torch.float32).eval()
        inputs = {"decoder_input_ids": tokens[:, :5]} if model == "t5" else {}
        with torch.no_grad():
            outputs.append(loaded(tokens, **inputs)[0])

    assert torch.equal(outputs[0], outputs[1])


def test_E7_a_new_run_has_the_weights_of_the_directory(tmp_path: Path) -> None:
    """Weights are rounded to the run's dtype once; masters keep every bit of the file."""
    model_dir = tiny_gpt2(tmp_path / "model", vocab=391)
    config = load_config(model_dir)
    targets = blank(config, dtype=torch.bfloat16, masters=True)
    import_model_directory(model_dir, targets, config=config, axis=GRID.world)
    expected = load_state(model_dir, config=config)

    for target in targets:
        whole = expected[target.name.removesuffix(".master")]
        assert torch.equal(whole.to(target.tensor.dtype), target.tensor)


def test_R11_moments_are_not_imported_from_weights(tmp_path: Path) -> None:
    """A model directory has no optimizer state, and says so instead of leaving a target as it was."""
    model_dir = tiny_llama(tmp_path / "model")
    config = load_config(model_dir)
    target = Piece("model.norm.weight.exp_avg", (slice(0, 64),), torch.empty(64))
    with pytest.raises(CheckpointError, match=r"Given: a target model\.norm\.weight\.exp_avg"):
        import_model_directory(model_dir, [target], config=config, axis=GRID.world)


def test_R11_a_directory_of_another_model_is_refused(made: dict[str, tuple[Path, Path]]) -> None:
    """The import names tensor and shapes, as serving does."""
    config = replace(load_config(made["llama"][0]), ffn_size=64)
    targets = blank(config, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"mlp.gate_proj.weight must have shape \[64, 72\]") as caught:
        import_model_directory(made["llama"][0], targets, config=config, axis=GRID.world)

    assert caught.value.code == "weights_shape"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
def test_an_export_is_the_checkpoint_without_its_optimizer(
    model: str, dtype: torch.dtype | None, made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Same weights, cast where asked, same side files, config.json true to them; nothing of the training is left."""
    _, checkpoint = made[model]
    export(checkpoint, tmp_path / "out", dtype=dtype, max_shard_bytes=50_000)
    config = load_config(tmp_path / "out")
    before, after = load_state(checkpoint, config=config), load_state(tmp_path / "out", config=config)

    assert all(torch.equal(before[name].to(dtype or torch.float32), after[name]) for name in before)
    assert config.dtype == ("float32" if dtype is None else "bfloat16")
    kept = {path.name for path in checkpoint.iterdir() if not path.name.startswith(("optim", "model", "manifest"))}
    assert kept == {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("model")}


def test_exports_never_overwrite_nor_pass_on_damage(made: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """An existing directory stays; a checkpoint whose bytes changed is not exported, and nothing is left behind."""
    _, checkpoint = made["gpt2"]
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="there exists already"):
        export(checkpoint, tmp_path / "there")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoint.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    document = json.loads((broken / "config.json").read_text()) | {"layer_norm_epsilon": 1e-6}
    (broken / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"broken/config\.json"):
        export(broken, tmp_path / "out")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "there"]
