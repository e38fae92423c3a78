"""GGUF files of tiny Llamas, written by the reference writer in the layout of llama.cpp's converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import safetensors.torch
from tiny_tokenizers import CHAT_TEMPLATE

Array = npt.NDArray[np.float32]

TRUNK = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute_rope(rows: Array, heads: int) -> Array:
    """llama.cpp's order of query and key rows, from its definition: row 2i + j of a head was row j * C/2 + i."""
    channels = rows.shape[0] // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(channels // 2):
            for j in range(2):
                out[head * channels + 2 * i + j] = rows[head * channels + j * (channels // 2) + i]
    return out


def write_gguf(
    path: Path,
    source: Path,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    fields: dict[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
    tensors: dict[str, Array] | None = None,
) -> Path:
    """A GGUF file of a tiny Llama directory, by the reference writer, as llama.cpp's converter lays it out."""
    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    special = {entry["content"] for entry in tokenizer["added_tokens"]}
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, Any] = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.dimension_count": config["head_dim"],
        "general.license": "apache-2.0",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    for key, value in (values | (fields or {})).items():
        if key in leave_out:
            continue
        add: dict[type, Any] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_array)(key, value)
    for name, tensor in safetensors.torch.load_file(source / "model.safetensors").items():
        stem, _, part = name.rpartition(".")
        layer = stem.split(".")
        ours = TRUNK.get(stem) or f"blk.{layer[2]}.{LAYER['.'.join(layer[3:])]}"
        values_f32: Array = tensor.float().numpy()
        if stem.endswith("q_proj"):
            values_f32 = permute_rope(values_f32, config["num_attention_heads"])
        if stem.endswith("k_proj"):
            values_f32 = permute_rope(values_f32, config["num_key_value_heads"])
        used = kind if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{ours}.{part}", gguf.quantize(values_f32, used), raw_dtype=used)
    for name, extra in (tensors or {}).items():
        writer.add_tensor(name, extra)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
