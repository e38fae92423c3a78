"""
Tiny encoders with task heads of random weights: what finetuning would make of a tiny BERT, saved by `transformers`.

    from tiny_tasks import tiny_task
    model_dir = tiny_task(tmp_path / "tagger", "ner")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tiny import tiny_bert

from trilithon_parallel.tokenizer import load_tokenizer
from trilithon_server.tasks import TaskFormat
from trilithon_server.tasks.classes import ClassFormat
from trilithon_server.tasks.pieces import WordPieces
from trilithon_server.tasks.relations import RelationFormat
from trilithon_server.tasks.spans import SpanFormat
from trilithon_server.tasks.tagging import TaggingFormat

Task = Literal["ner", "relation", "span_qa", "classify"]

HEADS: dict[Task, Any] = {
    "ner": transformers.BertForTokenClassification,
    "relation": transformers.BertForSequenceClassification,
    "span_qa": transformers.BertForQuestionAnswering,
    "classify": transformers.BertForSequenceClassification,
}


def formats(pieces: WordPieces) -> dict[Task, TaskFormat]:
    """Formats with small windows, so that short texts need several."""
    markers = {"CHEMICAL": pieces.unknown_id + 1, "GENE": pieces.unknown_id + 2}
    return {
        "ner": TaggingFormat(types=("CHEMICAL", "GENE"), max_tokens=24, stride=4),
        "relation": RelationFormat(labels=("activates", "false", "inhibits"), markers=markers, max_tokens=32),
        "span_qa": SpanFormat(max_tokens=40, doc_stride=12, max_question_tokens=12, max_answer_tokens=8),
        "classify": ClassFormat(labels=("maybe", "no", "yes"), max_tokens=32),
    }


def tiny_task(path: Path, task: Task, *, seed: int = 0, scale: float = 6.0, **shape: Any) -> Path:
    """
    A model directory with a head for `task` and its task file; `shape` as of `tiny_bert`.

    Args:
        scale: of the head's weights: large enough that texts differ in their labels.
    """
    tiny_bert(path, prefix="bert.", sentence_encoder=False, seed=seed, **shape)
    known = formats(WordPieces(load_tokenizer(path)))[task]
    labels = ("start", "end") if isinstance(known, SpanFormat) else known.labels
    config = transformers.BertConfig.from_pretrained(
        path,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        hidden_dropout_prob=0.0,
    )
    trunk = transformers.BertModel.from_pretrained(path)
    model = HEADS[task](config).eval()
    state = trunk.state_dict()
    if model.bert.pooler is None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    model.bert.load_state_dict(state)
    head = model.qa_outputs if task == "span_qa" else model.classifier
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.normal_(0.0, scale / head.weight.shape[1] ** 0.5, generator=draw)
        head.bias.normal_(0.0, 0.1, generator=draw)
    model.save_pretrained(path)
    (path / "task.json").write_text(json.dumps(known.task_file()), encoding="utf-8")
    return path
