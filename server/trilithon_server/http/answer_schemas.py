"""JSON schemas of the answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

_STR: dict[str, Any] = {"type": "string"}
_INT: dict[str, Any] = {"type": "integer"}
_NUM: dict[str, Any] = {"type": "number"}
_BOOL: dict[str, Any] = {"type": "boolean"}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _maybe(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(properties: dict[str, Any], *, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


_FINISH = {
    "enum": [
        "eos_token",
        "stop_sequence",
        "stop_token",
        "max_tokens",
        "context_length",
        "constraint_end",
        "time_limit",
        None,
    ]
}

_OPENAI_HEAD = {
    "id": _STR,
    "object": _STR,
    "created": _INT,
    "model": _STR,
    "system_fingerprint": _STR,
}

_OPENAI_CHOICE = {
    "index": _INT,
    "logprobs": _maybe({"type": "object"}),
    "finish_reason": {"enum": ["stop", "length", None]},
    "stop_detail": _ref("StopDetail"),
    "prompt_logprobs": _list(_ref("Token")),
    "token_ids": _list(_INT),
    "prompt_token_ids": _list(_INT),
}

_EXTRAS = ("prompt_logprobs", "token_ids", "prompt_token_ids")

_STORY = {
    "story_id": _STR,
    "seed": _INT,
    "model": _STR,
    "text": _STR,
    "sentences": _list(_ref("StorySentence")),
}
_TOLD = {"usage": _ref("Usage"), "model": _STR, "timings": _ref("Timings")}
_PROBS: dict[str, Any] = {"type": "object", "additionalProperties": _NUM}

ANSWERS: dict[str, dict[str, Any]] = {
    "Health": _object({"status": {"enum": ["ok", "unavailable"]}, "reason": _STR}),
    "StopDetail": _object(
        {
            "reason": _FINISH,
            "matched_stop": _maybe(_STR),
            "matched_token_id": _maybe(_INT),
            "seed": _INT,
            "constraint_complete": _BOOL,
        }
    ),
    "OpenAiUsage": _object(
        {
            "prompt_tokens": _INT,
            "completion_tokens": _INT,
            "total_tokens": _INT,
            "prompt_tokens_details": _object({"cached_tokens": _INT}),
        }
    ),
    "ChatMessageAnswer": _object({"role": {"const": "assistant"}, "content": _STR, "refusal": {"type": "null"}}),
    "ChatAnswer": _object(
        {
            **_OPENAI_HEAD,
            "choices": _list(_object({"message": _ref("ChatMessageAnswer"), **_OPENAI_CHOICE}, optional=_EXTRAS)),
            "usage": _ref("OpenAiUsage"),
            "truncated_prompt_tokens": _INT,
        },
        optional=("truncated_prompt_tokens",),
    ),
    "CompletionAnswer": _object(
        {
            **_OPENAI_HEAD,
            "choices": _list(_object({"text": _STR, **_OPENAI_CHOICE}, optional=_EXTRAS)),
            "usage": _ref("OpenAiUsage"),
            "truncated_prompt_tokens": _INT,
        },
        optional=("truncated_prompt_tokens",),
    ),
    "EmbeddingAnswer": _object(
        {
            "object": {"const": "list"},
            "data": _list(
                _object(
                    {
                        "object": {"const": "embedding"},
                        "index": _INT,
                        "embedding": {"anyOf": [_list(_NUM), _STR]},
                        "tokens": _INT,
                    }
                )
            ),
            "model": _STR,
            "usage": _object({"prompt_tokens": _INT, "total_tokens": _INT}),
        }
    ),
    "Model": _object(
        {
            "object": {"const": "model"},
            "owned_by": _STR,
            "id": _STR,
            "kind": {"enum": ["base", "adapter", "merged", "alias", "encoder"]},
            "base": _STR,
            "alias_of": _STR,
            "job_id": _STR,
            "job_step": _INT,
            "digest": _STR,
            "template_digest": _STR,
            "tokenizer_digest": _STR,
            "max_context_tokens": _INT,
            "max_output_tokens": _INT,
            "vocab_size": _INT,
            "dtype": _STR,
            "quantization": _STR,
            "tp": _INT,
            "pp": _INT,
            "state": {"enum": ["available", "loading", "ready", "failed"]},
            "created": _INT,
            "capabilities": _list(_STR),
            "defaults": {"type": "object"},
        },
        optional=("base", "alias_of", "job_id", "job_step"),
    ),
    "UnloadAnswer": _object({"requests_in_flight": _INT}),
    "DeletedAlias": _object({"alias": _STR, "target": _STR}),
    "Models": _object({"object": {"const": "list"}, "data": _list(_ref("Model")), "has_more": _BOOL}),
    "Token": _object(
        {
            "id": _INT,
            "text": _STR,
            "logprob": _maybe(_NUM),
            "rank": _INT,
            "top": _list(_ref("Token")),
            "text_offset": _INT,
        },
        optional=("top", "text_offset"),
    ),
    "Choice": _object(
        {
            "index": _INT,
            "text": _STR,
            "finish_reason": _FINISH,
            "seed": _INT,
            "cumulative_logprob": _NUM,
            "generated_tokens": _INT,
            "tokens": _list(_ref("Token")),
            "matched_stop": _STR,
            "matched_token_id": _INT,
            "constraint_complete": _BOOL,
        },
        optional=("tokens", "matched_stop", "matched_token_id", "constraint_complete"),
    ),
    "Usage": _object({"prompt_tokens": _INT, "generated_tokens": _INT, "cached_tokens": _INT, "preemptions": _INT}),
    "Timings": _object(
        {"queue_ms": _NUM, "prefill_ms": _NUM, "first_token_ms": _NUM, "decode_ms": _NUM, "total_ms": _NUM}
    ),
    "GenerateAnswer": _object(
        {
            "request_id": _STR,
            "model": _STR,
            "fingerprint": _STR,
            "choices": _list(_ref("Choice")),
            "prompt_tokens": _list(_ref("Token")),
            "usage": _ref("Usage"),
            "timings": _ref("Timings"),
        }
    ),
    "ScoreAnswer": _object(
        {
            "items": _list(
                _object(
                    {
                        "sum_logprob": _list(_NUM),
                        "token_count": _list(_INT),
                        "byte_count": _list(_INT),
                        "is_greedy": _list(_BOOL),
                        "details": _list({"type": "object"}),
                    }
                )
            ),
            "usage": _ref("Usage"),
        }
    ),
    "TokenizeAnswer": _object(
        {
            "results": _list(
                _object(
                    {
                        "ids": _list(_INT),
                        "pieces": _list(_STR),
                        "starts": _list(_INT),
                        "ends": _list(_INT),
                        "count": _INT,
                        "truncated": _BOOL,
                    }
                )
            ),
            "max_context_tokens": _INT,
            "tokenizer_digest": _STR,
        }
    ),
    "DetokenizeAnswer": _object({"texts": _list(_STR)}),
    "RenderAnswer": _object({"text": _STR, "ids": _list(_INT), "template_digest": _STR}),
    "Entity": _object({"start": _INT, "end": _INT, "type": _STR, "text": _STR, "score": _NUM}),
    "EntitiesAnswer": _object(
        {"documents": _list(_object({"entities": _list(_ref("Entity"))})), **_TOLD},
    ),
    "RelationsAnswer": _object(
        {
            "relations": _list(
                _object(
                    {
                        "label": _STR,
                        "score": _NUM,
                        "probs": _PROBS,
                        "pair": _object({"a": _ref("Entity"), "b": _ref("Entity")}),
                    }
                )
            ),
            "negative_label": _STR,
            "pairs_dropped": _INT,
            **_TOLD,
        }
    ),
    "SpansAnswer": _object(
        {
            "answers": _list(_object({"text": _STR, "probability": _NUM, "context": _INT, "start": _INT, "end": _INT})),
            "no_answer_probability": _NUM,
            "no_answer": _BOOL,
            **_TOLD,
        }
    ),
    "ClassesAnswer": _object(
        {
            "results": _list(_object({"label": _STR, "score": _NUM, "probs": _PROBS, "truncated": _BOOL})),
            **_TOLD,
        }
    ),
    "DialogueAnswer": _object(
        {
            "candidates": _list(_object({"text": _STR, "mean_logprob": _NUM, "finish_reason": _FINISH})),
            "knowledge": _list(_object({"text": _STR, "document_id": _STR, "sentence": _INT, "score": _NUM})),
            "reference_tokens": _INT,
            "turns_dropped": _INT,
            "reference_turns_dropped": _INT,
            "knowledge_dropped": _INT,
            **_TOLD,
        }
    ),
    "ActorAnswer": _object({"actor_id": _STR, "conversations": _INT, "turns": _INT, "version": _INT}),
    "KnowledgeAnswer": _object({"documents": _INT, "sentences": _INT, "version": _INT}),
    "StorySentence": _object(
        {
            "index": _INT,
            "text": _STR,
            "keywords": _list(_STR),
            "facts": _list(_object({"text": _STR, "score": _NUM, "head": _STR, "relation": _STR, "tail": _STR})),
            "logprob": _NUM,
            "finish_reason": _FINISH,
            "reused": _BOOL,
            "unknown_keywords": _list(_STR),
            "unopposed_keywords": _list(_STR),
        }
    ),
    "Story": _object(_STORY),
    "StoryAnswer": _object({**_STORY, "finish_reason": _FINISH, **_TOLD}),
    "EncodeAnswer": _object(
        {
            "vectors": _list(_object({"values": _list(_NUM)})),
            "model_digest": _STR,
            "usage": _ref("Usage"),
            "model": _STR,
        }
    ),
    "Passage": _object({"id": _STR, "score": _NUM, "title": _STR, "text": _STR, "logprob": _NUM}),
    "SearchAnswer": _object(
        {
            "results": _list(_object({"passages": _list(_ref("Passage"))})),
            "index_version": _INT,
            "usage": _ref("Usage"),
            "model": _STR,
        }
    ),
    "IndexAnswer": _object(
        {
            "name": _STR,
            "version": _INT,
            "passages": _INT,
            "model_digest": _STR,
            "state": {"enum": ["building", "ready", "failed"]},
            "progress": _NUM,
            "error": _STR,
            "model": _STR,
            "backend": {"enum": ["", "flat", "hnsw"]},
        }
    ),
    "OpenAnswer": _object(
        {
            "answer": _STR,
            "logprob": _NUM,
            "no_answer": _BOOL,
            "evidence": _list(
                _object(
                    {
                        "passage": _ref("Passage"),
                        "retrieval_logprob": _NUM,
                        "answer_logprob": _maybe(_NUM),
                        "start": _INT,
                        "end": _INT,
                        "candidate": _STR,
                        "truncated": _BOOL,
                    }
                )
            ),
            "index_version": _INT,
            "reader": {"enum": ["span", "joint", "individual", "causal"]},
            "finish_reason": {"enum": ["time_limit", None]},
            **_TOLD,
        }
    ),
    "IndexesAnswer": _object({"indexes": _list(_ref("IndexAnswer"))}),
    "Nothing": _object({}),
    "AbortAnswer": _object({"was_running": _BOOL}),
    "MegatronAnswer": _object(
        {"text": _list(_STR), "segments": _list(_list(_STR)), "logprobs": _list(_list(_maybe(_NUM)))},
        optional=("logprobs",),
    ),
    "StatusAnswer": _object(
        {
            "version": _STR,
            "fingerprint": _STR,
            "uptime_seconds": _NUM,
            "draining": _BOOL,
            "engines": _list({"type": "object"}),
        }
    ),
    "DrainAnswer": _object({"requests_in_flight": _INT}),
    "AbortAllAnswer": _object({"aborted": _INT}),
    "LogLevelAnswer": _object({"previous": _STR}),
}
"""By the names that the route table uses."""
