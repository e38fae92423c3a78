"""Loading: what is broken or does not fit is named, file and tensor, and what is good comes back bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint.checkpoint_cases import make_saver, progress, state_pieces, wrong
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llama

from trilithon_parallel.checkpoint import CheckpointError, find_latest, load, read_manifest
from trilithon_parallel.checkpoint.coverage import position_sums
from trilithon_parallel.checkpoint.manifest import encode_manifest, file_entry
from trilithon_parallel.checkpoint.piece import read_block, runs, write_block
from trilithon_parallel.config import ModelConfig, ModelError, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.weights.directory import WeightFiles

GRID = Grid.single()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("m") / "model", layers=1, hidden=32, heads=4, groups=2, ffn=48, vocab=300)


@pytest.fixture(scope="module")
def config(model_dir: Path) -> ModelConfig:
    return load_config(model_dir)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, model_dir: Path) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    saver = make_saver(run_dir, config, GRID, dtype=torch.bfloat16, side_files_from=model_dir)
    for step in (1, 2):
        saver.start(state_pieces(config, GRID, virtual=1, dtype=torch.bfloat16, saving=True), progress(step))
        saver.wait()
    saver.close()
    return run_dir


@pytest.fixture
def run_dir(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to be broken."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def load_all(directory: Path, config: ModelConfig, *, dtype: torch.dtype = torch.bfloat16) -> None:
    targets = state_pieces(config, GRID, virtual=1, dtype=dtype, saving=False)
    load(directory, targets, config=config, axis=GRID.world)
    assert wrong(targets, config) == []


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "optim-00001-of-00003.safetensors",
    "optim-00002-of-00003.safetensors",
    "optim-00003-of-00003.safetensors",
    "optim.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def test_the_files_below_are_all_there_are(saved: Path) -> None:
    """The table of broken files covers every file of a checkpoint."""
    assert sorted(path.name for path in (saved / "step_00000002").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [_flip, _truncate, Path.unlink], ids=["flipped", "truncated", "missing"])
def test_R10_damage_to_any_file_is_named_and_the_previous_checkpoint_found(
    file: str, damage: Callable[[Path], None], run_dir: Path, config: ModelConfig
) -> None:
    """
    One bit, one byte or one file less: the load says which file, and `find_latest` falls back and says why.

    Inverse: seen to fail with checksums not compared.
    """
    damage(run_dir / "step_00000002" / file)
    with pytest.raises(CheckpointError) as caught:
        load_all(run_dir / "step_00000002", config)
    found = find_latest(run_dir, axis=GRID.world)

    assert f"step_00000002/{file}" in caught.value.message
    assert caught.value.hint
    assert found is not None
    assert found.directory == run_dir / "step_00000001"
    assert [item.reason.message for item in found.skipped] == [caught.value.message]
    load_all(found.directory, config)


def test_R10_a_changed_number_in_the_manifest_is_found(run_dir: Path) -> None:
    """
    One digit of the samples consumed, everything else as it was: a resume would read the wrong data and not know.

    Inverse: seen to fail without the manifest's own checksum.
    """
    path = run_dir / "step_00000002" / "manifest.json"
    before = path.read_text()
    path.write_text(before.replace('"consumed_samples": 16', '"consumed_samples": 17'))
    with pytest.raises(CheckpointError, match="does not fit its own checksum") as caught:
        read_manifest(path.parent)

    assert caught.value.code == "checkpoint_corrupt"


def test_a_run_without_checkpoints_begins_anew(tmp_path: Path) -> None:
    """No run, an empty one, or one that died in its first save: nothing to resume, no error."""
    (tmp_path / "run" / ".tmp-step_00000001").mkdir(parents=True)

    assert find_latest(tmp_path / "none", axis=GRID.world) is None
    assert find_latest(tmp_path / "run", axis=GRID.world) is None


def test_R10_a_run_whose_checkpoints_are_all_broken_does_not_begin_anew(run_dir: Path) -> None:
    """Starting from nothing where there was a run is never done in silence (seen elsewhere: DeepSpeed#6691)."""
    for step in (1, 2):
        _flip(run_dir / f"step_{step:08d}" / "model-00001-of-00001.safetensors")

    with pytest.raises(CheckpointError, match=r"no checkpoint of run is good: step_00000002: .*step_00000001: "):
        find_latest(run_dir, axis=GRID.world)


def reseal(directory: Path) -> None:
    """Make the manifest fit the files, as if the checkpoint had been saved so."""
    manifest = read_manifest(directory)
    files = {name: file_entry(directory / name) for name in manifest.files}
    (directory / "manifest.json").write_bytes(encode_manifest(manifest.model_copy(update={"files": files})))


def edit(directory: Path, stem: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of one kind, index and all."""
    index = directory / f"{stem}.safetensors.index.json"
    files = sorted(directory.glob(f"{stem}-*.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        tensors |= safetensors.torch.load_file(path)
    change(tensors)
    names = list(tensors)
    parts = np.array_split(np.array(names), len(files))
    weight_map = {}
    for path, part in zip(files, parts, strict=True):
        safetensors.torch.save_file({str(name): tensors[name].clone() for name in part}, path)
        weight_map |= {str(name): path.name for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    reseal(directory)


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("stem", "change", "code", "says"),
    [
        ("model", lambda t: t.pop(UP), "weights_missing", f"tensor {UP} is missing"),
        ("model", lambda t: t.update(more=t[UP]), "weights_extra", "tensor more has no place"),
        (
            "model",
            lambda t: t.update({UP: t[UP][1:]}),
            "weights_shape",
            f"{UP} must have shape [48, 32]",
        ),
        ("model", lambda t: t.update({UP: t[UP].half()}), "checkpoint_mismatch", f"{UP} is float16. Given: bfloat16"),
        ("optim", lambda t: t.pop(UP + ".exp_avg"), "weights_missing", f"tensor {UP}.exp_avg is missing"),
        ("optim", lambda t: t.update(more=t[UP + ".master"]), "weights_extra", "tensor more has no place"),
        ("optim", lambda t: t.update({UP + ".exp_avg": t[UP + ".exp_avg"][:, 1:]}), "weights_shape", "Given: [48, 31]"),
        ("optim", lambda t: t.update({UP + ".master": t[UP + ".master"].half()}), "weights_dtype", "Given: float16"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith(("weights_", "checkpoint_")) else "",
)
def test_R11_a_checkpoint_with_other_tensors_is_refused(
    stem: str,
    change: Callable[[dict[str, Any]], Any],
    code: str,
    says: str,
    run_dir: Path,
    config: ModelConfig,
) -> None:
    """
    A missing, extra, misshapen or retyped tensor, checksums right: the load names it (seen elsewhere: DeepSpeed#6503).

    Inverse: seen to fail with the names of the optimizer's files not compared.
    """
    directory = run_dir / "step_00000002"
    edit(directory, stem, change)
    with pytest.raises(CheckpointError) as caught:
        load_all(directory, config)

    assert caught.value.code == code
    assert says in caught.value.message


def test_R11_a_run_that_leaves_a_tensor_out_is_refused(saved: Path, config: ModelConfig) -> None:
    """Every tensor of the checkpoint must be asked for; here nobody wants the last one."""
    targets = state_pieces(config, GRID, virtual=1, dtype=torch.bfloat16, saving=False)
    with pytest.raises(CheckpointError, match=r"model.norm.weight.exp_avg_sq must be given at least once") as caught:
        load(saved / "step_00000002", targets[:-1], config=config, axis=GRID.world)

    assert caught.value.code == "checkpoint_coverage"


@pytest.mark.parametrize(("field", "value"), [("rope_theta", 5e5), ("norm_eps", 1e-6), ("num_layers", 2)])
def test_R11_another_model_is_refused_by_its_first_difference(
    field: str, value: Any, saved: Path, config: ModelConfig
) -> None:
    """Also where every shape agrees: a model with another rotary base is another model."""
    with pytest.raises(CheckpointError, match=f"{field} must be {value!r} for this run. Given: ") as caught:
        load_all(saved / "step_00000002", replace(config, **{field: value}))

    assert caught.value.code == "checkpoint_mismatch"


def test_R11_another_dtype_is_refused(saved: Path, config: ModelConfig) -> None:
    """A bf16 run does not become an fp32 one by resuming."""
    with pytest.raises(CheckpointError, match=r"is bfloat16\. Given: float32"):
        load_all(saved / "step_00000002", config, dtype=torch.float32)


def test_R11_a_manifest_of_a_newer_version_says_so(run_dir: Path) -> None:
    """A document that this version cannot know is not called broken."""
    path = run_dir / "step_00000002" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    with pytest.raises(CheckpointError, match=r"schema_version must be at most 1\. Given: 2\.") as caught:
        read_manifest(path.parent)

    assert caught.value.code == "checkpoint_unsupported"


def test_tensors_of_any_strides_are_saved_and_filled(tmp_path: Path, config: ModelConfig) -> None:
    """What lies transposed in memory comes out as it is named, and goes back in."""
    given = state_pieces(config, GRID, virtual=1, dtype=torch.bfloat16, saving=True)
    turned = [replace(piece, tensor=piece.tensor.t().contiguous().t()) for piece in given]
    saver = make_saver(tmp_path / "run", config, GRID, dtype=torch.bfloat16)
    saver.start(turned, progress(1))
    directory = saver.wait()
    saver.close()
    assert directory is not None
    targets = [replace(piece, tensor=torch.zeros_like(piece.tensor.t().contiguous()).t()) for piece in given]
    load(directory, targets, config=config, axis=GRID.world)

    assert wrong(targets, config) == []


def test_the_optimizers_files_have_an_index_of_their_own(saved: Path, tmp_path: Path) -> None:
    """The same reader opens both sets of a checkpoint; errors name the index that was looked for."""
    with WeightFiles(saved / "step_00000001", stem="optim") as files:
        names = set(files.tensors)
    with WeightFiles(saved / "step_00000001") as files:
        weights = set(files.tensors)
    with pytest.raises(ModelError, match=r"neither optim\.safetensors nor optim\.safetensors\.index\.json is there"):
        WeightFiles(tmp_path, stem="optim")

    assert names == {f"{name}.{state}" for name in weights for state in ("master", "exp_avg", "exp_avg_sq")}


@st.composite
def blocks(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    bounds = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in shape]
    return shape, tuple(slice(start, stop) for start, stop in bounds)


@settings(deadline=None)
@given(blocks())
def test_runs_are_the_positions_of_a_block(block: tuple[tuple[int, ...], tuple[slice, ...]]) -> None:
    """The runs, spelled out, are the block's positions in order; their sums are those of the closed form."""
    shape, slices = block
    expected = np.arange(np.prod(shape)).reshape(shape)[slices].reshape(-1)

    starts, length = runs(shape, slices)
    spelled = (starts[:, None] + np.arange(length)).reshape(-1)
    assert spelled.tolist() == expected.tolist()
    assert position_sums(shape, slices) == (len(expected), int(expected.sum()), int((expected**2).sum()))


@settings(deadline=None)
@given(blocks())
def test_what_is_written_is_read_back_and_nothing_else_touched(
    tmp_path_factory: pytest.TempPathFactory, block: tuple[tuple[int, ...], tuple[slice, ...]]
) -> None:
    """A block written into a file is in its place, its surroundings are as before, and reading gives it back."""
    shape, slices = block
    path = tmp_path_factory.mktemp("b") / "file"
    before = torch.zeros(shape)
    path.write_bytes(b"head" + before.numpy().tobytes())
    values = torch.rand([item.stop - item.start for item in slices]) + 1
    with path.open("r+b") as file:
        write_block(file.fileno(), 4, shape, slices, values)
        again = torch.empty_like(values)
        read_block(file.fileno(), 4, shape, slices, again)

    before[slices] = values
    assert path.read_bytes() == b"head" + before.numpy().tobytes()
    assert torch.equal(values, again)
