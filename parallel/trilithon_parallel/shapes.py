"""The tensors of a model by canonical name (`placement.py`), and their true shapes. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from trilithon_parallel.config import RETRIEVER_DIR, ModelConfig
from trilithon_parallel.lora.spec import owned_shapes

RETRIEVER = f"{RETRIEVER_DIR}."
"""Begins the names of the tensors of the encoder that is trained beside a reader."""

STRENGTH = "passage_strength"
"""How much a reader's attention follows the probabilities of its passages, [1]."""


def global_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Every canonical tensor of a model and its true shape; a copy is not listed (it is its owner's tensor)."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    if config.position == "learned":
        shapes["model.embed_positions.weight"] = (config.max_context, hidden)
    if config.token_types:
        shapes["model.embed_types.weight"] = (config.token_types, hidden)
    if config.is_seq2seq:
        for stack, layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
            shapes[f"{stack}.relative_bias.weight"] = (config.relative_buckets, config.num_heads)
            for layer in range(layers):
                shapes |= _layer_shapes(f"{stack}.layers.{layer}.", config, has_cross=stack == "decoder")
            shapes |= _norm(f"{stack}.norm", config)
    else:
        if config.norm_order == "post":
            shapes |= _norm("model.embed_norm", config)
        for layer in range(config.num_layers):
            shapes |= _layer_shapes(f"model.layers.{layer}.", config, has_cross=False)
        if config.norm_order == "pre":
            shapes |= _norm("model.norm", config)
    if config.has_head and not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    if config.mlm_head:
        shapes |= {"lm_transform.dense.weight": (hidden, hidden), "lm_transform.dense.bias": (hidden,)}
        shapes |= {**_norm("lm_transform.norm", config), "lm_head.bias": (config.vocab_size,)}
    if (head := config.task_head) is not None:
        if head.has_pooler:
            shapes |= {"pooler.dense.weight": (hidden, hidden), "pooler.dense.bias": (hidden,)}
        if head.kind == "joint_span":
            shapes |= {f"task_head.{end}.weight": (hidden, hidden) for end in ("first", "last")}
            shapes |= {"task_head.first.bias": (hidden,), "task_head.score.weight": (1, hidden)}
        else:
            shapes |= {"task_head.weight": (len(head.labels), hidden), "task_head.bias": (len(head.labels),)}
    if config.lora is not None:
        shapes |= owned_shapes(config, config.lora)
    if config.reads is not None and config.reads.has_strength:
        shapes[STRENGTH] = (1,)
    for folder, model in config.beside.items():
        shapes |= {f"{folder}.{name}": shape for name, shape in global_shapes(model).items()}
    return shapes


def model_of(name: str, config: ModelConfig) -> tuple[str, ModelConfig]:
    """The model that a canonical tensor is of, and what that calls it: the model itself, or one beside it."""
    for folder, model in config.beside.items():
        if name.startswith(f"{folder}."):
            return model_of(name.removeprefix(f"{folder}."), model)
    return name, config


def _layer_shapes(at: str, config: ModelConfig, *, has_cross: bool) -> dict[str, tuple[int, ...]]:
    hidden, width = config.hidden_size, config.num_heads * config.head_dim
    kv_width, ffn = config.num_kv_heads * config.head_dim, config.ffn_size
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.norm_order == "post":
        norms = ["post_attention_layernorm", "output_layernorm"]
    shapes: dict[str, tuple[int, ...]] = {}
    parts: list[tuple[str, int, int, bool]] = []
    for attention in ("self_attn", "cross_attn") if has_cross else ("self_attn",):
        parts += [
            (f"{attention}.q_proj", width, hidden, config.qkv_bias),
            (f"{attention}.k_proj", kv_width, hidden, config.qkv_bias),
            (f"{attention}.v_proj", kv_width, hidden, config.qkv_bias),
            (f"{attention}.o_proj", hidden, width, config.out_bias),
        ]
    parts += [("mlp.gate_proj", ffn, hidden, config.mlp_bias)] if config.gated_mlp else []
    parts += [("mlp.up_proj", ffn, hidden, config.mlp_bias), ("mlp.down_proj", hidden, ffn, config.mlp_bias)]
    for part, rows, columns, has_bias in parts:
        shapes[f"{at}{part}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{at}{part}.bias"] = (rows,)
    for norm in [*norms, "cross_attention_layernorm"] if has_cross else norms:
        shapes |= _norm(at + norm, config)
    return shapes


def _norm(name: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (config.hidden_size,)}
    if config.norm == "layer":
        shapes[f"{name}.bias"] = (config.hidden_size,)
    return shapes
