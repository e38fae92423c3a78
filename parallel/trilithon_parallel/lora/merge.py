"""Adapters added to the weights beneath: W + scale * B A, in fp64 and rounded once to the dtype of W."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import nn

from trilithon_parallel.config import ModelConfig, load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.lora.files import TEMPLATE_FILE
from trilithon_parallel.lora.peft import AdapterFiles, read_adapter
from trilithon_parallel.lora.spec import products
from trilithon_parallel.placement import local_slice
from trilithon_parallel.weights.export import export_model
from trilithon_parallel.weights.loader import load_state
from trilithon_parallel.weights.names import Slices


def merge_adapter(model_dir: Path, adapter_dir: Path, out_dir: Path) -> None:
    """
    Write a model directory of the base with an adapter merged into it, whole or not at all.

    Args:
        model_dir: of the base model; its tokenizer goes along, and its chat template where the adapter has none.
        adapter_dir: as for `read_adapter`.
        out_dir: must not exist yet.
    Raises:
        ModelError: as for `read_adapter`, `load_state` and `export_model`.
    """
    config = load_config(model_dir)
    adapter = read_adapter(adapter_dir, config=config)
    state = load_state(model_dir, config=config)
    for name, weight in state.items():
        whole = tuple(slice(0, size) for size in weight.shape)
        _add(weight, name.removesuffix(".weight"), whole, adapter, config)
    template = adapter_dir / TEMPLATE_FILE
    export_model(state, config, out_dir, side_files_from=model_dir)
    if template.is_file():
        shutil.copyfile(template, out_dir / TEMPLATE_FILE)


def merge_into(stage: nn.Module, adapter_dir: Path, *, config: ModelConfig, grid: Grid) -> bool:
    """
    Merge an adapter into the weights of a stage, which is not packed yet.

    Args:
        config: of the base model.
        grid: gives this rank's place.
    Returns:
        Whether the adapter changes anything: False where every B is zero.
    Raises:
        ModelError: as for `read_adapter`.
    """
    adapter = read_adapter(adapter_dir, config=config)
    has_effect = False
    for name, parameter in stage.named_parameters():
        if name.endswith("_proj.weight"):
            path, leaf = name.removesuffix(".weight"), name.split(".")[-2]
            shape = products(config)[leaf][1:]
            place = local_slice(name, shape, config=config, tp=grid.tp.size, tp_rank=grid.tp.rank)
            corner = parameter.detach()[tuple(slice(0, size) for size in place.source_shape)]
            has_effect |= _add(corner, path, place.slices, adapter, config)
    return has_effect


def _add(weight: torch.Tensor, product: str, slices: Slices, adapter: AdapterFiles, config: ModelConfig) -> bool:
    """Add to the block `slices` of a product's weight; whether the adapter has a share in it that isn't zero."""
    leaf = product.rsplit(".", 1)[-1]
    if leaf not in adapter.spec.targets or leaf not in products(config):
        return False
    down = adapter.tensor(f"{product}.lora_A.weight")[:, slices[1]].to(weight.device, torch.float64)
    up = adapter.tensor(f"{product}.lora_B.weight")[slices[0]].to(weight.device, torch.float64)
    weight.copy_(weight.double() + adapter.spec.scale_of(leaf) * (up @ down))
    return bool(up.any())
