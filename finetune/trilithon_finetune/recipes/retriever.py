"""
Tasks `dpr` and `ict`: an encoder whose vectors bring a question and the passage that answers it together.

    dpr  {"question", "positive_ctxs": [{"title", "text"}], "hard_negative_ctxs"?, "negative_ctxs"?, "answers"?}
         supervised, with passages that look right and are not (Karpukhin et al. 2020; arXiv 2101.00408, section 2.3)
    ict  {"text", "title"?}
         inverse cloze (Lee et al. 2019): a sentence of a document asks for the block that it was taken from

Each question is told from all other passages of the global batch. One encoder reads both, or each has its own, which
begin alike.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field, JsonValue

from trilithon_finetune.config import Section
from trilithon_finetune.data.findings import Finding, finding, shown
from trilithon_finetune.errors import refuse
from trilithon_finetune.recipes.base import Context, Defaults, Head, Output, Recipe, Sample
from trilithon_finetune.recipes.blocks import MAX_SENTENCE_TOKENS, MIN_SENTENCES, Block, blocks_of
from trilithon_finetune.recipes.fields import Best, RowCheck
from trilithon_parallel.config import ModelConfig
from trilithon_parallel.contrast_terms import ANSWER, NOTHING, OTHER, QUERY, Contrast
from trilithon_server.tasks.pieces import Encoded
from trilithon_server.tasks.retrieval import RetrievalFormat

CONTEXTS = ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
PASSAGES = "question/positive_ctxs"
TEXT = "text"
TOP = (1, 5, 20)


class RetrieverOptions(Section):
    """Options of the tasks `dpr` and `ict`."""

    max_query_tokens: Annotated[int, Field(ge=8)] | None = None
    """Longer questions are cut. None: 64."""
    score_scale: Annotated[float, Field(gt=0)] | None = None
    """Of inner products before the softmax. None: 20 where vectors have length 1, else 1 / sqrt(hidden size)."""
    shared: bool | None = None
    """
    Whether one encoder reads questions and passages. None: where the base is one whose vectors have length 1, as of an
    encoder that was trained to compare texts; else each gets its own, as in the paper (section 2.1).
    """


class DprOptions(RetrieverOptions):
    """Options of the task `dpr`."""

    hard_negatives: Annotated[int, Field(ge=0, le=7)] = 1
    """Passages of a row that look right and are not, beside those of the other rows: hard ones first."""


class IctOptions(RetrieverOptions):
    """Options of the task `ict`."""

    kept_in_block: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of questions that stay in their block, so that matching words is learned too."""


class _Retriever(Recipe):
    """What both tasks share."""

    head: Head = "vectors"
    defaults = Defaults(lr_full=2e-5, batch_size=32, max_tokens=256, weight_decay=0.01, dropout=0.1)
    best_metric: Best = ("valid_loss", "min")

    def rows_of(self, document: bytes, *, file: str) -> None:
        """JSON lines only."""

    def labels(self, rows: Iterable[Mapping[str, Any]], options: Section) -> tuple[str, ...]:
        """None: the head is a vector."""
        return ()

    def trained(self, base: ModelConfig, options: Section, retriever: ModelConfig | None) -> ModelConfig:
        """One encoder or two."""
        assert isinstance(options, RetrieverOptions)
        if options.shared:
            check_joins(base)
        shared = base.normalize and not base.has_twin if options.shared is None else options.shared
        return replace(base, has_twin=not shared)

    def contrast(self, context: Context) -> Contrast:
        """From all passages of the global batch."""
        return Contrast(_format(context).score_scale)

    def metrics(
        self, outputs: Sequence[Output], rows: Mapping[int, Mapping[str, Any]], context: Context
    ) -> Mapping[str, float]:
        """`top_1`, `top_5`, `top_20`: the answer is among so many of all validation passages; `mean_rank`, from 1."""
        ranks = np.array(ranks_of(outputs), dtype=np.float64)
        if not len(ranks):
            return {}
        return {**{f"top_{k}": float((ranks <= k).mean()) for k in TOP}, "mean_rank": float(ranks.mean())}

    def task_file(self, context: Context, numbers: Mapping[str, float]) -> dict[str, JsonValue]:
        """What `RetrievalFormat` reads."""
        return _format(context).task_file()


class DensePassages(_Retriever):
    """The recipe of `dpr`."""

    task = "dpr"
    formats: tuple[str, ...] = (PASSAGES,)
    Options: type[Section] = DprOptions

    def unit(self, options: Section) -> int:
        """A question, its passage, and the hard negatives."""
        assert isinstance(options, DprOptions)
        return 2 + options.hard_negatives

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By any list of passages."""
        return PASSAGES if any(key in row for key in CONTEXTS) else None

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """A question, at least one passage that answers it, and no passage on both sides."""
        check = RowCheck(row, file=file, line=line)
        check.keys(("question", "answers", *CONTEXTS, "id", "dataset"))
        check.text("question")
        texts: dict[str, list[str | None]] = {}
        for key in CONTEXTS:
            passages = check.value(key, list) if key in row or key == CONTEXTS[0] else []
            texts[key] = [_check_passage(f"{key}[{i}]", item, check) for i, item in enumerate(passages or ())]
        if not check.findings and not texts[CONTEXTS[0]]:
            check.add("E-DATA-015", CONTEXTS[0], "is empty.", "Give the passage that answers the question.")
        right = set(texts[CONTEXTS[0]])
        for key in CONTEXTS[1:]:
            for i, text in enumerate(texts[key]):
                if text is not None and text in right:
                    rule = f"is also a positive passage. Given: {shown(text)}."
                    check.add("E-DATA-041", f"{key}[{i}].text", rule, "A passage answers the question or it does not.")
        return check.findings

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """The question, the first passage that answers it, and negatives; empty ones where the row has too few."""
        format_, tokenizer, options = _format(context), context.tokenizer, context.options
        assert isinstance(options, DprOptions)
        others = [*row.get("hard_negative_ctxs", ()), *row.get("negative_ctxs", ())][: options.hard_negatives]
        passages = [(ANSWER, row[CONTEXTS[0]][0]), *((OTHER, item) for item in others)]
        samples = [_sample(format_.query(row["question"], tokenizer), QUERY, line, 0, "")]
        for part, (role, item) in enumerate(passages, start=1):
            title, text = item.get("title", ""), item["text"]
            samples.append(_sample(format_.passage(title, text, tokenizer), role, line, part, f"{title}\0{text}"))
        while len(samples) < self.unit(options):
            samples.append(_sample(format_.query("", tokenizer), NOTHING, line, len(samples), ""))
        return samples


class InverseCloze(_Retriever):
    """The recipe of `ict`."""

    task = "ict"
    formats: tuple[str, ...] = (TEXT,)
    Options: type[Section] = IctOptions

    def unit(self, options: Section) -> int:
        """A sentence and its block."""
        return 2

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """By its text."""
        return TEXT if "text" in row else None

    def check(self, row: Mapping[str, Any], format: str, *, file: str, line: int) -> list[Finding]:
        """A text, and a title where there is one."""
        check = RowCheck(row, file=file, line=line)
        check.keys(("text", "title", "id", "url", "source"))
        check.text("text")
        if "title" in row:
            check.value("title", str)
        return check.findings

    def encode(self, row: Mapping[str, Any], line: int, context: Context, *, file: str) -> Sequence[Sample | Finding]:
        """A pair for each block of the document."""
        format_, tokenizer, options = _format(context), context.tokenizer, context.options
        assert isinstance(options, IctOptions)
        title = str(row.get("title", ""))
        samples: list[Sample] = []
        for block in blocks_of(row["text"], title, tokenizer, room=format_.max_passage_tokens):
            sentence, rest = taken(block, options.kept_in_block)
            first, part = len(samples), len(samples) // 2
            query, passage = format_.query(sentence, tokenizer), format_.passage(title, rest, tokenizer)
            samples.append(_sample(query, QUERY, line, first, "", pair=part))
            samples.append(_sample(passage, ANSWER, line, first + 1, f"{title}\0{rest}", pair=part))
        if not samples:
            rule = (
                f"makes no block: it needs at least {MIN_SENTENCES} sentences, none of them above "
                f"{MAX_SENTENCE_TOKENS} tokens."
            )
            hint = "Remove the row, or allow some in data.bad_rows_allowed."
            return [finding("E-DATA-022", rule, file=file, line=line, path="text", hint=hint)]
        return samples


def check_joins(base: ModelConfig) -> None:
    """
    One encoder is to be trained.

    Raises:
        FinetuneError: `invalid_config`, the base is two.
    """
    if base.has_twin:
        raise refuse(
            "invalid_config",
            "options.shared must be false or left out: the base is two encoders. Given: true.",
            param="options.shared",
            hint="Name a base of one encoder, or train both.",
        )


def ranks_of(outputs: Sequence[Output]) -> list[int]:
    """
    Of each question the place of its best answer among all passages, from 1; passages with an answer's text aside.
    """
    columns = [output.sample.columns for output in outputs]
    queries = [i for i, c in enumerate(columns) if c["role"] == QUERY]
    passages = [i for i, c in enumerate(columns) if c["role"] in (ANSWER, OTHER)]
    if not queries:
        return []
    values = np.stack([output.values for output in outputs]).astype(np.float64)
    scores = values[queries] @ values[passages].T
    keys = np.array([columns[i]["key"] for i in passages])
    answers: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for at, i in enumerate(passages):
        if columns[i]["role"] == ANSWER:
            answers[outputs[i].sample.row, columns[i]["pair"]].append(at)
    found = []
    for row, i in zip(scores, queries, strict=True):
        own = answers[outputs[i].sample.row, columns[i]["pair"]]
        found.append(1 + int(((row > row[own].max()) & ~np.isin(keys, keys[own])).sum()))
    return found


def _format(context: Context) -> RetrievalFormat:
    options, model = context.options, context.model
    assert isinstance(options, RetrieverOptions)
    best = RetrievalFormat.for_encoder(
        normalize=model.normalize, hidden_size=model.hidden_size, max_context=context.max_tokens
    )
    return RetrievalFormat(
        max_query_tokens=options.max_query_tokens or best.max_query_tokens,
        max_passage_tokens=context.max_tokens,
        title=best.title,
        score_scale=options.score_scale or best.score_scale,
        reads="passages" if model.has_twin else "both",
    )


def _sample(encoded: Encoded, role: int, line: int, part: int, text: str, *, pair: int = 0) -> Sample:
    columns = {"role": role, "pair": pair, "key": _key(text), "supervised": int(role == QUERY)}
    return Sample(encoded.tokens, columns=columns, row=line, part=part)


def _key(text: str) -> int:
    """31 bits of a passage's text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") >> 1


def taken(block: Block, kept: float) -> tuple[str, str]:
    """A sentence of a block, and the block, most often without it: by its text alone, so every time the same."""
    drawn = hashlib.blake2b(" ".join(block.sentences).encode(), digest_size=16).digest()
    chosen = int.from_bytes(drawn[:8], "little") % len(block.sentences)
    stays = int.from_bytes(drawn[8:], "little") / math.ldexp(1, 64) < kept
    rest = block.sentences if stays else [s for i, s in enumerate(block.sentences) if i != chosen]
    return block.sentences[chosen], " ".join(rest)


def _check_passage(path: str, item: Any, check: RowCheck) -> str | None:
    if not isinstance(item, dict):
        check.add("E-DATA-008", path, f"must be an object with title and text. Given: {shown(item)}.")
        return None
    check.keys(_PASSAGE_KEYS, row=item, path=path)
    if "title" in item:
        check.value(f"{path}.title", str, row=item)
    return check.text(f"{path}.text", row=item)


_PASSAGE_KEYS: tuple[str, ...] = ("title", "text", "id", "score", "passage_id", "title_score", "psg_id")
