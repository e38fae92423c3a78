"""The tokenizer inside a GGUF file, as the files that `tokenizers` and `transformers` read. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeGuard

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from trilithon_parallel.config import ModelError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""`tokenizer.ggml.token_type`, numbered as in llama.cpp."""

# The pattern of Llama 3: words with one leading sign, numbers of up to three digits, signs, line ends, spaces.
_LLAMA3_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# How a text is cut before merging, by `tokenizer.ggml.pre`. Numbers are llama.cpp's `llama_vocab_pre_type`.
_SINGLE_DIGITS: Final = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell"})
_PLAIN: Final = frozenset({"gpt-2", "mpt", "olmo", "jais"})
_LLAMA3: Final = frozenset({"llama-bpe", "llama3", "llama-v3"})


def write_tokenizer(metadata: Mapping[str, Any], out_dir: Path, *, max_context: int) -> None:
    """
    Write tokenizer.json, tokenizer_config.json and, where the file has one, chat_template.jinja.

    Args:
        metadata: of the GGUF file (`tokenizer.*` keys).
        out_dir: an existing directory.
        max_context: tokens, for `model_max_length`.
    Raises:
        ModelError: the tokenizer is of a kind that is not converted, or its lists do not fit together.
    """
    tokens, types = _vocabulary(metadata)
    tokenizer = _byte_level_bpe(metadata, tokens)
    added = [i for i, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED)]
    for token_id in added:
        token = AddedToken(tokens[token_id], normalized=False, special=types[token_id] == _CONTROL)
        (tokenizer.add_special_tokens if types[token_id] == _CONTROL else tokenizer.add_tokens)([token])
    if tokenizer.get_vocab_size() != len(tokens):
        raise _invalid(f"tokenizer.ggml.tokens must be {len(tokens)} different texts. Given: a repeated one")
    bos = _special(metadata, "bos", tokens)
    if metadata.get("tokenizer.ggml.add_bos_token") is True and bos is not None:
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos} $A",
                    pair=f"{bos} $A {bos}:1 $B:1",
                    special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])],
                ),
            ]
        )
    (out_dir / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_context,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": metadata.get("tokenizer.ggml.add_space_prefix", False),
        "bos_token": bos,
        "eos_token": _special(metadata, "eos", tokens),
        "unk_token": _special(metadata, "unknown", tokens),
        "pad_token": _special(metadata, "padding", tokens),
    }
    named = {value for value in config.values() if isinstance(value, str)}
    config["additional_special_tokens"] = [tokens[i] for i in added if types[i] == _CONTROL and tokens[i] not in named]
    document = json.dumps(config, indent=2, ensure_ascii=False)
    (out_dir / "tokenizer_config.json").write_text(document + "\n", encoding="utf-8")
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        # newline="": the template is text that the model was trained on, to the byte.
        (out_dir / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` (a list where turns end otherwise than texts) and `pad_token_id`, where given."""
    found: dict[str, Any] = {}
    for ours, theirs in (("bos_token_id", "bos"), ("pad_token_id", "padding")):
        value = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if type(value) is int:
            found[ours] = value
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ids = list(dict.fromkeys(item for item in ends if type(item) is int))
    if ids:
        found["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    return found


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Token texts and types, checked against each other."""
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ModelError(
            f"GGUF tokenizer.ggml.model is not converted. Given: {model!r}. Allowed: 'gpt2' (byte-level BPE).",
            code="gguf_unsupported",
            hint="Pull the model's safetensors directory instead.",
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not _all_of(tokens, str) or not tokens:
        raise _invalid("tokenizer.ggml.tokens must be a list of texts")
    types = metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not _all_of(types, int) or len(types) != len(tokens):
        raise _invalid(f"tokenizer.ggml.token_type must be {len(tokens)} numbers, one for each token")
    return tokens, types


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    merges = metadata.get("tokenizer.ggml.merges")
    if not _all_of(merges, str):
        raise _invalid("tokenizer.ggml.merges must be a list of texts")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    for pair in pairs:
        if len(pair) != 2 or not {pair[0], pair[1], "".join(pair)} <= vocabulary.keys():
            raise _invalid(f"tokenizer.ggml.merges must join two tokens into a third. Given: {' '.join(pair)!r:.100}")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in _LLAMA3))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", False) is True
    if pre in _SINGLE_DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
        )
    elif pre in _PLAIN:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    elif pre in _LLAMA3:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
    else:
        raise ModelError(
            f"GGUF tokenizer.ggml.pre is not converted. Given: {pre!r}. "
            f"Allowed: {', '.join(sorted(_SINGLE_DIGITS | _PLAIN | _LLAMA3))}.",
            code="gguf_unsupported",
            hint="Pull the model's safetensors directory instead: guessing how text is cut would change every answer.",
        )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _special(metadata: Mapping[str, Any], name: str, tokens: Sequence[str]) -> str | None:
    """The text of a special token that is named by its id; None where the file has none."""
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = metadata.get(key)
    if token_id is None:
        return None
    if type(token_id) is not int or not 0 <= token_id < len(tokens):
        raise _invalid(f"{key} must be from 0 to {len(tokens) - 1}. Given: {token_id!r:.100}")
    return tokens[token_id]


def _all_of(value: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _invalid(rule: str) -> ModelError:
    return ModelError(f"GGUF {rule}.", code="gguf_invalid", hint="Copy or download the file again.")
