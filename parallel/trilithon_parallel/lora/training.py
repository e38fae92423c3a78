"""The weights that an adapter's training begins from: the base's, frozen, and a new adapter or an earlier one."""

from __future__ import annotations

from pathlib import Path

from trilithon_parallel.checkpoint.errors import together
from trilithon_parallel.config import ModelError
from trilithon_parallel.lora.peft import AdapterFiles
from trilithon_parallel.step import TrainingModel
from trilithon_parallel.weights.base import load_base


def begin(model: TrainingModel, model_dir: Path, *, seed: int, adapter: AdapterFiles | None = None) -> None:
    """
    Fill a model that trains an adapter. Collective. Before a resume too: the base is in no checkpoint.

    Every rank reads its own slices of the base. A new adapter changes nothing yet: its B is zero, and its A is drawn by
    seed and name alone, so it is the same at every layout.

    Args:
        model: made with `lora`.
        model_dir: of the base model.
        seed: of the new adapter.
        adapter: go on from this one, in a new run: its weights, no moments. It must be of the very description that
            the model was made with (`AdapterFiles.spec`), but for the dropout.
    Raises:
        ModelError: `lora_invalid`, another description; all that `load_base` refuses, on all ranks alike.
    """
    spec = model.config.lora
    assert spec is not None, "the model trains no adapter"
    if adapter is not None and adapter.spec.described() != spec.described():
        raise ModelError(
            f"lora must be what the adapter to go on from is, {adapter.spec!r}. Given: {spec!r}.",
            code="lora_invalid",
            hint="Take rank, alpha, targets and layout from the adapter.",
        )

    def run() -> None:
        for chunk in model.chunks:
            load_base(chunk.stage, model_dir, config=model.config, grid=chunk.grid, seed=seed)
        if adapter is None:
            return
        for target in model.optimizer.targets():
            name = target.name.removesuffix(".master")
            if ".exp_avg" not in name:
                adapter.fill(target.tensor, name, target.slices)

    together(run, model.grid.world, label="adapter.begin")
    if adapter is None:
        model.optimizer.adopt_weights()
    else:
        model.optimizer.publish()
    model.weights_changed()
