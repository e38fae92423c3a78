"""Saving: published whole or not at all, whatever happens in between; retention; what a run may not do."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.checkpoint_cases import FACTS, make_saver, progress, state_pieces, wrong
from tiny import tiny_llama

from trilithon_parallel.checkpoint import CheckpointError, Piece, Progress, Retention, Saver, find_latest, load, verify
from trilithon_parallel.checkpoint import saver as saver_module
from trilithon_parallel.config import ModelConfig, load_config
from trilithon_parallel.grid import Grid

GRID = Grid.single()
DTYPE = torch.bfloat16

# Python 3.12 warns of forks beside threads; the children here start their own and end by `_exit`.
FORKS = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("m") / "model", layers=1, hidden=32, heads=4, groups=2, ffn=48, vocab=300)


@pytest.fixture(scope="module")
def config(model_dir: Path) -> ModelConfig:
    return load_config(model_dir)


@pytest.fixture
def saver(tmp_path: Path, config: ModelConfig) -> Iterator[Saver]:
    made = make_saver(tmp_path / "run", config, GRID, dtype=DTYPE)
    yield made
    made.close()


def pieces(config: ModelConfig) -> list[Piece]:
    return state_pieces(config, GRID, virtual=1, dtype=DTYPE, saving=True)


def is_good(directory: Path, config: ModelConfig) -> bool:
    """Whether a checkpoint loads with every bit right."""
    targets = state_pieces(config, GRID, virtual=1, dtype=DTYPE, saving=False)
    load(directory, targets, config=config, axis=GRID.world)
    return not wrong(targets, config)


def save(saver: Saver, config: ModelConfig, *steps: int) -> None:
    for step in steps:
        saver.start(pieces(config), progress(step))
        assert saver.wait() is not None


def test_a_checkpoint_says_everything_about_itself(saver: Saver, config: ModelConfig, tmp_path: Path) -> None:
    """
    The manifest holds the run's facts, its progress and every file with size and checksum.

    The cursor is what was consumed, nothing of a layout (seen elsewhere: another dp breaks the data, torchtitan#811).
    """
    saver.start(pieces(config), Progress(4, 32, 2048, {"rng": [1, 2], "loss_scale": 1.5}))
    directory = saver.wait()
    assert directory == tmp_path / "run" / "step_00000004"
    manifest = verify(directory, axis=GRID.world)

    assert (manifest.step, manifest.consumed_samples, manifest.consumed_tokens) == (4, 32, 2048)
    assert manifest.state == {"rng": [1, 2], "loss_scale": 1.5}
    assert manifest.vocab.model_dump() == {"true_size": 300, "padded_size": 384}
    assert manifest.layout.model_dump() == {"tp": 1, "pp": 1, "dp": 1, "virtual": 1}
    assert manifest.dtypes == {"weights": "bfloat16", "optimizer": "float32"}
    assert (manifest.rope_layout, manifest.tied_embeddings) == ("half_split", True)
    assert (manifest.seed, manifest.data_hash) == (FACTS.seed, FACTS.data_hash)
    listed = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert set(manifest.files) == listed - {"manifest.json"}
    assert (directory.parent / "latest").read_text() == "step_00000004\n"


def test_saving_does_not_hold_up_the_run(saver: Saver, config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk takes its time, polls return at once and the tensors may change; the save is as it was begun."""
    gate, original = threading.Event(), saver_module.write_block

    def slow(*arguments: Any) -> None:
        gate.wait(60)
        original(*arguments)

    monkeypatch.setattr(saver_module, "write_block", slow)
    given = pieces(config)
    saver.start(given, progress(1))
    for piece in given:
        piece.tensor.zero_()
    before = [saver.poll() for _ in range(5)]
    assert saver.is_saving
    gate.set()
    directory = saver.wait()

    assert before == [None] * 5
    assert not saver.is_saving
    assert directory is not None
    assert is_good(directory, config)


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(1), [60]),
        (Retention(2), [50, 60]),
        (Retention(1, keep_every=20), [20, 40, 60]),
        (Retention(10), [10, 20, 30, 40, 50, 60]),
    ],
    ids=["last", "last two", "every 20th", "more than there are"],
)
def test_retention(retention: Retention, kept: list[int], tmp_path: Path, config: ModelConfig) -> None:
    """What retention keeps is there, the rest is gone, and nothing half deleted lies about."""
    saver = make_saver(tmp_path / "run", config, GRID, dtype=DTYPE, retention=retention)
    save(saver, config, 10, 20, 30, 40, 50, 60)
    saver.close()

    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == [".lock", "latest", *[f"step_{step:08d}" for step in kept]]


def test_R10_retention_never_deletes_the_last_good_one(tmp_path: Path, config: ModelConfig) -> None:
    """
    Newer checkpoints whose bytes rotted push no good one out: resumed at 20, the save of 25 keeps itself and 20 or 25.

    Inverse: seen to fail with retention counting from the highest step and not sparing the one just verified.
    """
    run_dir = tmp_path / "run"
    saver = make_saver(run_dir, config, GRID, dtype=DTYPE, retention=Retention(2))
    save(saver, config, 20, 30)
    saver.close()
    flip(run_dir / "step_00000030")
    resumed = find_latest(run_dir, axis=GRID.world)
    assert resumed is not None
    assert resumed.manifest.step == 20
    saver = make_saver(run_dir, config, GRID, dtype=DTYPE, retention=Retention(1))
    save(saver, config, 25)
    saver.close()

    assert sorted(path.name for path in run_dir.glob("step_*")) == ["step_00000025", "step_00000030"]
    found = find_latest(run_dir, axis=GRID.world)
    assert found is not None
    assert found.manifest.step == 25
    assert [item.directory.name for item in found.skipped] == ["step_00000030"]


def flip(directory: Path) -> None:
    """Change one bit of the last weight file, near its end."""
    path = max(directory.glob("model-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_bad_checkpoint_of_the_same_step_is_put_aside(saver: Saver, config: ModelConfig, tmp_path: Path) -> None:
    """Trained again over a rotten checkpoint, the step is published; the rotten one is kept under another name."""
    save(saver, config, 1, 2)
    flip(tmp_path / "run" / "step_00000002")
    save(saver, config, 2)

    assert is_good(tmp_path / "run" / "step_00000002", config)
    assert (tmp_path / "run" / "damaged-step_00000002-1").is_dir()


def test_a_good_checkpoint_is_never_overwritten(saver: Saver, config: ModelConfig, tmp_path: Path) -> None:
    """A second save of a step says that the first one stays."""
    save(saver, config, 2)
    saver.start(pieces(config), progress(2))
    with pytest.raises(CheckpointError, match="step_00000002 exists already and is good") as caught:
        saver.wait()

    assert caught.value.code == "checkpoint_exists"
    assert is_good(tmp_path / "run" / "step_00000002", config)
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_two_runs_do_not_share_a_directory(saver: Saver, config: ModelConfig, tmp_path: Path) -> None:
    """A run directory belongs to one run until it ends."""
    with pytest.raises(CheckpointError, match="run is in use") as caught:
        make_saver(tmp_path / "run", config, GRID, dtype=DTYPE)
    saver.close()
    make_saver(tmp_path / "run", config, GRID, dtype=DTYPE).close()

    assert caught.value.code == "checkpoint_busy"


Change = Callable[[list[Piece]], list[Piece]]


def _without(given: list[Piece]) -> list[Piece]:
    return given[:-1]


def _doubled(given: list[Piece]) -> list[Piece]:
    return [*given, given[0]]


def _shifted(given: list[Piece]) -> list[Piece]:
    """As many elements as there should be: the first row twice, the last one never."""
    first = given[0]
    rows = first.tensor.shape[0]
    whole_row = first.slices[1]
    parts = [(slice(0, rows - 1), whole_row), (slice(0, 1), whole_row)]
    return [*[Piece(first.name, part, first.tensor[part]) for part in parts], *given[1:]]


def _renamed(given: list[Piece]) -> list[Piece]:
    return [Piece("model.layers.9.mlp.up_proj.weight", given[0].slices, given[0].tensor), *given[1:]]


def _retyped(given: list[Piece]) -> list[Piece]:
    return [Piece(given[0].name, given[0].slices, given[0].tensor.float()), *given[1:]]


def _outside(given: list[Piece]) -> list[Piece]:
    rows = given[0].tensor.shape[0]
    return [Piece(given[0].name, (slice(1, rows + 1), given[0].slices[1]), given[0].tensor), *given[1:]]


def _cut(given: list[Piece]) -> list[Piece]:
    return [Piece(given[0].name, given[0].slices, given[0].tensor[1:]), *given[1:]]


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (_without, "checkpoint_coverage", "tensor model.norm.weight.exp_avg_sq must be given exactly once"),
        (_doubled, "checkpoint_coverage", "Given: 19200 elements"),
        (_shifted, "checkpoint_coverage", "must be given exactly once over all ranks. Given: 9600 elements"),
        (_renamed, "checkpoint_mismatch", "no tensor model.layers.9.mlp.up_proj.weight"),
        (_retyped, "checkpoint_mismatch", "is bfloat16. Given: float32"),
        (_outside, "checkpoint_mismatch", "has shape [300, 32], and a part of it must lie within. Given: ['1:301'"),
        (_cut, "checkpoint_mismatch", "must have shape [300, 32]. Given: [299, 32]"),
    ],
)
def test_R11_pieces_that_do_not_make_up_the_model_are_refused(
    change: Callable[[list[Piece]], list[Piece]],
    code: str,
    says: str,
    saver: Saver,
    config: ModelConfig,
    tmp_path: Path,
) -> None:
    """
    A gap, an overlap, both at once, a name, dtype or rectangle that is not the model's: named, nothing written.

    Inverse: `_shifted` was seen to pass with elements counted but their positions not summed.
    """
    with pytest.raises(CheckpointError) as caught:
        saver.start(change(pieces(config)), progress(1))

    assert says in caught.value.message
    assert caught.value.code == code
    assert not list((tmp_path / "run").glob("*step_*"))


@pytest.mark.parametrize("state", [{"a": float("nan")}, {"a": (1, 2)}, {"a": {1: 2}}, {"a": object()}])
def test_R11_a_state_that_json_does_not_give_back_is_refused(
    state: dict[str, Any], saver: Saver, config: ModelConfig
) -> None:
    """What a resume would find changed is refused when it is saved."""
    with pytest.raises(CheckpointError) as caught:
        saver.start(pieces(config), Progress(1, 1, 1, state))

    assert caught.value.code == "checkpoint_state"


def test_R11_a_model_that_config_json_cannot_describe_is_refused(config: ModelConfig, tmp_path: Path) -> None:
    """What would be another model when it is read back is named at the first save, not when the run resumes."""
    odd = replace(config, activation="gelu_tanh")
    saver = make_saver(tmp_path / "run", odd, GRID, dtype=DTYPE)
    with pytest.raises(CheckpointError, match=r"activation must be 'gelu_tanh' for this run\. Given: 'silu'") as caught:
        saver.start(state_pieces(odd, GRID, virtual=1, dtype=DTYPE, saving=True), progress(1))
    saver.close()

    assert caught.value.code == "checkpoint_mismatch"


def in_child(run: Callable[[], None]) -> int:
    """Run in a forked process; what `os.waitpid` says of its end."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def _killed_at(count: int) -> None:
    """Make the `count`th call of this process that changes the disk its last one: before it, or halfway through it."""
    left = [count]

    def guarded(original: Callable[..., Any], *, is_pwrite: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if is_pwrite and count % 2:
                    fd, data, offset = arguments
                    original(fd, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)

        return call

    for name in ("fsync", "rename", "replace", "posix_fallocate", "unlink", "rmdir", "mkdir"):
        setattr(os, name, guarded(getattr(os, name)))
    os.pwrite = guarded(os.pwrite, is_pwrite=True)


@FORKS
def test_R10_killed_at_any_write_the_last_good_checkpoint_survives(
    saver: Saver, config: ModelConfig, tmp_path: Path
) -> None:
    """
    SIGKILL at every call that changes the disk: what `find_latest` returns is whole, `latest` names a whole one, and
    the next run tidies up and saves.

    Inverse: seen to fail with the older checkpoint deleted before the newer one was published, and with `latest`
    replaced before the rename.
    """
    save(saver, config, 1)
    saver.close()

    def attempt(run_dir: Path, count: int) -> None:
        _killed_at(count)
        again = make_saver(run_dir, config, GRID, dtype=DTYPE, retention=Retention(1))
        save(again, config, 2)

    found = []
    for count in range(1, 1000):
        run_dir = tmp_path / "copy"
        shutil.copytree(tmp_path / "run", run_dir)
        status = in_child(lambda run_dir=run_dir, count=count: attempt(run_dir, count))
        latest = find_latest(run_dir, axis=GRID.world)
        assert latest is not None
        assert not latest.skipped
        assert is_good(latest.directory, config)
        found.append(latest.manifest.step)
        pointed = run_dir / (run_dir / "latest").read_text().strip()
        assert pointed == latest.directory or is_good(pointed, config)
        if count % 8 == 0:
            last = make_saver(run_dir, config, GRID, dtype=DTYPE, retention=Retention(1))
            save(last, config, 3)
            last.close()
            assert sorted(path.name for path in run_dir.iterdir()) == [".lock", "latest", "step_00000003"]
        shutil.rmtree(run_dir)
        if status == 0:
            break
        assert os.WIFSIGNALED(status)

    assert found == sorted(found)
    assert found.count(1) > 40, "the calls were not seen"
    assert found.count(2) > 5


@FORKS
@pytest.mark.parametrize("preallocates", [True, False])
def test_R10_a_full_disk_is_said_and_harms_nothing(
    preallocates: bool, saver: Saver, config: ModelConfig, tmp_path: Path
) -> None:
    """
    No room at preallocation or, where the file system promises none, at the write: one sentence, its room given back.

    The limit is the kernel's on the size of a file, which needs no disk of its own.
    Inverse: seen to fail with errors of the writing thread dropped.
    """
    run_dir = tmp_path / "run"
    save(saver, config, 1)
    saver.close()

    def attempt() -> None:
        again = make_saver(run_dir, config, GRID, dtype=DTYPE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if not preallocates:
            os.posix_fallocate = lambda fd, start, size: os.ftruncate(fd, 0)  # type: ignore[assignment]
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, resource.RLIM_INFINITY))
        error = ""
        try:
            again.start(pieces(config), progress(2))
            again.wait()
        except CheckpointError as caught:
            error = caught.code
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        left = sorted(path.name for path in run_dir.iterdir())
        save(again, config, 3)  # the saver is ready for another try
        (tmp_path / "said.json").write_text(json.dumps([error, left]))

    assert in_child(attempt) == 0
    said = json.loads((tmp_path / "said.json").read_text())
    assert said == ["checkpoint_disk_full", [".lock", "latest", "step_00000001"]]
    assert is_good(run_dir / "step_00000001", config)
    assert is_good(run_dir / "step_00000003", config)
