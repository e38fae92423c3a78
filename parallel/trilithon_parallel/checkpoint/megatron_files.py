"""Megatron-LM's directories: which file is which rank's, what each holds under which name, what the run was."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trilithon_parallel.checkpoint.errors import CheckpointError
from trilithon_parallel.checkpoint.torch_file import Opaque, TensorRef, TorchFile
from trilithon_parallel.config import ModelConfig

_RANK_DIR = re.compile(r"mp_rank_(\d{2,3})(?:_(\d{3}))?")

# The wrappers of older model classes, and what newer ones say instead.
_OLDER = (("language_model.", ""), ("module.", ""), ("encoder.", "decoder."), ("transformer.", "decoder."))

# Megatron's flags whose models this project computes otherwise, with the value that agrees.
_AGREEING: Mapping[str, Any] = {
    "rotary_interleaved": False,
    "apply_layernorm_1p": False,
    "layernorm_zero_centered_gamma": False,
    "num_experts": None,
    "apply_residual_connection_post_layernorm": False,
    "multi_latent_attention": False,
    "qk_layernorm": False,
}


def iteration(checkpoint: Path) -> Path:
    """The directory that holds `mp_rank_...`; other formats are refused by name."""
    tracker = checkpoint / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        said = tracker.read_text().strip()
        checkpoint = checkpoint / (f"iter_{int(said):07d}" if said.isdecimal() else said)
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"checkpoint {checkpoint.name!r} does not exist.",
            code="checkpoint_missing",
            hint="Give the directory iter_NNNNNNN of a Megatron-LM run.",
        )
    distributed = [name for name in (".metadata", "metadata.json", "common.pt") if (checkpoint / name).exists()]
    if distributed:
        raise CheckpointError(
            f"{checkpoint.name} is in Megatron-LM's distributed format ({distributed[0]}), whose index is pickled: "
            "loading it would run code that the file brings along, so it is never opened.",
            code="checkpoint_unsupported",
            hint="Where you trust it, start its training script with `--ckpt-convert-format torch "
            "--ckpt-convert-save DIR`, and import DIR.",
        )
    return checkpoint


def rank_files(directory: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Every rank's file with its (tp rank, stage)."""
    found = 0
    for rank_dir in sorted(directory.iterdir()):
        match = _RANK_DIR.fullmatch(rank_dir.name)
        if match is None:
            continue
        paths = [rank_dir / name for name in ("model_optim_rng.pt", "model_rng.pt") if (rank_dir / name).is_file()]
        if not paths:
            raise CheckpointError(
                f"{rank_dir.name} holds neither model_optim_rng.pt nor model_rng.pt.",
                code="checkpoint_missing",
                hint="Copy the directories of all ranks.",
            )
        found += 1
        yield paths[0], (int(match.group(1)), int(match.group(2) or 0))
    if not found:
        raise CheckpointError(
            f"{directory.name} holds no mp_rank_TT directory: it is no Megatron-LM checkpoint in the format torch.",
            code="checkpoint_unsupported",
            hint="Give the directory iter_NNNNNNN. (Mixtures of experts, mp_rank_TT_PPP_EEE, are not read.)",
        )


def sections(file: TorchFile) -> dict[str, dict[str, TensorRef]]:
    """Model chunk (`model`, or `model0`, `model1`, ...) -> dotted name -> tensor."""
    document = file.document
    chunks = [key for key in document if re.fullmatch(r"model\d*", str(key))] if isinstance(document, dict) else []
    if not chunks:
        raise CheckpointError(
            f"{file.path.parent.name}/{file.path.name} holds no model.",
            code="checkpoint_corrupt",
            hint="Give a checkpoint of Megatron-LM; copy it again.",
        )
    return {chunk: dict(_flat(document[chunk], "")) for chunk in sorted(chunks, key=lambda key: (len(key), key))}


def _flat(item: Any, at: str) -> Iterator[tuple[str, TensorRef]]:
    """Nested states as dotted names, the wrappers of older classes left out; what holds no tensor is not the model."""
    if isinstance(item, TensorRef) and not at.endswith("_extra_state"):
        for old, new in (
            ("language_model.", ""),
            ("module.", ""),
            ("encoder.", "decoder."),
            ("transformer.", "decoder."),
        ):
            at = new + at.removeprefix(old) if at.startswith(old) else at
        yield at, item
    elif isinstance(item, dict):
        for key, value in item.items():
            yield from _flat(value, f"{at}.{key}" if at else str(key))


def check_arguments(arguments: Any, config: ModelConfig) -> None:
    """Compare what the run was started with to the configuration, as far as the file says."""
    given = arguments.state if isinstance(arguments, Opaque) and isinstance(arguments.state, dict) else {}
    for key, value in _AGREEING.items():
        if given.get(key, value) not in (value, None):
            raise CheckpointError(
                f"the checkpoint was trained with {key} {given[key]!r}, which is not supported.",
                code="checkpoint_unsupported",
                hint=f"Allowed: {value!r}.",
            )
    groups = given.get("num_query_groups") if given.get("group_query_attention") else given.get("num_attention_heads")
    for key, said, expected in (
        ("num_layers", given.get("num_layers"), config.num_layers),
        ("hidden_size", given.get("hidden_size"), config.hidden_size),
        ("num_attention_heads", given.get("num_attention_heads"), config.num_heads),
        ("num_query_groups", groups, config.num_kv_heads),
        ("ffn_hidden_size", given.get("ffn_hidden_size"), config.ffn_size),
        ("swiglu", given.get("swiglu"), config.gated_mlp),
    ):
        if said is not None and said != expected:
            raise CheckpointError(
                f"the checkpoint was trained with {key} {said!r}. Given in config.json: {expected!r}.",
                code="checkpoint_mismatch",
                hint="Write the configuration of this very model.",
            )
