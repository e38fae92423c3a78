"""
Random weights that don't depend on the layout: a rank draws exactly the numbers that one process would have.

Every tensor has its own seed, made of the run's seed and its canonical name, and is drawn whole, in fp32 on the CPU, in
blocks of rows that have seeds of their own; a rank keeps its slice. So tp, pp and virtual stages move numbers between
ranks and change none of them, and no rank holds more than one block beside its own slices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.grid import Grid
from trilithon_parallel.lora.spec import parse_name
from trilithon_parallel.placement import global_shapes, local_slice, source_name, stage_names
from trilithon_parallel.shapes import STRENGTH, model_of

BLOCK_ELEMENTS = 2**22
"""Elements drawn at once, in whole rows: 16 MiB of fp32. Part of what a seed means: another size, other weights."""

# What may have another number of rows in a model that goes on from another one.
_GROWING = ("model.embed_tokens.weight", "model.embed_types.weight", "lm_head.weight", "lm_head.bias")


def default_sigma(config: ModelConfig) -> float:
    """
    Standard deviation of a new model's weights: sqrt(1 / (3 h)), h its hidden size.

    At h = 20480 that is the 4.0e-3 of MT-NLG 530B (arXiv 2201.11990).
    """
    return math.sqrt(1.0 / (3.0 * config.hidden_size))


def initialise(stage: nn.Module, *, config: ModelConfig, grid: Grid, seed: int, sigma: float) -> None:
    """
    Fill the parameters of one stage, named canonically, with the numbers of a new model.

    Matrices and tables are Normal(0, sigma); products that end on the residual stream Normal(0, sigma / sqrt(n)), n
    the number of such products in their stack (2 a layer, 3 with cross-attention; Radford et al. 2019, section 2.3).
    Gains are 1, biases 0, padding 0. The token types of a decoder are 0: rows added to its embedding change nothing
    before they are trained. T5 doesn't divide its attention's scores by sqrt(head_dim), so its queries are drawn
    smaller by that factor, as Raffel et al. (2020) do; all else of it follows the rules of the other families.

    An adapter's A is uniform from -1 / sqrt(in) to 1 / sqrt(in), as PEFT draws it, and its B is 0.

    Args:
        stage: holds exactly the parameters of `placement.stage_names`, in any float dtype, on any device.
        grid: gives this rank's place along tp and pp (for a virtual stage, that of `Grid.chunk`).
        seed: of the run; equal seeds give equal weights at every layout.
        sigma: standard deviation, above 0; see `default_sigma`.
    Raises:
        ValueError: sigma is not a positive number.
    """
    _check_sigma(sigma)
    parameters, shapes = dict(stage.named_parameters()), global_shapes(config)
    for name in stage_names(config, pp=grid.pp.size, pp_rank=grid.pp.rank, counts=grid.layer_counts):
        owner = source_name(name, config)
        place = local_slice(name, shapes[owner], config=config, tp=grid.tp.size, tp_rank=grid.tp.rank)
        parameter = parameters[name].detach()
        assert tuple(parameter.shape) == place.shape, f"{name}: {tuple(parameter.shape)} for {place.shape}"
        draw(parameter, owner, shapes[owner], place.slices, config=config, seed=seed, sigma=sigma)


def extend_state(
    state: Mapping[str, Tensor], config: ModelConfig, *, into: ModelConfig, seed: int, sigma: float
) -> dict[str, Tensor]:
    """
    The state of a model that goes on from another one: new heads, a table of token types, another vocabulary.

    What both models have is kept. The vocabulary and the token types may have more rows, which are new, or fewer: the
    last ones go. What `state` lacks is new, drawn as `initialise` does, but for a head that was tied before: it starts
    as the embedding. What `into` has no place for is left out.

    Args:
        state: every tensor of `placement.global_shapes(config)`, whole, as `load_state` gives it.
        into: the config of the model to make; `dataclasses.replace(config, token_types=2)`, for example.
        seed, sigma: as for `initialise`.
    Returns:
        Every tensor of `global_shapes(into)`, for `export_model`.
    Raises:
        ModelError: `weights_shape`, a tensor of both models has another shape.
    """
    _check_sigma(sigma)
    extended: dict[str, Tensor] = {}
    for name, shape in global_shapes(into).items():
        source = kept_as(name, state, base=config, into=into)
        if source is not None and tuple(state[source].shape) == shape:
            extended[name] = state[source]
            continue
        dtype = state["model.embed_tokens.weight" if source is None else source].dtype
        new = torch.empty(shape, dtype=dtype)
        draw(new, name, shape, tuple(slice(0, size) for size in shape), config=into, seed=seed, sigma=sigma)
        if source is not None:
            old = state[source]
            check_kept(name, tuple(old.shape), shape)
            new[: len(old)] = old[: len(new)]
        extended[name] = new
    return extended


def kept_as(name: str, held: Container[str], *, base: ModelConfig, into: ModelConfig) -> str | None:
    """
    The tensor that `name` of a model `into` begins as, of those that a model `base` holds; None where it is new.

    A head that was tied before begins as the embedding. A task head is kept with its very labels alone: what it has
    learned of others means nothing.
    """
    if name.startswith("task_head.") and base.task_head != into.task_head:
        return None
    return next((source for source in (name, source_name(name, base)) if source in held), None)


def check_kept(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """
    Refuse what cannot go on in the new shape.

    Raises:
        ModelError: `weights_shape`.
    """
    if old != new and (name not in _GROWING or old[1:] != new[1:]):
        raise ModelError(
            f"tensor {name} must have shape {list(new)} in the new model. Given: {list(old)}.",
            code="weights_shape",
            hint="Only the vocabulary and the token types may differ in size.",
        )


def _check_sigma(sigma: float) -> None:
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(
            f"init sigma must be a positive number. Given: {sigma!r}. Use sqrt(1 / (3 * hidden_size)) if in doubt."
        )


def draw(
    out: Tensor,
    name: str,
    shape: tuple[int, ...],
    slices: tuple[slice, ...],
    *,
    config: ModelConfig,
    seed: int,
    sigma: float,
) -> None:
    """
    New numbers for the part `slices` of the canonical tensor `name` of this `shape`, in the leading corner of `out`;
    zeros beyond. `initialise` says which numbers.
    """
    out.fill_(1.0 if _is_gain(name) else 0.0)
    corner = out[tuple(slice(0, item.stop - item.start) for item in slices)]
    if (adapter := parse_name(name)) is not None:
        if adapter[2] == "A":
            draw_into(corner, name, shape, slices, seed=seed, sigma=shape[1] ** -0.5, is_uniform=True)
    elif (spread := _spread(name, config, sigma)) > 0:
        draw_into(corner, name, shape, slices, seed=seed, sigma=spread)


def draw_into(
    out: Tensor,
    name: str,
    shape: tuple[int, ...],
    slices: tuple[slice, ...],
    *,
    seed: int,
    sigma: float,
    is_uniform: bool = False,
) -> None:
    """Fill `out` with the part `slices` of the matrix `name`: Normal(0, sigma), or uniform from -sigma to sigma."""
    rows, columns = shape
    wanted, kept = slices
    step = max(1, BLOCK_ELEMENTS // columns)
    for block in range(wanted.start // step, -(-wanted.stop // step)):
        first = block * step
        generator = torch.Generator().manual_seed(tensor_seed(seed, name, block))
        size = (min(step, rows - first), columns)
        if is_uniform:
            drawn = torch.rand(size, generator=generator).mul_(2.0).sub_(1.0).mul_(sigma)
        else:
            drawn = torch.randn(size, generator=generator).mul_(sigma)
        start, stop = max(wanted.start, first), min(wanted.stop, first + step)
        out[start - wanted.start : stop - wanted.start] = drawn[start - first : stop - first, kept]


def tensor_seed(seed: int, name: str, block: int) -> int:
    """The generator's seed for one block of rows of one tensor: 63 bits of SHA-256, the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _is_gain(name: str) -> bool:
    return name.endswith("norm.weight")


def _spread(name: str, config: ModelConfig, sigma: float) -> float:
    """Standard deviation of one tensor; 0 where nothing is drawn."""
    name, config = model_of(name, config)
    if _is_gain(name) or name.endswith(".bias") or name == STRENGTH:
        return 0.0
    if config.is_causal and name == "model.embed_types.weight":
        return 0.0
    if name.endswith((".o_proj.weight", ".down_proj.weight")):
        return sigma / math.sqrt(_residual_outputs(name, config))
    if config.is_seq2seq and name.endswith(".q_proj.weight"):
        return sigma / math.sqrt(config.head_dim)
    return sigma


def _residual_outputs(name: str, config: ModelConfig) -> int:
    """Products that end on the residual stream of the stack that holds `name`."""
    if name.startswith("encoder."):
        return 2 * config.num_encoder_layers
    if name.startswith("decoder."):
        return 3 * config.num_decoder_layers
    return 2 * config.num_layers
