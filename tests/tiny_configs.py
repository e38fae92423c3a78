"""Descriptions of small models of every family, without files: tests change sizes with `dataclasses.replace`."""

from __future__ import annotations

from dataclasses import replace

from trilithon_parallel.config import ModelConfig

# 3 groups of 3 heads and odd sizes, which no tp divides.
LLAMA = ModelConfig(
    family="llama",
    architecture="LlamaForCausalLM",
    vocab_size=391,
    hidden_size=48,
    num_layers=4,
    num_heads=9,
    num_kv_heads=3,
    head_dim=16,
    ffn_size=100,
    max_context=64,
    norm="rms",
    norm_eps=1e-5,
    norm_order="pre",
    activation="silu",
    gated_mlp=True,
    position="rope",
    tied_embeddings=True,
)
GPT2 = replace(
    LLAMA,
    family="gpt2",
    architecture="GPT2LMHeadModel",
    num_heads=4,
    num_kv_heads=4,
    head_dim=12,
    ffn_size=192,
    norm="layer",
    activation="gelu_tanh",
    gated_mlp=False,
    position="learned",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
BERT = replace(
    GPT2,
    family="bert",
    architecture="BertModel",
    activation="gelu",
    norm_eps=1e-12,
    norm_order="post",
    token_types=2,
    tied_embeddings=False,
)
MASKED_LM = replace(BERT, architecture="BertForMaskedLM", tied_embeddings=True, mlm_head=True)
T5 = replace(
    LLAMA,
    family="t5",
    architecture="T5ForConditionalGeneration",
    num_encoder_layers=2,
    num_heads=4,
    num_kv_heads=4,
    activation="relu",
    gated_mlp=False,
    position="relative",
    relative_buckets=8,
    relative_max_distance=20,
    scale_logits=True,
)
