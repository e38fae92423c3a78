"""One rank of a pretraining run, under the environment of `torchrun`: join, agree, build, resume, train."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch

import trilithon_parallel
from trilithon_parallel import rendezvous
from trilithon_parallel.backend import select
from trilithon_parallel.checkpoint import (
    CheckpointError,
    Retention,
    RunFacts,
    Saver,
    find_latest,
    import_model_directory,
)
from trilithon_parallel.collectives import CollectiveError
from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.costs import PlannedLayout, bubble_fraction, model_flops, num_parameters
from trilithon_parallel.data.errors import DataError
from trilithon_parallel.grid import Grid
from trilithon_parallel.health import HealthError, Signals, agree, set_deterministic
from trilithon_parallel.init import default_sigma, initialise
from trilithon_parallel.layout import Layout
from trilithon_parallel.memory import Numerics, peak_memory
from trilithon_parallel.optimizer import AdamWSettings
from trilithon_parallel.peak import measured_peak
from trilithon_parallel.pretrain.config import PretrainConfig, load_pretrain_config
from trilithon_parallel.pretrain.setup import Setup, digest, open_data, prepare
from trilithon_parallel.pretrain.stream import DataStream
from trilithon_parallel.recompute import Recompute
from trilithon_parallel.rendezvous import RendezvousError
from trilithon_parallel.report import Reporter
from trilithon_parallel.step import DropoutRates, TrainingModel
from trilithon_parallel.trainer import Costs, Ended, Plan, Trainer, peak_bytes
from trilithon_parallel.watchdog import Watchdog

EXIT_OK, EXIT_BUG, EXIT_USAGE, EXIT_INVALID, EXIT_PEER_LOST = 0, 1, 2, 3, 6


def main(path: Path) -> int:
    """
    Run this rank to its end and say in words why, where that is not the plan's end.

    Returns:
        0 done; 2 the configuration is wrong; 3 model, data or checkpoint are; 6 a peer was lost; 128 + n stopped in
        good order by signal n; 1 a bug.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        with Signals() as signals:
            run_rank(load_pretrain_config(path), signals)
            return signals.exit_code
    except (ModelError, DataError, CheckpointError, HealthError) as error:
        if rank == 0 or isinstance(error, HealthError):
            print(f"trilithon pretrain: {error}", file=sys.stderr)
        return EXIT_USAGE if getattr(error, "code", "") in ("config_invalid", "layout_invalid") else EXIT_INVALID
    except (CollectiveError, RendezvousError) as error:
        print(f"trilithon pretrain: rank {rank}: {error}", file=sys.stderr)
        return EXIT_PEER_LOST
    except Exception:
        traceback.print_exc()
        return EXIT_BUG
    finally:
        rendezvous.leave()


def run_rank(settings: PretrainConfig, signals: Signals) -> Ended:
    """Everything between the rendezvous and the end of the run."""
    setup, run = prepare(settings), settings.run
    if int(os.environ.get("WORLD_SIZE", "1")) != setup.layout.world_size:
        raise ModelError(
            f"layout tp * pp * dp must be the number of ranks. Given: {setup.layout.tp} * {setup.layout.pp} * "
            f"{setup.layout.dp} and {os.environ.get('WORLD_SIZE', '1')} ranks.",
            code="layout_invalid",
            hint=f"Start {setup.layout.world_size} ranks.",
        )
    threads = run.num_threads or _threads_of_a_rank()
    torch.set_num_threads(threads)
    if run.deterministic:
        set_deterministic(num_threads=threads)
    dtype: torch.dtype = getattr(torch, settings.training.dtype)
    peak = measured_peak(dtype, num_threads=threads, device=run.device)
    rendezvous.join(device=run.device, timeout_s=run.first_timeout_s)
    grid = Grid.build(tp=setup.layout.tp, pp=setup.layout.pp, dp=setup.layout.dp, device=run.device)
    grid = replace(
        grid, sequence_parallel=setup.layout.sequence_parallel and setup.layout.tp > 1,
        layer_counts=setup.layout.layer_counts,
    )  # fmt: skip
    run.directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(
            Watchdog(
                rank=grid.rank,
                world_size=grid.world_size,
                run_dir=run.directory,
                timeout_s=run.timeout_s,
                first_timeout_s=run.first_timeout_s,
            )
        )
        agree(grid, _facts(settings, setup))
        train, held_out = open_data(settings, setup)
        agree(grid, {"data": train.digest, "held-out data": "" if held_out is None else held_out.digest})
        base_bytes = peak_bytes(grid.device)
        model = _build(settings, setup, grid, dtype)
        stream = DataStream(
            train, held_out, grid, micro_batch=setup.layout.micro_batch_size, evaluation_samples=run.evaluate_samples
        )
        found = find_latest(run.directory, axis=grid.world)
        if found is not None and found.manifest.data_hash != train.digest:
            raise CheckpointError(
                f"{found.directory.name} was trained on other data than the configuration names.",
                code="checkpoint_mismatch",
                hint="Name the data of the run, or begin a new run with model.weights set to this checkpoint.",
            )
        saver = Saver(
            run.directory,
            config=setup.config,
            grid=grid,
            facts=RunFacts(settings.training.seed, train.digest, setup.layout.virtual),
            dtype=dtype,
            retention=Retention(run.keep_last, run.keep_every),
            side_files_from=settings.data.tokenizer,
        )
        stack.callback(saver.close)
        costs = _costs(settings, setup, peak, base_bytes)
        trainer = Trainer(model, stream, _plan(settings, setup), costs, saver=saver, signals=signals, watchdog=watchdog)
        if found is None:
            _fill(settings, setup, model, grid)
        else:
            trainer.resume(found)
        if grid.rank == 0:
            total = setup.batches.whole_run(setup.train_samples)[0]
            reporter = Reporter(run.directory, total_steps=total, resume_step=trainer.cursor.step)
            trainer.reporter = stack.enter_context(reporter)
            for line in _greeting(setup, grid, trainer):
                reporter.say(line)
            for skipped in () if found is None else found.skipped:
                reporter.say(f"Passed over {skipped.directory.name}: {skipped.reason.message}")
        return trainer.run()


def _build(settings: PretrainConfig, setup: Setup, grid: Grid, dtype: torch.dtype) -> TrainingModel:
    training, layout = settings.training, settings.layout
    return TrainingModel(
        setup.config,
        grid,
        setup.layout,
        select(settings.run.backend, device=settings.run.device, fp8=training.fp8),
        dtype=dtype,
        optimizer=AdamWSettings(
            training.beta1, training.beta2, training.eps, training.weight_decay, training.clip_norm
        ),
        recompute=Recompute(layout.recompute, layout.recompute_every, layout.recompute_first),
        dropout=DropoutRates(training.dropout, training.attention_dropout),
        seed=training.seed,
    )


def _fill(settings: PretrainConfig, setup: Setup, model: TrainingModel, grid: Grid) -> None:
    """Weights to begin with: those of a model directory, or new ones that no layout changes."""
    source = settings.model.weights
    if source is not None:
        targets = [target for target in model.optimizer.targets() if ".exp_avg" not in target.name]
        import_model_directory(source, targets, config=setup.config, axis=grid.world)
        model.optimizer.publish()
    else:
        sigma = settings.model.init_std or default_sigma(setup.config)
        for chunk in model.chunks:
            initialise(chunk.stage, config=setup.config, grid=chunk.grid, seed=settings.training.seed, sigma=sigma)
        model.optimizer.adopt_weights()
    model.weights_changed()


def _plan(settings: PretrainConfig, setup: Setup) -> Plan:
    run = settings.run
    return Plan(
        train_samples=setup.train_samples,
        batches=setup.batches,
        learning_rate=setup.learning_rate,
        checkpoint_every=run.checkpoint_every,
        evaluate_every=run.evaluate_every,
        max_skipped=settings.training.max_skipped,
    )


def _costs(settings: PretrainConfig, setup: Setup, peak: float, base_bytes: int) -> Costs:
    config, layout, seq_len = setup.config, setup.layout, settings.data.seq_len
    flops = model_flops(config, batch=1, seq_len=seq_len)
    recomputed = model_flops(config, batch=1, seq_len=seq_len, recompute=settings.layout.recompute)
    microbatches = layout.micro_batches(settings.training.global_batch_size)
    bubble = bubble_fraction(pp=layout.pp, microbatches=microbatches, virtual=layout.virtual) if layout.pp > 1 else None
    predicted = _predicted_bytes(settings, config, layout, microbatches)
    return Costs(flops / seq_len, (recomputed - flops) / seq_len, peak, predicted, base_bytes, bubble)


def _predicted_bytes(settings: PretrainConfig, config: ModelConfig, layout: Layout, microbatches: int) -> int | None:
    """What the planner says of the fullest rank; it knows no encoder-decoders and no fp16."""
    if config.is_seq2seq or settings.training.dtype == "float16":
        return None
    planned = PlannedLayout(
        layout.tp, layout.pp, layout.dp, layout.micro_batch_size, layout.virtual, settings.layout.recompute,
        layout.sequence_parallel, layout.distributed_optimizer, layout.schedule,
    )  # fmt: skip
    dropout = settings.training.dropout > 0 or settings.training.attention_dropout > 0
    numerics = Numerics(settings.training.dtype, dropout, fused_attention=settings.training.attention_dropout == 0)
    memory = peak_memory(config, planned, numerics, seq_len=settings.data.seq_len, microbatches=microbatches)
    return round(memory.total)


def _facts(settings: PretrainConfig, setup: Setup) -> dict[str, str]:
    return {
        "configuration": digest(settings),
        "seed": str(settings.training.seed),
        "layout": str(setup.layout),
        "model": str(setup.config),
        "torch": torch.__version__,
        "code": _code_digest(),
    }


def _code_digest() -> str:
    """A hash of this package's sources: ranks of different versions must not train together."""
    root = Path(trilithon_parallel.__file__).parent
    hashed = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.c"), *root.rglob("*.h")]):
        hashed.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()


def _threads_of_a_rank() -> int:
    """The host's cores, shared out among the ranks that it holds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))))


def _greeting(setup: Setup, grid: Grid, trainer: Trainer) -> list[str]:
    layout = setup.layout
    begin = f"Resuming after step {trainer.cursor.step}" if trainer.cursor.step else "Beginning"
    return [
        f"{begin}: {setup.config.architecture}, {num_parameters(setup.config) / 1e6:.1f}M parameters, "
        f"tp {layout.tp} x pp {layout.pp} x dp {layout.dp} ({layout.schedule}), "
        f"{setup.train_samples} samples, {torch.get_num_threads()} threads a rank.",
    ]
