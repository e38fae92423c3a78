"""
A new model that begins from another one: a rank reads what the other's directory has and draws what it lacks.

So an encoder gets the head of a task, or a masked-LM head, or another vocabulary, at any layout, and no rank ever holds
the whole model. What is drawn is what `init.initialise` draws: it depends on seed and name alone.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import nn

from trilithon_parallel.config import ModelConfig, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.init import check_kept, draw, kept_as
from trilithon_parallel.placement import global_shapes, local_slice, source_name, stage_names
from trilithon_parallel.weights.directory import WeightFiles
from trilithon_parallel.weights.loader import LoadReport, WeightReader
from trilithon_parallel.weights.names import Slices

SIGMA = 0.02
"""Standard deviation of new weights beside trained ones (Devlin et al. 2019)."""


class BaseReader:
    """
    Blocks of the tensors of `config`, from the directory of a model that has most of them.

    Kept is what both models have (`init.kept_as`): the trunk; a masked-LM head; a task head whose kind and labels are
    the same ones; and a pooler that the files hold though the directory's model has no use for it. The vocabulary and
    the token types may have more rows, which are new, or fewer.

    Args:
        config: of the new model.
        seed, sigma: of what is drawn, as for `initialise`.
        fresh: canonical names that are drawn though the directory has them: the embedding, for another vocabulary.
    Raises:
        ModelError: what `load_config` and `load_stage` refuse in the directory; `weights_shape`, its model has another
            shape than the new one.
        KeyError: a name in `fresh` that the new model does not have.
    """

    def __init__(
        self, model_dir: Path, *, config: ModelConfig, seed: int, sigma: float = SIGMA, fresh: Collection[str] = ()
    ) -> None:
        base = load_config(model_dir)
        self._config, self._seed, self._sigma = config, seed, sigma
        self._shapes = global_shapes(config)
        for name in fresh:
            self._shapes[name]  # a misspelt name would be kept in silence
        pooler = {name: shape for name, shape in self._shapes.items() if name.startswith("pooler.")}
        self._files = WeightFiles(model_dir)
        try:
            self._reader = WeightReader(self._files, base, optional=pooler)
            self._kept = {
                name: source
                for name in self._shapes
                if name not in fresh and (source := kept_as(name, self._reader.shapes, base=base, into=config))
            }
            for name, source in self._kept.items():
                check_kept(name, self._reader.shapes[source], self._shapes[name])
        except BaseException:
            self._files.close()
            raise

    def fill(self, out: torch.Tensor, name: str, slices: Slices) -> int:
        """Make a block of a canonical tensor in the leading corner of `out`, zeros beyond; the bytes that were read."""
        source, shape = self._kept.get(name), self._shapes[name]
        if source is None or (rows := self._reader.shapes[source][0]) < slices[0].stop:
            draw(out, name, shape, slices, config=self._config, seed=self._seed, sigma=self._sigma)
            if source is None or rows <= slices[0].start:
                return 0
            kept = slice(slices[0].start, rows)
            return self._reader.fill(out[: kept.stop - kept.start], source, (kept, *slices[1:]))
        return self._reader.fill(out, source, slices)

    @property
    def new_names(self) -> list[str]:
        """The tensors of which nothing comes from the directory."""
        return [name for name in self._shapes if name not in self._kept]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()


def load_base(
    stage: nn.Module,
    model_dir: Path,
    *,
    config: ModelConfig,
    grid: Grid,
    seed: int,
    sigma: float = SIGMA,
    fresh: Collection[str] = (),
) -> LoadReport:
    """
    As `load_stage`, for a stage of a new model that begins from the directory's; see `BaseReader`.

    Raises:
        ModelError: as for `BaseReader`, and for values that are not finite.
    """
    began, num_bytes = time.monotonic(), 0
    parameters, shapes = dict(stage.named_parameters()), global_shapes(config)
    with BaseReader(model_dir, config=config, seed=seed, sigma=sigma, fresh=fresh) as reader:
        for name in stage_names(config, pp=grid.pp.size, pp_rank=grid.pp.rank, counts=grid.layer_counts):
            owner = source_name(name, config)
            place = local_slice(name, shapes[owner], config=config, tp=grid.tp.size, tp_rank=grid.tp.rank)
            num_bytes += reader.fill(parameters[name].detach(), owner, place.slices)
    return LoadReport(num_bytes, time.monotonic() - began)
