"""
Model directories out: canonical tensors under the names that `transformers`, vLLM and our own loader read.

The name table is the loader's, run backwards: transposes are transposed again, parts are put side by side, padding and
tied copies stay behind.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.grid import Grid
from trilithon_parallel.placement import global_shapes, local_slice, stage_names
from trilithon_parallel.weights.directory import MAX_SHARD_BYTES, write_shards
from trilithon_parallel.weights.names import Source, file_shape, file_slices, name_table
from trilithon_parallel.weights.safetensors_io import TensorSpec

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""All that may say how a text is cut."""

SIDE_FILES = (
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
"""What a model needs beside weights and config; copied as it is."""


def export_model(
    state: Mapping[str, torch.Tensor],
    config: ModelConfig,
    out_dir: Path,
    *,
    side_files_from: Path | None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """
    Write a model directory in one step: it is there whole or not at all.

    Args:
        state: every tensor of `placement.global_shapes`, whole, unpadded, by canonical name; see `full_state`.
        config: of the model. What is written says the same, in Hugging Face's words.
        out_dir: must not exist yet.
        side_files_from: a model directory whose tokenizer, chat template and pooling files go along; None for none.
        dtype: of the weights written; None keeps each tensor's own.
        max_shard_bytes: weights above this are split over several files with an index.
    Raises:
        ModelError: `export_exists`, or `weights_missing`, `weights_extra`, `weights_shape` for a state that is not
            this config's.
    """
    if out_dir.exists():
        raise ModelError(
            f"{out_dir.name} exists already, and exports never overwrite.",
            code="export_exists",
            hint="Name a new directory, or remove that one.",
        )
    _check_state(state, config)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".tmp-{out_dir.name}-") as temporary:
        model_dir = Path(temporary) / "model"
        model_dir.mkdir()
        dtypes = {name: dtype or tensor.dtype for name, tensor in state.items()}
        main = dtypes["model.embed_tokens.weight"]
        _write_json(model_dir / "config.json", hub_config(config, dtype=main))
        if config.is_causal or config.is_seq2seq:
            _write_json(model_dir / "generation_config.json", _special_ids(config))
        for name in SIDE_FILES if side_files_from is not None else ():
            assert side_files_from is not None
            if (side_files_from / name).is_file():
                (model_dir / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(side_files_from / name, model_dir / name)
        _write_weights(state, config, model_dir, dtypes=dtypes, max_shard_bytes=max_shard_bytes)
        _sync(model_dir)
        model_dir.rename(out_dir)
    _sync(out_dir.parent)


def full_state(stages: Iterable[tuple[nn.Module, Grid]], config: ModelConfig) -> dict[str, torch.Tensor]:
    """
    Put the stages of every (tp, pp) rank together again: whole tensors on the CPU, padding removed.

    Args:
        stages: each rank's stage with its grid, in any order, together covering the model; before `prepare()`.
    Returns:
        What `export_model` takes.
    """
    shapes = global_shapes(config)
    state: dict[str, torch.Tensor] = {}
    for stage, grid in stages:
        parameters = dict(stage.named_parameters())
        for name in stage_names(config, pp=grid.pp.size, pp_rank=grid.pp.rank, counts=grid.layer_counts):
            if name not in shapes:
                continue  # the last stage's copy of a tied head
            place = local_slice(name, shapes[name], config=config, tp=grid.tp.size, tp_rank=grid.tp.rank)
            parameter = parameters[name].detach()
            if name not in state:
                state[name] = torch.empty(shapes[name], dtype=parameter.dtype)
            corner = tuple(slice(0, size) for size in place.source_shape)
            state[name][place.slices] = parameter[corner].cpu()
    return state


def hub_config(config: ModelConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of a model, as Hugging Face spells it."""
    write = {"llama": _llama, "gpt2": _gpt2, "bert": _bert, "t5": _t5}[config.family]
    named = str(dtype).removeprefix("torch.")
    types = {"type_vocab_size": config.token_types} if config.token_types else {}
    return {**write(config), **types, **_special_ids(config), "torch_dtype": named}


def _llama(config: ModelConfig) -> dict[str, Any]:
    document: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": config.architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_embeddings,
    }
    if config.architecture == "LlamaForCausalLM":
        document |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    if config.architecture == "MistralForCausalLM":
        document["sliding_window"] = None
    if config.architecture == "Qwen2ForCausalLM":
        document["use_sliding_window"] = False
    if (scaling := config.rope_scaling) is not None:
        document["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            document["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_context,
            }
    return document


def _gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.ffn_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_context,
        "n_ctx": config.max_context,
        "activation_function": _activation(config),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
    }


def _bert(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": [config.architecture],
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_context,
        "hidden_act": _activation(config),
        "layer_norm_eps": config.norm_eps,
        "position_embedding_type": "absolute",
        **({} if config.task_head is None else config.task_head.hub_fields()),
    }


def _t5(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": [config.architecture],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": config.head_dim,
        "d_ff": config.ffn_size,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "n_positions": config.max_context,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "feed_forward_proj": "gated-gelu" if config.gated_mlp else "relu",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "scale_decoder_outputs": config.scale_logits,
    }


def _activation(config: ModelConfig) -> str:
    return {"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.activation]


def _special_ids(config: ModelConfig) -> dict[str, Any]:
    ids: dict[str, Any] = {}
    if config.bos_id is not None:
        ids["bos_token_id"] = config.bos_id
    if config.eos_ids:
        ids["eos_token_id"] = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids)
    if config.pad_id is not None:
        ids["pad_token_id"] = config.pad_id
    if config.decoder_start_id is not None:
        ids["decoder_start_token_id"] = config.decoder_start_id
    return ids


def _check_state(state: Mapping[str, torch.Tensor], config: ModelConfig) -> None:
    shapes = global_shapes(config)
    for name in [*shapes, *state]:
        if name not in state:
            raise ModelError(f"export lacks tensor {name}.", code="weights_missing", hint="Give the whole model.")
        if name not in shapes:
            raise ModelError(
                f"export tensor {name} has no place in this model.",
                code="weights_extra",
                hint="Leave it out; a tied head is not exported.",
            )
        if tuple(state[name].shape) != shapes[name]:
            raise ModelError(
                f"export tensor {name} must have shape {list(shapes[name])}. Given: {list(state[name].shape)}.",
                code="weights_shape",
                hint="Remove padding first (`full_state` does).",
            )


def _write_weights(
    state: Mapping[str, torch.Tensor],
    config: ModelConfig,
    model_dir: Path,
    *,
    dtypes: Mapping[str, torch.dtype],
    max_shard_bytes: int,
) -> None:
    table = name_table(config)
    parts: dict[str, list[tuple[str, Source]]] = {}
    for name, source in table.sources.items():
        parts.setdefault(table.spellings(source.file_name)[0], []).append((name, source))
    specs = [
        TensorSpec(file_name, dtypes[held[0][0]], file_shape(held[0][1], state[held[0][0]].shape))
        for file_name, held in parts.items()
    ]

    def produce(spec: TensorSpec) -> torch.Tensor:
        out = torch.empty(spec.shape, dtype=spec.dtype)
        for name, source in parts[spec.name]:
            tensor = state[name]
            where, transpose = file_slices(source, tensor.shape, tuple(slice(0, size) for size in tensor.shape))
            out[where] = (tensor.t() if transpose else tensor).to(device="cpu", dtype=spec.dtype)
        return out

    write_shards(model_dir, specs, produce, max_bytes=max_shard_bytes)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _sync(directory: Path) -> None:
    """Bring directory entries to the disk; the files' own bytes are there."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
