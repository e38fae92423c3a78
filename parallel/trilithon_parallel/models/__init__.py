"""How blocks become a stage of a model; no parallel code inside."""

from __future__ import annotations

import torch

from trilithon_parallel.backend import Backend
from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.grid import Grid
from trilithon_parallel.lora.adapter import attach
from trilithon_parallel.models.causal import CausalStage
from trilithon_parallel.models.encoder import EncoderStage
from trilithon_parallel.models.reader import ReaderStage
from trilithon_parallel.models.seq2seq import Seq2SeqStage
from trilithon_parallel.models.twin import TwinStage
from trilithon_parallel.placement import check_layout

__all__ = ["CausalStage", "EncoderStage", "ReaderStage", "Seq2SeqStage", "TwinStage", "build_seq2seq", "build_stage"]


def build_stage(config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> CausalStage | EncoderStage:
    """
    This rank's part of a decoder or encoder, with uninitialised parameters: load or initialise them, then (to serve)
    `prepare()`. With `config.has_twin` it is a `TwinStage`.

    Raises:
        ModelError: `layout_invalid`, the grid does not fit the model; `model_unsupported`, an encoder-decoder, which
            takes two streams of tokens (`build_seq2seq`).
    """
    if config.is_seq2seq:
        raise ModelError(
            f"{config.architecture} is an encoder-decoder, where a decoder or an encoder is needed.",
            code="model_unsupported",
            hint="Name a decoder or an encoder.",
        )
    check_layout(config, tp=grid.tp.size, pp=grid.pp.size)
    kind = CausalStage if config.is_causal else TwinStage if config.has_twin else EncoderStage
    stage = kind(config, grid=grid, backend=backend, dtype=dtype)
    if config.lora is not None:
        attach(stage, stage.model.layers, config=config, grid=grid, dtype=dtype)
    return stage


def build_seq2seq(config: ModelConfig, *, grid: Grid, backend: Backend, dtype: torch.dtype) -> Seq2SeqStage:
    """
    This rank's part of an encoder-decoder, with uninitialised parameters: load or initialise them. With `config.reads`
    it is a `ReaderStage`.

    Raises:
        ModelError: `layout_invalid`, the grid does not fit the model.
    """
    assert config.is_seq2seq
    check_layout(config, tp=grid.tp.size, pp=grid.pp.size)
    kind = Seq2SeqStage if config.reads is None else ReaderStage
    return kind(config, grid=grid, backend=backend, dtype=dtype)
