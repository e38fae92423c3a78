"""What a model is: one frozen description of every supported family, read from a model directory. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trilithon_parallel.fields import Fields, ModelError, read_json
from trilithon_parallel.task_head import KINDS, TaskHead, read_task_head

if TYPE_CHECKING:
    from trilithon_parallel.lora.spec import LoraSpec

__all__ = ["ARCHITECTURES", "Family", "ModelConfig", "ModelError", "Reads", "RopeScaling", "TaskHead", "load_config"]

Family = Literal["llama", "gpt2", "bert", "t5"]

RETRIEVER_DIR, QUERY_DIR = "retriever", "query"
"""Folders of a model directory: an encoder trained beside a reader; one of questions trained beside one of passages."""

# Hugging Face class name -> family. Checkpoints of other heads on the same trunk are listed by their own class name.
ARCHITECTURES: Mapping[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "llama",
    "GPT2LMHeadModel": "gpt2",
    "BertModel": "bert",
    "BertForMaskedLM": "bert",
    **dict.fromkeys(KINDS, "bert"),
    "T5ForConditionalGeneration": "t5",
}


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies stretch beyond the trained context (`linear`, or Llama 3's `llama3`)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_context: int = 8192


@dataclass(frozen=True)
class Reads:
    """
    What is trained beside an encoder-decoder that reads passages (arXiv 2101.00408).

    `retriever`: the encoder whose vectors choose the passages; None where their probabilities are given.
    `has_strength`: a learnable scalar says how much the decoder's attention follows them.
    """

    retriever: ModelConfig | None
    has_strength: bool


@dataclass(frozen=True)
class ModelConfig:
    """
    One model, whatever its family. Sizes are those of the files (unpadded, unsharded).

    `num_layers` counts those of both stacks of an encoder-decoder, of which the first `num_encoder_layers` encode;
    `num_kv_heads` is the number of key/value groups; `max_context` counts tokens (prompt and output together);
    `token_types` is 0 where there is no table of them; `mlm_head`: an encoder with the masked-LM head, whose product
    with the vocabulary is the embedding's; `scale_logits`: hidden states are multiplied by hidden_size^-0.5 before the
    head; `relative_*`: of T5's position buckets; `pooling` and `normalize` matter to encoders alone; `task_head`: what
    an encoder that was made for a task ends in.
    """

    family: Family
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_context: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_order: Literal["pre", "post"]
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    gated_mlp: bool
    position: Literal["rope", "learned", "relative"]
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    token_types: int = 0
    num_encoder_layers: int = 0
    relative_buckets: int = 0
    relative_max_distance: int = 0
    scale_logits: bool = False
    mlm_head: bool = False
    task_head: TaskHead | None = None
    pooling: Literal["mean", "cls"] = "mean"
    normalize: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    decoder_start_id: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lora: LoraSpec | None = None
    """The adapter beside the weights; no file of a model says it."""
    reads: Reads | None = None
    """What is trained beside a reader; no file of a model says it."""
    has_twin: bool = False
    """Whether an encoder of passages is trained with one of questions, of its shape; no file of a model says it."""

    def without_lora(self) -> ModelConfig:
        """The base model alone."""
        return replace(self, lora=None)

    def alone(self) -> ModelConfig:
        """The model without those that are trained beside it."""
        return replace(self, reads=None, has_twin=False)

    @property
    def retriever(self) -> ModelConfig | None:
        """The encoder that is trained beside a reader."""
        return None if self.reads is None else self.reads.retriever

    @property
    def beside(self) -> dict[str, ModelConfig]:
        """Models that are trained with this one, by the folder of its directory that each has for itself."""
        found = {} if self.retriever is None else {RETRIEVER_DIR: self.retriever}
        return {**found, QUERY_DIR: self.alone()} if self.has_twin else found

    @property
    def is_causal(self) -> bool:
        """True for decoders alone, which go on with a text; False for encoders and encoder-decoders."""
        return self.family in ("llama", "gpt2")

    @property
    def is_seq2seq(self) -> bool:
        """True for encoder-decoders."""
        return self.family == "t5"

    @property
    def num_decoder_layers(self) -> int:
        """Layers that decode: all of a decoder, the second stack of an encoder-decoder, none of an encoder."""
        return self.num_layers - self.num_encoder_layers if self.is_causal or self.is_seq2seq else 0

    @property
    def has_head(self) -> bool:
        """True where logits over the vocabulary come out."""
        return self.is_causal or self.is_seq2seq or self.mlm_head

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value group."""
        return self.num_heads // self.num_kv_heads


def load_config(model_dir: Path) -> ModelConfig:
    """
    Read `config.json` (and `generation_config.json`, `1_Pooling/config.json` where present) of a model directory.

    Raises:
        ModelError: the directory or a file is missing or not JSON (`model_not_found`, `model_invalid`), the
            architecture or one of its options is not supported (`model_unsupported`).
    """
    path = Path(model_dir) / "config.json"
    if not Path(model_dir).is_dir():
        raise ModelError(
            f"model directory {str(model_dir)!r} does not exist.",
            code="model_not_found",
            hint="Give a directory with config.json, or fetch one with `trilithon pull`.",
        )
    raw = read_json(path)
    names = raw.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise ModelError(
            f"{path.name} architectures is not supported. Given: {names!r}.",
            code="model_unsupported",
            hint=f"Allowed: one of {', '.join(ARCHITECTURES)}.",
        )
    reader = Fields(raw, path.name)
    generation_path = path.with_name("generation_config.json")
    generation = read_json(generation_path) if generation_path.exists() else {}
    family = ARCHITECTURES[names[0]]
    fields = {"llama": _llama, "gpt2": _gpt2, "bert": _bert, "t5": _t5}[family](reader, names[0])
    if family == "bert":
        fields |= _pooling(path.parent)
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    start = generation.get("decoder_start_token_id", raw.get("decoder_start_token_id", raw.get("pad_token_id")))
    config = ModelConfig(
        family=family,
        architecture=names[0],
        dtype=_dtype(reader),
        bos_id=_optional_id(generation.get("bos_token_id", raw.get("bos_token_id"))),
        eos_ids=tuple(int(i) for i in (eos if isinstance(eos, list) else [eos]) if i is not None),
        pad_id=_optional_id(raw.get("pad_token_id")),
        decoder_start_id=_optional_id(start) if family == "t5" else None,
        **fields,
    )
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{path.name} num_attention_heads must be a multiple of num_key_value_heads. "
            f"Given: {config.num_heads} and {config.num_kv_heads}.",
            hint="The file is broken.",
        )
    return config


def _llama(reader: Fields, architecture: str) -> dict[str, Any]:
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    reader.require("hidden_act", ("silu",), "silu")
    if architecture == "MistralForCausalLM":
        reader.require("sliding_window", (None,), 4096)
    if architecture == "Qwen2ForCausalLM":
        reader.require("use_sliding_window", (False,), False)
    attention_bias = architecture == "LlamaForCausalLM" and reader.flag("attention_bias", False)
    theta, scaling = _rope(reader)
    return {
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden,
        "num_layers": reader.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": reader.size("num_key_value_heads", heads),
        "head_dim": reader.size("head_dim", hidden // heads),
        "ffn_size": reader.size("intermediate_size"),
        "max_context": reader.size("max_position_embeddings"),
        "norm": "rms",
        "norm_eps": reader.number("rms_norm_eps", 1e-6),
        "norm_order": "pre",
        "activation": "silu",
        "gated_mlp": True,
        "position": "rope",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": attention_bias or architecture == "Qwen2ForCausalLM",
        "out_bias": attention_bias,
        "mlp_bias": architecture == "LlamaForCausalLM" and reader.flag("mlp_bias", False),
        "tied_embeddings": reader.flag("tie_word_embeddings", False),
        "token_types": _decoder_types(reader),
    }


def _rope(reader: Fields) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from the older keys (`rope_theta`, `rope_scaling`) or the newer `rope_parameters`."""
    raw = reader.raw
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ModelError(
            f"{reader.where} rope_scaling must be an object or null. Given: {parameters!r}.",
            hint="Repair the file or export the model again.",
        )
    inner = Fields(parameters, f"{reader.where} rope_scaling")
    theta = inner.number("rope_theta", reader.number("rope_theta", 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise ModelError(
            f"{reader.where} rope_scaling.rope_type is not supported. Given: {kind!r}.",
            code="model_unsupported",
            hint="Allowed: 'default', 'linear', 'llama3'.",
        )
    factor = inner.number("factor", 1.0)
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    return theta, RopeScaling(
        "llama3",
        factor,
        inner.number("low_freq_factor", 1.0),
        inner.number("high_freq_factor", 4.0),
        inner.size("original_max_position_embeddings", reader.size("max_position_embeddings")),
    )


def _gpt2(reader: Fields, architecture: str) -> dict[str, Any]:
    hidden, heads = reader.size("n_embd"), reader.size("n_head")
    _divides(reader, hidden, heads, "n_embd", "n_head")
    reader.require("scale_attn_weights", (True,), True)
    reader.require("scale_attn_by_inverse_layer_idx", (False,), False)
    reader.require("add_cross_attention", (False,), False)
    activation = reader.require("activation_function", ("gelu_new", "gelu_pytorch_tanh", "gelu"), "gelu_new")
    return {
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden,
        "num_layers": reader.size("n_layer"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "ffn_size": reader.size("n_inner", 4 * hidden),
        "max_context": reader.size("n_positions"),
        "norm": "layer",
        "norm_eps": reader.number("layer_norm_epsilon", 1e-5),
        "norm_order": "pre",
        "activation": "gelu" if activation == "gelu" else "gelu_tanh",
        "gated_mlp": False,
        "position": "learned",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "tied_embeddings": reader.flag("tie_word_embeddings", True),
        "token_types": _decoder_types(reader),
    }


def _decoder_types(reader: Fields) -> int:
    """Rows of the table that this project may add to a decoder; 0 in files from elsewhere."""
    return 0 if reader.raw.get("type_vocab_size") is None else reader.size("type_vocab_size")


def _bert(reader: Fields, architecture: str) -> dict[str, Any]:
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    _divides(reader, hidden, heads, "hidden_size", "num_attention_heads")
    reader.require("position_embedding_type", ("absolute",), "absolute")
    reader.require("is_decoder", (False,), False)
    activation = reader.require("hidden_act", ("gelu", "gelu_new", "gelu_pytorch_tanh"), "gelu")
    has_head = architecture == "BertForMaskedLM"
    if has_head:
        reader.require("tie_word_embeddings", (True,), True)
    return {
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": hidden,
        "num_layers": reader.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "ffn_size": reader.size("intermediate_size"),
        "max_context": reader.size("max_position_embeddings"),
        "norm": "layer",
        "norm_eps": reader.number("layer_norm_eps", 1e-12),
        "norm_order": "post",
        "activation": "gelu" if activation == "gelu" else "gelu_tanh",
        "gated_mlp": False,
        "position": "learned",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "token_types": reader.size("type_vocab_size", 2),
        "mlm_head": has_head,
        "tied_embeddings": has_head,
        "task_head": read_task_head(reader, architecture),
    }


def _t5(reader: Fields, architecture: str) -> dict[str, Any]:
    heads, encoder_layers = reader.size("num_heads"), reader.size("num_layers")
    reader.require("is_encoder_decoder", (True,), True)
    mlp = reader.require("feed_forward_proj", ("relu", "gated-gelu"), "relu")
    buckets = reader.size("relative_attention_num_buckets", 32)
    distance = reader.size("relative_attention_max_distance", 128)
    # Half of the buckets are of one position each; an encoder has as many for each direction.
    if buckets % 4 or distance <= buckets // 2:
        raise ModelError(
            f"{reader.where} relative_attention_num_buckets must be a multiple of 4 and below twice "
            f"relative_attention_max_distance. Given: {buckets} and {distance}.",
            hint="The file is broken.",
        )
    tied = reader.flag("tie_word_embeddings", True)
    return {
        "vocab_size": reader.size("vocab_size"),
        "hidden_size": reader.size("d_model"),
        "num_layers": encoder_layers + reader.size("num_decoder_layers", encoder_layers),
        "num_encoder_layers": encoder_layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": reader.size("d_kv"),
        "ffn_size": reader.size("d_ff"),
        "max_context": reader.size("n_positions", 512),
        "norm": "rms",
        "norm_eps": reader.number("layer_norm_epsilon", 1e-6),
        "norm_order": "pre",
        "activation": "relu" if mlp == "relu" else "gelu_tanh",
        "gated_mlp": mlp != "relu",
        "position": "relative",
        "relative_buckets": buckets,
        "relative_max_distance": distance,
        "tied_embeddings": tied,
        # T5 1.0 scales, 1.1 doesn't; files say so by tying, newer ones by a key of its own.
        "scale_logits": reader.flag("scale_decoder_outputs", tied),
    }


def _divides(reader: Fields, hidden: int, heads: int, hidden_key: str, heads_key: str) -> None:
    if hidden % heads:
        raise ModelError(
            f"{reader.where} {hidden_key} must be a multiple of {heads_key}. Given: {hidden} and {heads}.",
            hint="The file is broken.",
        )


def _pooling(model_dir: Path) -> dict[str, Any]:
    """Pooling and normalisation of a sentence-transformers directory; mean without normalisation where silent."""
    path = model_dir / "1_Pooling" / "config.json"
    if not path.exists():
        return {}
    raw = read_json(path)
    modes = [key for key, value in raw.items() if key.startswith("pooling_mode_") and value is True]
    pooling = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}.get(modes[0] if modes else "")
    if len(modes) != 1 or pooling is None:
        raise ModelError(
            f"1_Pooling/config.json pooling mode is not supported. Given: {modes!r}.",
            code="model_unsupported",
            hint="Allowed: exactly one of pooling_mode_mean_tokens, pooling_mode_cls_token.",
        )
    modules = model_dir / "modules.json"
    listed = json.loads(modules.read_text("utf-8")) if modules.exists() else []
    return {"pooling": pooling, "normalize": any("Normalize" in str(module.get("type", "")) for module in listed)}


def _dtype(reader: Fields) -> Any:
    key = "dtype" if reader.raw.get("dtype") is not None else "torch_dtype"
    if reader.raw.get(key) is None:
        return "float32"
    return reader.require(key, ("float32", "bfloat16", "float16"), "float32")


def _optional_id(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
