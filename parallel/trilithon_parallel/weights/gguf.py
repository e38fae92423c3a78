"""
A GGUF file into a model directory: weights dequantised once, to safetensors; config, tokenizer and chat template.

What comes out *is* the model from then on: a quantised file is lossy, and its dequantised numbers are what every
layout, every test and every finetune starts from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trilithon_parallel.config import ModelError
from trilithon_parallel.weights.directory import write_shards
from trilithon_parallel.weights.gguf_file import GgufFile
from trilithon_parallel.weights.gguf_tokenizer import special_ids, write_tokenizer
from trilithon_parallel.weights.safetensors_io import TensorSpec

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_TRUNK = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def import_gguf(
    path: Path,
    out_dir: Path,
    *,
    dtype: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """
    Write the model directory of a GGUF file of the Llama architecture.

    Args:
        path: the GGUF file, version 2 or 3, any quantisation that the `gguf` package can undo.
        out_dir: an existing, empty directory; `transformers` loads what is written there.
        dtype: of the weights written: float32 (exactly what the file says) or bfloat16 (half the size).
        progress: called with (bytes done, bytes in all) of the weights written.
    Raises:
        ModelError: `gguf_truncated`, `gguf_invalid` or `gguf_unsupported`, naming what and where.
    """
    if dtype not in DTYPES:
        raise ModelError(
            f"dtype must be one of {', '.join(DTYPES)}. Given: {dtype!r}.", code="dtype_invalid", hint="Change it."
        )
    with GgufFile(path) as file:
        config = _config(file)
        config["torch_dtype"] = dtype
        names = _names(file)
        config["tie_word_embeddings"] = "lm_head.weight" not in names
        _write_json(out_dir / "config.json", config)
        ids = special_ids(file.metadata)
        _write_json(out_dir / "generation_config.json", {"_from_model_config": True, **ids})
        write_tokenizer(file.metadata, out_dir, max_context=config["max_position_embeddings"])
        _write_weights(file, names, config, out_dir, dtype=DTYPES[dtype], progress=progress)


def unpermute_rope(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """
    Undo the row order that llama.cpp gives query and key weights.

    It rotates neighbouring pairs (x0, x1), (x2, x3) ..., Hugging Face the halves (x0, x[C/2]), ...: a head's rows come
    interleaved, and go back to first half, second half.

    >>> unpermute_rope(np.array([0.0, 2.0, 1.0, 3.0], dtype=np.float32), 1).tolist()
    [0.0, 1.0, 2.0, 3.0]

    Args:
        rows: [heads * C, ...], a weight or a bias.
        heads: of this tensor: query heads, or key/value groups.
    Source: `permute` of llama.cpp's convert_hf_to_gguf.py, inverted.
    """
    channels = rows.shape[0] // heads
    split = rows.reshape(heads, channels // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def _config(file: GgufFile) -> dict[str, Any]:
    """The config.json of the file, in Hugging Face's words."""
    read = _Metadata(file)
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise read.unsupported("general.architecture", architecture, "'llama'")
    if (experts := file.metadata.get("llama.expert_count", 0)) != 0:
        raise read.unsupported("llama.expert_count", experts, "0 (mixtures of experts are not supported)")
    hidden, heads = read.size("llama.embedding_length"), read.size("llama.attention.head_count")
    if heads > hidden:
        raise read.unsupported("llama.attention.head_count", heads, f"at most the hidden size, {hidden}")
    head_dim = read.size("llama.attention.key_length", hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if read.size(key, head_dim) != head_dim:
            raise read.unsupported(key, file.metadata[key], f"the head's size, {head_dim}")
    context = read.size("llama.context_length")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": read.size("llama.feed_forward_length"),
        "num_hidden_layers": read.size("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.size("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "vocab_size": _vocab_size(file),
        "hidden_act": "silu",
        "rms_norm_eps": read.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": read.number("llama.rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        **special_ids(file.metadata),
    }
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    if scaling == "linear":
        factor = read.number("llama.rope.scaling.factor")
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif scaling != "none":
        raise read.unsupported("llama.rope.scaling.type", scaling, "'none', 'linear'")
    return config


def _vocab_size(file: GgufFile) -> int:
    """Rows of the embedding: the truth about the vocabulary, whatever else the file says."""
    embedding = file.tensors.get("token_embd.weight")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(
            f"{file.path.name} must hold a matrix token_embd.weight.", code="gguf_invalid", hint="Download it again."
        )
    rows = embedding.shape[0]
    if isinstance(tokens, list) and len(tokens) > rows:
        raise ModelError(
            f"{file.path.name} token_embd.weight must have a row for each of {len(tokens)} tokens. Given: {rows}.",
            code="gguf_invalid",
            hint="Download it again.",
        )
    return rows


def _names(file: GgufFile) -> dict[str, str]:
    """Hugging Face name -> GGUF name, for every tensor; one without a place is an error."""
    names: dict[str, str] = {}
    for name in file.tensors:
        stem, _, kind = name.rpartition(".")
        parts = stem.split(".", 2)
        if stem in _TRUNK:
            names[f"{_TRUNK[stem]}.{kind}"] = name
        elif len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in _LAYER:
            names[f"model.layers.{int(parts[1])}.{_LAYER[parts[2]]}.{kind}"] = name
        elif name == "rope_freqs.weight":
            raise ModelError(
                f"{file.path.name} tensor {name} scales each rotary frequency by its own factor, which config.json "
                "cannot say.",
                code="gguf_unsupported",
                hint="Pull the model's safetensors directory instead.",
            )
        else:
            raise ModelError(
                f"{file.path.name} tensor {name} has no place in a Llama model.",
                code="gguf_unsupported",
                hint="Pull the model's safetensors directory instead.",
            )
    return names


def _write_weights(
    file: GgufFile,
    names: Mapping[str, str],
    config: Mapping[str, Any],
    out_dir: Path,
    *,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None,
) -> None:
    specs = [TensorSpec(name, dtype, file.tensors[source].shape) for name, source in names.items()]
    total, done = sum(spec.num_bytes for spec in specs), 0

    def produce(spec: TensorSpec) -> torch.Tensor:
        nonlocal done
        values = file.dequantise(names[spec.name])
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".self_attn.{part}." in spec.name:
                rows = config[heads] * config["head_dim"]
                if len(values) != rows or config["head_dim"] % 2:
                    raise ModelError(
                        f"{file.path.name} tensor {names[spec.name]} must have {config[heads]} heads of "
                        f"{config['head_dim']} rows, an even number. Given: {len(values)} rows.",
                        code="gguf_invalid",
                        hint="The file is broken: download it again.",
                    )
                values = unpermute_rope(values, config[heads])
        tensor = torch.from_numpy(values)
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"{file.path.name} tensor {names[spec.name]} must hold finite numbers. Given: NaN or infinity.",
                code="weights_nonfinite",
                hint="The file is broken: download it again.",
            )
        done += spec.num_bytes
        if progress is not None:
            progress(done, total)
        return tensor

    write_shards(out_dir, specs, produce)


class _Metadata:
    """Typed access to metadata: a missing or odd value names the file and the key."""

    def __init__(self, file: GgufFile) -> None:
        self._metadata, self._file = file.metadata, file.path.name

    def size(self, key: str, default: int | None = None) -> int:
        value = self._metadata.get(key, default)
        if type(value) is not int or not 0 < value < 2**31:
            raise ModelError(
                f"{self._file} {key} must be a positive whole number. Given: {value!r:.100}.",
                code="gguf_invalid",
                hint="A list here means that layers differ in size, which is not supported."
                if isinstance(value, list)
                else "Download the file again.",
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._metadata.get(key, default)
        if not isinstance(value, float) or not 0 < value < 1e12:
            raise ModelError(
                f"{self._file} {key} must be a positive number. Given: {value!r:.100}.",
                code="gguf_invalid",
                hint="Download the file again.",
            )
        # Stored as float32; the shortest decimal that rounds to it is the number that was meant (1e-05).
        return float(str(np.float32(value)))

    def unsupported(self, key: str, value: object, allowed: str) -> ModelError:
        return ModelError(
            f"{self._file} {key} is not supported. Given: {value!r:.100}. Allowed: {allowed}.",
            code="gguf_unsupported",
            hint="Pull a model of a supported architecture.",
        )


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
