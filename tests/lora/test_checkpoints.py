"""Checkpoints of adapters: from layout to layout (bar E7), killed and resumed (bar E9), and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from ranks import HERE, LIMIT_S, load_script, run_ranks

from trilithon_parallel.checkpoint import CheckpointError, export, read_manifest
from trilithon_parallel.grid import Grid
from trilithon_parallel.layout import Layout
from trilithon_parallel.lora.files import CONFIG_FILE, FACTS_FILE, TENSORS_FILE
from trilithon_parallel.lora.peft import read_adapter

SCRIPT = Path(__file__).with_name("checkpoint_cases.py")
runs = load_script(Path(__file__).with_name("lora_runs.py"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model directory of each kind."""
    directory: Path = tmp_path_factory.mktemp("models")
    runs.make_models(directory)
    return directory


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory, models: Path) -> tuple[Path, list[dict[str, str]]]:
    """What one process saved, what two ranks made of it and of their own at every layout, and what they report."""
    directory: Path = tmp_path_factory.mktemp("layouts")
    for name, lora in runs.CHECKPOINTED.items():
        model = runs.make_model(models / name, Layout(), Grid.single(), lora=lora)
        runs.steps(model, 0, 2)
        runs.save(model, directory / f"{name}-single", step=2)
    return directory, run_ranks(SCRIPT, 2, directory, models)


def _step_dir(run_dir: Path, step: int = 2) -> Path:
    found: Path = run_dir / f"step_{step:08d}"
    return found


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("name", runs.CHECKPOINTED)
def test_E7_any_layout_resumes_any_other(name: str, layouts: tuple[Path, list[dict[str, str]]], models: Path) -> None:
    """
    What one layout saved, another loads and saves again byte for byte; the next step's loss is the same everywhere; and
    one process resumes what two ranks saved.

    Seen red: with A's copies under k and v left out.
    """
    directory, reports = layouts
    assert [report.get(name, "never ran") for report in reports] == ["ok", "ok"]
    files = [TENSORS_FILE, *sorted(path.name for path in _step_dir(directory / f"{name}-single").glob("optim-*"))]

    assert len(files) > 2
    for source in ("single", "0", "1", "2"):
        saved = _step_dir(directory / f"{name}-{source}")
        for layout in ("211", "121", "112"):
            again = _step_dir(directory / f"{name}-{source}-{layout}")
            assert all((again / file).read_bytes() == (saved / file).read_bytes() for file in files), (source, layout)
        model = runs.make_model(models / name, Layout(), Grid.single(), lora=runs.CHECKPOINTED[name])
        assert runs.resume(model, directory / f"{name}-{source}") == 2
        adapter = read_adapter(saved, config=model.config)
        for target in model.optimizer.targets():
            if ".exp_avg" not in target.name:
                assert torch.equal(target.tensor, adapter.tensor(target.name)), target.name


@pytest.mark.timeout(LIMIT_S + 60)
def test_E7_a_checkpoint_is_an_adapter_directory(layouts: tuple[Path, list[dict[str, str]]], models: Path) -> None:
    """PEFT loads what two tensor-parallel ranks saved, whole, as it stands, and it changes what the base says."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    directory = _step_dir(layouts[0] / "llama-0")
    base = transformers.AutoModelForCausalLM.from_pretrained(models / "llama")
    tokens = torch.arange(3, 30).view(1, -1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a name that peft still uses
        plain = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, directory).eval()(tokens).logits

    assert float((adapted - plain).abs().max()) > 0.01
    assert sorted(path.name for path in directory.iterdir() if not path.name.startswith("optim")) == [
        CONFIG_FILE, TENSORS_FILE, "manifest.json", FACTS_FILE,
    ]  # fmt: skip
    facts = json.loads((directory / FACTS_FILE).read_text())
    assert (facts["base_digest"], facts["step"], facts["layout"]["tp"]) == (runs.BASE_DIGEST, 2, 2)
    assert read_manifest(directory).base_digest == runs.BASE_DIGEST


@pytest.mark.timeout(LIMIT_S)
def test_E9_killed_at_any_step_the_run_goes_on_bit_for_bit(models: Path, tmp_path: Path) -> None:
    """
    A run that is killed between and right after checkpoints has the losses and the adapter of one that never was.

    Dropout is on, so its masks must come back too. Seen red: with the optimizer's count of steps left at zero.
    """
    model, saver, first = runs.begin_run(models, tmp_path / "whole")
    expected = dict(runs.run_on(model, saver, first, runs.RUN_STEPS))
    losses = tmp_path / "losses"
    ends = []
    for dies_at in (2, 3, -1):
        script = Path(__file__).with_name("long_run.py")
        process = subprocess.run(
            [sys.executable, str(script), models, tmp_path / "killed", losses, str(dies_at)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _path()}, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        ends.append(process.returncode)
    told = [line.split() for line in losses.read_text().splitlines()]

    assert ends == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert [int(step) for step, _ in told] == [0, 1, 2, 2, 3, 4, 5]
    assert all(float.fromhex(loss) == expected[int(step)] for step, loss in told)
    for path in _step_dir(tmp_path / "whole", 6).glob("*.safetensors"):
        assert path.read_bytes() == (_step_dir(tmp_path / "killed", 6) / path.name).read_bytes()


def _path() -> str:
    return os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.mark.parametrize(
    ("lora", "base_digest", "message"),
    [
        ({}, "c" * 64, r"is of an adapter of another base model: its digest must be 'c+' here\. Given: 'b+'"),
        ({}, None, r"is of an adapter of another base model: its digest must be None here\. Given: 'b+'"),
        ({"rank": 2}, "b" * 64, r"is of another adapter: lora must be LoraSpec\(rank=2.*Given: LoraSpec\(rank=4"),
        ({"layout": "fused"}, "b" * 64, r"is of another adapter: lora must be .*'fused'.*Given: .*'per_projection'"),
    ],
    ids=["other_base", "no_base", "other_rank", "other_layout"],
)
def test_R11_another_base_or_adapter_is_refused(
    lora: dict[str, object], base_digest: str | None, message: str, models: Path, tmp_path: Path
) -> None:
    """A checkpoint belongs to its base and to its adapter's description; nothing is loaded into another run."""
    model = runs.make_model(models / "gpt2", Layout(), Grid.single(), lora={})
    runs.steps(model, 0, 1)
    runs.save(model, tmp_path, step=1)
    other = runs.make_model(models / "gpt2", Layout(), Grid.single(), lora=lora)
    before = [target.tensor.clone() for target in other.optimizer.targets()]

    with pytest.raises(CheckpointError, match=message) as caught:
        runs.resume(other, tmp_path, base_digest=base_digest)
    assert caught.value.code == "checkpoint_mismatch"
    assert all(torch.equal(a, b.tensor) for a, b in zip(before, other.optimizer.targets(), strict=True))


@pytest.mark.parametrize("spoil", [TENSORS_FILE, FACTS_FILE, CONFIG_FILE])
def test_R11_a_changed_file_is_no_checkpoint(spoil: str, models: Path, tmp_path: Path) -> None:
    """A flipped byte in the adapter or in its descriptions is found before anything is loaded."""
    model = runs.make_model(models / "gpt2", Layout(), Grid.single(), lora={})
    runs.save(model, tmp_path, step=1)
    path = _step_dir(tmp_path, 1) / spoil
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)

    with pytest.raises(CheckpointError, match=rf"{spoil} does not fit its checksum"):
        runs.resume(model, tmp_path)


def test_R11_an_adapters_checkpoint_is_not_exported_as_a_model(models: Path, tmp_path: Path) -> None:
    """It has no weights of a model: the error says what it is, and what to do to have one."""
    model = runs.make_model(models / "gpt2", Layout(), Grid.single(), lora={})
    runs.save(model, tmp_path / "run", step=1)

    with pytest.raises(CheckpointError, match=r"step_00000001 holds an adapter, not a model\. .* merge it into its b"):
        export(_step_dir(tmp_path / "run", 1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
