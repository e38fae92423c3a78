"""What config.json says of a task head is read strictly, and said again when it is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from task_models import ENCODER, HEADS, MODELS
from tiny_configs import LLAMA

from trilithon_parallel.config import ModelError, TaskHead, load_config
from trilithon_parallel.task_head import for_masked_lm, for_task
from trilithon_parallel.weights.export import hub_config


def read(folder: Path, kind: str, **changes: Any) -> Any:
    """The head of a model whose config.json has these values; None takes a key away."""
    document = hub_config(MODELS[kind], dtype=torch.float32) | changes
    folder.mkdir(exist_ok=True)
    kept = {key: value for key, value in document.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return load_config(folder)


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_what_is_written_is_read(kind: str, tmp_path: Path) -> None:
    """The very configuration comes back, labels in their order."""
    assert read(tmp_path, kind) == replace(MODELS[kind], dtype="float32")


def test_what_transformers_leaves_out_has_its_meaning(tmp_path: Path) -> None:
    """No id2label is two labels by number; ids may stand in any order; a span's labels have one name."""
    shuffled = {"2": "c", "0": "a", "1": "b"}

    assert read(tmp_path, "sequence", id2label=None, label2id=None).task_head.labels == ("LABEL_0", "LABEL_1")
    assert read(tmp_path, "tokens", id2label=None, label2id=None, num_labels=3).task_head.labels[2] == "LABEL_2"
    assert read(tmp_path, "tokens", id2label=shuffled, label2id=None).task_head.labels == ("a", "b", "c")
    assert read(tmp_path, "span", id2label={"0": "LABEL_0", "1": "LABEL_1"}).task_head == HEADS["span"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, r"ids 0 to 1, each once\. Given: 0, 2\. Name id 1\."),
        ({"id2label": {"0": "a", "01": "b"}}, r"ids 0 to 1, each once\. Given: 0, 01\."),
        ({"id2label": ["a", "b"]}, r"id2label must map ids to names\. Given: \['a', 'b'\]"),
        ({"id2label": {"0": "a", "1": 2}}, r"id2label must map ids to names"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1, "b": 0}}, r"label2id must be the inverse of id2label"),
        ({"id2label": {"0": "a", "1": "a"}, "label2id": None}, r"at least two different names\. Given: \('a', 'a'\)"),
        ({"id2label": {"0": "a"}, "label2id": None}, r"at least two different names\. Given: \('a',\)"),
        ({"problem_type": "regression"}, r"problem_type is not supported\. Given: 'regression'"),
        ({"problem_type": "multi_label_classification"}, r"problem_type is not supported"),
    ],
)
def test_R11_labels_that_are_none(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """One sentence with field, value and what is allowed."""
    with pytest.raises(ModelError, match=message):
        read(tmp_path, "sequence", **changes)


def test_R11_a_span_has_two_labels(tmp_path: Path) -> None:
    """Its architecture has no other meaning; nor has a head that is made in code."""
    with pytest.raises(ModelError, match=r"id2label must have 2 entries in a BertForQuestionAnswering\. Given: 3\."):
        read(tmp_path, "span", id2label={"0": "a", "1": "b", "2": "c"})
    with pytest.raises(ModelError, match=r"labels of a span must be \('start', 'end'\)"):
        TaskHead("span", ("end", "start"))


def test_R11_a_decoder_has_no_such_head() -> None:
    """Only an encoder gets one, or a masked-LM head."""
    for make in (lambda: for_task(LLAMA, HEADS["tokens"]), lambda: for_masked_lm(LLAMA)):
        with pytest.raises(ModelError, match=r"needs an encoder\. Given: LlamaForCausalLM") as caught:
            make()
        assert caught.value.code == "model_unsupported"


def test_one_head_takes_the_place_of_another() -> None:
    """What an encoder ended in before is gone: labels, architecture, the tie to the embedding."""
    masked = for_masked_lm(MODELS["tokens"], vocab_size=500)
    again = for_task(masked, HEADS["sequence"])

    assert (masked.task_head, masked.vocab_size, masked.tied_embeddings) == (None, 500, True)
    assert again == replace(for_task(ENCODER, HEADS["sequence"]), vocab_size=500)
