"""
What a recipe is: everything that makes a task, while one loop trains them all. No torch.

A recipe turns rows of a data file into samples, says what is wrong with a row, and what the numbers of a validation
mean. The loop knows samples alone: tokens, targets, and which head they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding as Finding
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.contrast_terms import Contrast
from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.tasks.retrieval import RetrievalFormat
from trilithon_server.text.template import ChatTemplate

IGNORE = -1
"""The target of a token that does not count."""

Head = Literal["vocabulary", "tokens", "sequence", "span", "joint_span", "preference", "vectors", "reading"]
"""
What the last stage ends in; `preference` is the vocabulary head with pairs of sequences to compare, `vectors` an
encoder's pooled vectors, to be told apart, `reading` an encoder-decoder that answers from passages (`openqa.py`).
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """
    One sequence to learn from.

    Attributes:
        tokens: of the sequence, specials included.
        targets: one a token: what the model should say there (the next token of a text, the label of a token), or
            `IGNORE`. Empty where the sample is learned as a whole (`sequence`, `span`, `joint_span`).
        types: token types; empty for zeros. positions: likewise; empty for 0, 1, 2 ...
        columns: further integers, the same names in every sample of a task: `label` (sequence), `start` and `end`
            (span, positions in `tokens`; 0 and 0 for no answer), `context_start` and `context_stop` (span, half-open;
            both kinds of span have all four),
            `supervised` (what counts, where that is not every target: masked tokens), `only_scored` (1: validation
            compares it with other parts of its row, and no loss counts it); `role`, `pair` and `key` (vectors; a pair
            is counted within its row); those of `openqa.py` (reading).
        row: line of the data file, from 1.
        part: counts the samples of a row: windows, chosen (0) and rejected (1), or answers to compare.
        cut: tokens that `data.on_long: truncate` left out of it.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...] = ()
    types: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    columns: Mapping[str, int] = field(default_factory=dict)
    row: int = 0
    part: int = 0
    cut: int = 0

    @property
    def num_supervised(self) -> int:
        """What the sample adds to the loss's denominator."""
        if self.columns.get("only_scored"):
            return 0
        if "supervised" in self.columns:
            return self.columns["supervised"]
        return sum(target != IGNORE for target in self.targets) if self.targets else 1


@dataclass(frozen=True)
class Retriever:
    """The encoder that chooses what a reader reads, and how it reads questions and passages."""

    tokenizer: Tokenizer
    format: RetrievalFormat
    model: ModelConfig


@dataclass(frozen=True)
class Context:
    """
    What rows are encoded with.

    Attributes:
        max_tokens: of a sample.
        labels: of the task's head, in the order of their ids; empty where it has none or they are not known yet.
        options: the recipe's own, checked.
        train_on: of a chat: which turns are supervised.
        on_long: what `encode` does with a row beyond `max_tokens`: with `truncate` it shortens it (and says so in
            `Sample.cut`), else it gives an E-DATA-021, which the caller counts as dropped where it is `drop`.
        validating: rows are to be judged rather than learned: every answer that is compared is a sample.
        untrained_ids: tokens whose rows the base never learned and this tuning does not train either.
        label: gives a row that came without labels those that the job makes; None where it makes none.
        labelled_by: digest of what those are made from.
        retriever: that is trained beside a reader; None where there is none.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    model: ModelConfig
    max_tokens: int
    labels: tuple[str, ...]
    options: Section
    train_on: Literal["assistant", "all"] = "assistant"
    on_long: Literal["error", "truncate", "drop"] = "error"
    validating: bool = False
    untrained_ids: frozenset[int] = frozenset()
    label: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    labelled_by: str = ""
    retriever: Retriever | None = None


@dataclass(frozen=True)
class Defaults:
    """A recipe's published choices for what a configuration leaves open. Learning rates are for `full` and `lora`."""

    lr_full: float
    lr_lora: float = 2e-4
    head_lr_factor: float = 1.0
    """How much faster a new head learns."""
    epochs: int = 3
    batch_size: int = 16
    max_tokens: int = 512
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class Needs:
    """
    What a task's sequences are made of beyond words.

    Attributes:
        special_tokens: what the base's tokenizer must have, each one token.
        token_types: rows of the table of token types; a base with fewer gets new ones, which begin as zeros.
    """

    special_tokens: tuple[str, ...] = ()
    token_types: int = 0


@dataclass(frozen=True)
class Output:
    """
    What the model said of one validation sample.

    Attributes:
        sample: the sample.
        values: fp32. tokens: [T, labels] logits; sequence: [labels]; span: [T, 2]; joint_span: [T, labels]; vocabulary
            and preference: [2], the summed log-probability of the supervised tokens, and how many of them are the
            likeliest; vectors: [H].
    """

    sample: Sample
    values: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Writing:
    """
    How an export is asked to write answers to validation rows.

    Attributes:
        count: rows, at most.
        stops: a text ends before any of these, if not at its end token.
    """

    count: int
    stops: tuple[str, ...] = ()


class Recipe(Protocol):
    """One task. Instances have no state."""

    task: str
    head: Head
    formats: tuple[str, ...]
    """Names of the row formats that it takes, as reports show them."""
    defaults: Defaults
    Options: type[Section]
    """Its own options, `JobConfig.options`; every field has a default."""
    best_metric: tuple[str, Literal["max", "min"]]
    """Which number of a validation says what is best."""

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """The format of a row by its keys; None where it is none of `formats`."""
        ...

    def rows_of(self, document: bytes, *, file: str) -> Sequence[Mapping[str, Any]] | Sequence[Finding] | None:
        """
        Rows of a file that is not JSON lines (SQuAD JSON, CoNLL tsv), or what is wrong with it; None where the recipe
        takes no such files, or the document is not one. Asked only about files whose name does not say JSON lines.
        """
        ...

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """What is wrong with a row, whatever the model."""
        ...

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """
        The labels of the head, or of the answers that are compared, in an order that does not depend on that of the
        rows; empty for none.

        Args:
            rows: of the training file, sound ones, read as they are asked for.
        """
        ...

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """
        The samples of a sound row, warnings among them; or why it cannot be encoded (too long, nothing supervised ...),
        and no sample.
        """
        ...

    def needs(self, options: Section) -> Needs:
        """What the base must have for the task's sequences."""
        return Needs()

    def unit(self, options: Section) -> int:
        """Neighbouring samples that stay together, as every row gives a multiple of them."""
        return 1

    def unit_tokens(self, context: Context) -> int | None:
        """Tokens that each unit takes of a micro-batch; None where they are those of its samples."""
        return None

    def trained(self, base: ModelConfig, options: Section, retriever: ModelConfig | None) -> ModelConfig:
        """
        The base with what is trained beside it.

        Args:
            base: `has_twin` where its directory holds an encoder of questions, too.
        """
        return base.alone()

    def trains_passages(self, context: Context) -> bool:
        """Of two encoders, whether that of passages learns; that of questions always does."""
        return True

    def contrast(self, context: Context) -> Contrast:
        """How vectors are told apart."""
        return Contrast()

    def dress(self, sample: Sample, *, seed: int, epoch: int) -> Sample:
        """The sample as an epoch sees it: another mask each time, for example. Pure; most tasks change nothing."""
        return sample

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """Numbers of a validation by name; `rows` by line. Empty where the loss says it all."""
        ...

    def writing(self, context: Context) -> Writing | None:
        """How the export's own answers are asked for; None where they measure nothing."""
        return None

    def judge(
        self, texts: Mapping[int, str], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """Numbers of the texts that an export wrote, by name; texts and rows by line. Where `writing` says how."""
        return {}

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """
        What the server must know to serve the task: written as `task.json` beside the model.

        Args:
            numbers: of the validation of what is exported, as `metrics` gave them, none where there was none; and
                scalars that were learned and are in no model's files, by their canonical names.
        """
        ...
