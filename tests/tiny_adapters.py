"""Random adapters in PEFT's layout over tiny models: B is not zero, so each of them changes what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trilithon_parallel.config import load_config
from trilithon_parallel.lora.peft import write_adapter
from trilithon_parallel.lora.spec import LoraSpec, owned_shapes, targets_of


def tiny_adapter(
    path: Path, model_dir: Path, *, seed: int, rank: int = 4, alpha: float = 8.0, scale: float = 0.3, **spec: Any
) -> Path:
    """
    Write an adapter of that seed for a model.

    Args:
        scale: of the random factors; 0.3 changes greedy tokens of tiny models at once.
        spec: further fields of `LoraSpec`; all products of the model unless `targets` says which.
    Returns:
        The directory, which must not have existed.
    """
    config = load_config(model_dir)
    described = LoraSpec(rank=rank, alpha=alpha, **({"targets": targets_of(config)} | spec))
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(shape, generator=generator) * scale for name, shape in owned_shapes(config, described).items()
    }
    write_adapter(path, state, config=config, spec=described, base_model="tiny", facts={})
    return path
