"""
Tiny random models, written as model directories that `transformers` loads too. Needs no torch and no transformers.

    from tiny import tiny_llama
    model_dir = tiny_llama(tmp_path / "model", layers=2, heads=9, groups=3, hidden=72)

Weights depend on the arguments and the seed alone, so two processes that call a function alike hold equal files.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_tokenizers import (
    END_OF_TEXT,
    write_bpe_tokenizer,
    write_json,
    write_metaspace_tokenizer,
    write_wordpiece_tokenizer,
)

Array = npt.NDArray[np.float32]


def tiny_llama(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    groups: int = 2,
    ffn: int = 96,
    vocab: int = 384,
    context: int = 512,
    head_dim: int | None = None,
    tied: bool = True,
    rope_theta: float = 10000.0,
    eos_ids: Sequence[int] = (2,),
    chat_template: bool = True,
    dtype: str = "float32",
    seed: int = 0,
    scale: float = 0.5,
    shards: int = 1,
    config: dict[str, Any] | None = None,
) -> Path:
    """
    A Llama of random weights with a byte-level BPE tokenizer and a chat template.

    Args:
        path: directory to write, made if it is missing.
        layers, hidden, heads, groups, ffn, vocab, context, head_dim: the shape; `groups` = key/value heads.
            A vocabulary below 260 knows only ASCII.
        tied: whether the head is the embedding.
        eos_ids: end tokens, written into generation_config.json.
        dtype: of the file: float32, bfloat16 or float16.
        seed, scale: of the weights; with `scale` 0.5 greedy text differs from step to step.
        shards: number of safetensors files; above 1 with an index.
        config: further keys of config.json, for example `rope_scaling`.
    Returns:
        `path`.
    """
    head_dim = head_dim if head_dim is not None else hidden // heads
    draw = _Draw(seed, scale)
    tensors = {"model.embed_tokens.weight": draw.matrix("embed", vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes = {
            "self_attn.q_proj": (heads * head_dim, hidden),
            "self_attn.k_proj": (groups * head_dim, hidden),
            "self_attn.v_proj": (groups * head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * head_dim),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        for name, (rows, columns) in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = draw.matrix(f"{prefix}.{name}", rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = draw.gain(f"{prefix}.{name}", hidden)
    tensors["model.norm.weight"] = draw.gain("norm", hidden)
    if not tied:
        tensors["lm_head.weight"] = draw.matrix("head", vocab, hidden)
    document = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": eos_ids[0],
        "torch_dtype": dtype,
    }
    _write_model(path, document | (config or {}), tensors, dtype=dtype, shards=shards)
    write_json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": list(eos_ids)})
    write_bpe_tokenizer(path, vocab=vocab, context=context, chat_template=chat_template)
    return path


def tiny_gpt2(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    vocab: int = 384,
    context: int = 512,
    prefix: str = "transformer.",
    dtype: str = "float32",
    seed: int = 0,
    scale: float = 0.5,
    shards: int = 1,
    config: dict[str, Any] | None = None,
) -> Path:
    """
    A GPT-2 of random weights: fused attention matrices stored transposed (Conv1D), learned positions, tied head.

    `prefix` is "transformer." as `transformers` writes it, or "" as the first published files have it.
    """
    draw = _Draw(seed, scale)
    tensors = {"wte.weight": draw.matrix("embed", vocab, hidden), "wpe.weight": draw.matrix("wpe", context, hidden)}
    for layer in range(layers):
        shapes = {
            "attn.c_attn": (hidden, 3 * hidden),
            "attn.c_proj": (hidden, hidden),
            "mlp.c_fc": (hidden, 4 * hidden),
            "mlp.c_proj": (4 * hidden, hidden),
        }
        for name, (rows, columns) in shapes.items():
            full = f"h.{layer}.{name}"
            tensors[f"{full}.weight"] = np.ascontiguousarray(draw.matrix(full, columns, rows).T)
            tensors[f"{full}.bias"] = draw.bias(full, columns)
        for name in ("ln_1", "ln_2"):
            tensors[f"h.{layer}.{name}.weight"] = draw.gain(f"h.{layer}.{name}", hidden)
            tensors[f"h.{layer}.{name}.bias"] = draw.bias(f"h.{layer}.{name}", hidden)
    tensors["ln_f.weight"] = draw.gain("ln_f", hidden)
    tensors["ln_f.bias"] = draw.bias("ln_f", hidden)
    document = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": context,
        "n_ctx": context,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": dtype,
    }
    named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    _write_model(path, document | (config or {}), named, dtype=dtype, shards=shards)
    write_json(path / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    write_bpe_tokenizer(path, vocab=vocab, context=context, chat_template=False, bos=END_OF_TEXT, eos=END_OF_TEXT)
    return path


def tiny_bert(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    ffn: int = 96,
    vocab: int = 256,
    context: int = 128,
    token_types: int = 2,
    prefix: str = "",
    pooler: bool = True,
    mlm_head: bool = False,
    sentence_encoder: bool = True,
    dtype: str = "float32",
    seed: int = 0,
    scale: float = 0.5,
    shards: int = 1,
    config: dict[str, Any] | None = None,
) -> Path:
    """
    A BERT encoder of random weights with a WordPiece tokenizer.

    `pooler` writes the unused pooling head, as real files have it; `sentence_encoder` adds the files that say "mean
    pooling, then normalise" in the layout of sentence-transformers. `mlm_head` makes it a BertForMaskedLM, whose trunk
    has the prefix "bert."; else `prefix` is "" or "bert.".
    """
    draw = _Draw(seed, scale)
    tensors = {
        "embeddings.word_embeddings.weight": draw.matrix("word", vocab, hidden),
        "embeddings.position_embeddings.weight": draw.matrix("position", context, hidden),
        "embeddings.token_type_embeddings.weight": draw.matrix("type", token_types, hidden),
        "embeddings.LayerNorm.weight": draw.gain("embed_norm", hidden),
        "embeddings.LayerNorm.bias": draw.bias("embed_norm", hidden),
    }
    for layer in range(layers):
        start = f"encoder.layer.{layer}"
        shapes = {
            "attention.self.query": (hidden, hidden),
            "attention.self.key": (hidden, hidden),
            "attention.self.value": (hidden, hidden),
            "attention.output.dense": (hidden, hidden),
            "intermediate.dense": (ffn, hidden),
            "output.dense": (hidden, ffn),
        }
        for name, (rows, columns) in shapes.items():
            tensors[f"{start}.{name}.weight"] = draw.matrix(f"{start}.{name}", rows, columns)
            tensors[f"{start}.{name}.bias"] = draw.bias(f"{start}.{name}", rows)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            tensors[f"{start}.{name}.weight"] = draw.gain(f"{start}.{name}", hidden)
            tensors[f"{start}.{name}.bias"] = draw.bias(f"{start}.{name}", hidden)
    if pooler:
        tensors["pooler.dense.weight"] = draw.matrix("pooler", hidden, hidden)
        tensors["pooler.dense.bias"] = draw.bias("pooler", hidden)
    named = {f"{'bert.' if mlm_head else prefix}{name}": tensor for name, tensor in tensors.items()}
    if mlm_head:
        transform = "cls.predictions.transform"
        named |= {
            f"{transform}.dense.weight": draw.matrix(transform, hidden, hidden),
            f"{transform}.dense.bias": draw.bias(transform, hidden),
            f"{transform}.LayerNorm.weight": draw.gain(f"{transform}.norm", hidden),
            f"{transform}.LayerNorm.bias": draw.bias(f"{transform}.norm", hidden),
            "cls.predictions.bias": draw.bias("predictions", vocab),
        }
    document = {
        "architectures": ["BertForMaskedLM" if mlm_head else "BertModel"],
        "model_type": "bert",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "max_position_embeddings": context,
        "type_vocab_size": token_types,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "position_embedding_type": "absolute",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": 0,
        "torch_dtype": dtype,
    }
    _write_model(path, document | (config or {}), named, dtype=dtype, shards=shards)
    write_wordpiece_tokenizer(path, vocab=vocab, context=context)
    if sentence_encoder:
        parts = ("Transformer", "Pooling", "Normalize")
        folders = ("", "1_Pooling", "2_Normalize")
        modules = [
            {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{part}"}
            for i, (part, folder) in enumerate(zip(parts, folders, strict=True))
        ]
        write_json(path / "modules.json", modules)
        (path / "1_Pooling").mkdir(exist_ok=True)
        write_json(
            path / "1_Pooling" / "config.json",
            {"word_embedding_dimension": hidden, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
        )
    return path


def tiny_t5(
    path: Path,
    *,
    encoder_layers: int = 2,
    decoder_layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    head_dim: int = 16,
    ffn: int = 96,
    vocab: int = 256,
    buckets: int = 32,
    gated: bool = False,
    tied: bool = True,
    scale: float = 0.5,
    seed: int = 0,
    tokenizer: str = "",
    config: dict[str, Any] | None = None,
) -> Path:
    """
    An encoder-decoder of random weights: T5 1.0, or 1.1 with `gated=True, tied=False`.

    Args:
        tokenizer: `metaspace`, as T5's own; `wordpiece`, as BERT's, whose [SEP] ends answers; empty: none is written.
    """
    draw = _Draw(seed, scale)
    tensors = {"shared.weight": draw.matrix("shared", vocab, hidden)}
    for stack, layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        attentions = ["SelfAttention"] if stack == "encoder" else ["SelfAttention", "EncDecAttention"]
        for layer in range(layers):
            start = f"{stack}.block.{layer}.layer"
            for number, kind in enumerate(attentions):
                for part in "qkvo":
                    full = f"{start}.{number}.{kind}.{part}"
                    size = (hidden, heads * head_dim) if part == "o" else (heads * head_dim, hidden)
                    # Scores are not divided by sqrt(head_dim), so queries are.
                    shrink = np.float32(head_dim**-0.5 if part == "q" else 1)
                    tensors[f"{full}.weight"] = draw.matrix(full, *size) * shrink
            for part in ("wi_0", "wi_1", "wo") if gated else ("wi", "wo"):
                full = f"{start}.{len(attentions)}.DenseReluDense.{part}"
                tensors[f"{full}.weight"] = draw.matrix(full, *((hidden, ffn) if part == "wo" else (ffn, hidden)))
            for number in range(len(attentions) + 1):
                tensors[f"{start}.{number}.layer_norm.weight"] = draw.gain(f"{start}.{number}", hidden)
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        tensors[f"{table}.weight"] = draw.matrix(table, buckets, heads)
        tensors[f"{stack}.final_layer_norm.weight"] = draw.gain(f"{stack}.final", hidden)
    if not tied:
        tensors["lm_head.weight"] = draw.matrix("head", vocab, hidden)
    document = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": vocab,
        "d_model": hidden,
        "d_kv": head_dim,
        "d_ff": ffn,
        "num_layers": encoder_layers,
        "num_decoder_layers": decoder_layers,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": tied,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 3 if tokenizer == "wordpiece" else 1,
    }
    _write_model(path, document | (config or {}), tensors, dtype="float32", shards=1)
    if tokenizer == "metaspace":
        write_metaspace_tokenizer(path, vocab=vocab)
    elif tokenizer == "wordpiece":
        write_wordpiece_tokenizer(path, vocab=vocab, context=512)
    return path


class _Draw:
    """Random tensors, each from its own generator, so that no tensor depends on another one."""

    def __init__(self, seed: int, scale: float) -> None:
        self._seed, self._scale = seed, scale

    def _normal(self, name: str, shape: tuple[int, ...]) -> Array:
        generator = np.random.Generator(np.random.PCG64([self._seed, zlib.crc32(name.encode())]))
        return generator.standard_normal(shape, dtype=np.float32)

    def matrix(self, name: str, rows: int, columns: int) -> Array:
        # Divided by sqrt(columns), then widened: activations keep their size and attention still has opinions.
        return self._normal(name, (rows, columns)) * np.float32(4 * self._scale / columns**0.5)

    def gain(self, name: str, size: int) -> Array:
        return np.float32(1) + self._normal(f"{name}.gain", (size,)) * np.float32(0.1)

    def bias(self, name: str, size: int) -> Array:
        return self._normal(f"{name}.bias", (size,)) * np.float32(0.1)


def write_safetensors(path: Path, tensors: dict[str, Array], *, dtype: str = "float32") -> None:
    """Write a safetensors file, casting to `dtype`; bfloat16 rounds to nearest even."""
    encode = {"float32": _f32_bytes, "float16": _f16_bytes, "bfloat16": _bf16_bytes}[dtype]
    label = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks: list[bytes] = []
    offset = 0
    for name, tensor in tensors.items():
        chunks.append(encode(tensor))
        end = offset + len(chunks[-1])
        header[name] = {"dtype": label, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(chunks))


def _f32_bytes(tensor: Array) -> bytes:
    return np.ascontiguousarray(tensor, dtype="<f4").tobytes()


def _f16_bytes(tensor: Array) -> bytes:
    return np.ascontiguousarray(tensor, dtype="<f2").tobytes()


def _bf16_bytes(tensor: Array) -> bytes:
    bits = np.ascontiguousarray(tensor, dtype="<f4").view("<u4").astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2").tobytes()


def _write_model(path: Path, config: dict[str, Any], tensors: dict[str, Array], *, dtype: str, shards: int) -> None:
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", config)
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors, dtype=dtype)
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensor for i, (name, tensor) in enumerate(tensors.items()) if i % shards == shard}
        write_safetensors(path / file, part, dtype=dtype)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.size for tensor in tensors.values()) * (4 if dtype == "float32" else 2)
    write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
