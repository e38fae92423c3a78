"""
What an encoder ends in when it was made for a task: labels of tokens, of a sequence, the ends of a span, or whole
spans. No torch.

`config.json` says it by the architecture's name and `id2label`; the tensors are `task_head.*` and `pooler.dense.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from trilithon_parallel.fields import Fields, ModelError

if TYPE_CHECKING:
    from trilithon_parallel.config import ModelConfig

Kind = Literal["tokens", "sequence", "span", "joint_span"]

SPAN_LABELS = ("start", "end")

# Name in `config.json` -> what the head is for; all but the last are classes of Hugging Face's library.
KINDS: Mapping[str, Kind] = {
    "BertForTokenClassification": "tokens",
    "BertForSequenceClassification": "sequence",
    "BertForQuestionAnswering": "span",
    "BertForJointSpan": "joint_span",
}


def span_lengths(most: int) -> tuple[str, ...]:
    """
    The labels of a `joint_span` head: how many tokens a span has.

    >>> span_lengths(3)
    ('1', '2', '3')
    """
    return tuple(str(length) for length in range(1, most + 1))


@dataclass(frozen=True)
class TaskHead:
    """
    One linear layer behind an encoder, hidden -> `labels`, in the order of their ids.

    `tokens`: a label each token. `sequence`: a label each sequence, from its first token through BERT's pooler.
    `span`: how much each token is the start, and the end, of an answer. `joint_span`: how much each token and those
    behind it, 1 to as many as there are labels, are an answer; its layer is an MLP of a span's first and last token.

    Raises:
        ModelError: `model_invalid`, fewer than two labels, two that are equal, an empty one; a span with others than
            `SPAN_LABELS`, a joint one with others than `span_lengths`.
    """

    kind: Kind
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS.values():
            raise ModelError(
                f"task head kind is unknown. Given: {self.kind!r}.", hint=f"Allowed: {', '.join(KINDS.values())}."
            )
        if self.kind == "span" and self.labels != SPAN_LABELS:
            raise ModelError(f"task head labels of a span must be {SPAN_LABELS}. Given: {self.labels!r}.")
        if self.kind == "joint_span" and self.labels != span_lengths(len(self.labels)):
            raise ModelError(f"task head labels of joint spans must be lengths, 1, 2 ... Given: {self.labels!r}.")
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels) or not all(self.labels):
            raise ModelError(
                f"task head labels must be at least two different names. Given: {self.labels!r}.",
                hint="Name every class once.",
            )

    @property
    def architecture(self) -> str:
        """What `config.json` calls a BERT with this head."""
        return next(name for name, kind in KINDS.items() if kind == self.kind)

    @property
    def has_pooler(self) -> bool:
        """Whether tanh(W x + b) of the first token stands before the layer."""
        return self.kind == "sequence"

    @property
    def is_in_transformers(self) -> bool:
        """Whether Hugging Face's library has a class for it."""
        return self.kind != "joint_span"

    def hub_fields(self) -> dict[str, Any]:
        """What `config.json` says of the labels; a span's are those that a silent file means."""
        if self.kind == "span":
            return {}
        return {
            "id2label": {str(i): label for i, label in enumerate(self.labels)},
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }


def for_task(config: ModelConfig, head: TaskHead) -> ModelConfig:
    """
    The encoder of `config` with that head in place of whatever it ended in.

    Raises:
        ModelError: `model_unsupported`, not a BERT.
    """
    _check_encoder(config, "a task head")
    return replace(config, architecture=head.architecture, task_head=head, mlm_head=False, tied_embeddings=False)


def for_masked_lm(config: ModelConfig, *, vocab_size: int | None = None) -> ModelConfig:
    """
    The encoder of `config` with the masked-LM head; `vocab_size` where texts are cut by another vocabulary.

    Raises:
        ModelError: `model_unsupported`, not a BERT.
    """
    _check_encoder(config, "a masked-LM head")
    size = config.vocab_size if vocab_size is None else vocab_size
    return replace(
        config, architecture="BertForMaskedLM", task_head=None, mlm_head=True, tied_embeddings=True, vocab_size=size
    )


def for_vectors(config: ModelConfig) -> ModelConfig:
    """
    The encoder of `config` without a head: a vector a text, pooled as the model says.

    Raises:
        ModelError: `model_unsupported`, not a BERT.
    """
    _check_encoder(config, "a vector a text")
    return replace(config, architecture="BertModel", task_head=None, mlm_head=False, tied_embeddings=False)


def _check_encoder(config: ModelConfig, what: str) -> None:
    if config.family != "bert":
        raise ModelError(
            f"{what} needs an encoder. Given: {config.architecture}.", code="model_unsupported", hint="Allowed: a BERT."
        )


def read_task_head(reader: Fields, architecture: str) -> TaskHead | None:
    """
    The head that a BERT's `config.json` describes; None where its architecture has none.

    Raises:
        ModelError: `model_invalid`, ids with gaps, equal labels, maps that disagree; `model_unsupported`, regression or
            several labels at once.
    """
    kind = KINDS.get(architecture)
    if kind is None:
        return None
    if kind == "sequence":
        reader.require("problem_type", (None, "single_label_classification"), None)
    labels = _labels(reader)
    if kind == "span":
        if len(labels) != 2:
            raise ModelError(
                f"{reader.where} id2label must have 2 entries in a {architecture}. Given: {len(labels)}.",
                hint="They are start and end.",
            )
        labels = SPAN_LABELS
    return TaskHead(kind, labels)


def _labels(reader: Fields) -> tuple[str, ...]:
    """Labels in the order of their ids. A file that is silent means two, as `transformers` reads it."""
    raw = reader.raw.get("id2label")
    if raw is None:
        return tuple(f"LABEL_{i}" for i in range(reader.size("num_labels", 2)))
    if not isinstance(raw, dict) or not all(isinstance(label, str) for label in raw.values()):
        raise ModelError(
            f"{reader.where} id2label must map ids to names. Given: {raw!r:.200}.",
            hint="Repair the file or export the model again.",
        )
    expected = [str(i) for i in range(len(raw))]
    if sorted(raw) != sorted(expected):
        missing = [i for i in expected if i not in raw]
        raise ModelError(
            f"{reader.where} id2label must have the ids 0 to {len(raw) - 1}, each once. Given: {', '.join(raw)}.",
            hint=f"Name id {missing[0]}.",
        )
    labels = tuple(raw[i] for i in expected)
    inverse = reader.raw.get("label2id")
    if inverse is not None and inverse != {label: i for i, label in enumerate(labels)}:
        raise ModelError(
            f"{reader.where} label2id must be the inverse of id2label. Given: {inverse!r:.200}.",
            hint="Remove label2id, or make the two agree.",
        )
    return labels
