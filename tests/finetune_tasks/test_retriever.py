"""Rows of the retrieval tasks: what is checked, what a unit holds, blocks of documents, and ranks of a validation."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from finetune_jobs import make_job, write_rows
from finetune_tasks.encoder_fixtures import CLS, SEP, context_for, samples_of
from task_rows import rows

from trilithon_finetune.data.findings import Finding
from trilithon_finetune.recipes import RECIPES
from trilithon_finetune.recipes.base import Output, Sample
from trilithon_finetune.recipes.blocks import MAX_SENTENCE_TOKENS, blocks_of
from trilithon_finetune.recipes.retriever import DprOptions, ranks_of, taken
from trilithon_parallel.contrast_terms import ANSWER, NOTHING, OTHER, QUERY
from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.knowledge.sentences import split_sentences
from trilithon_server.tasks.retrieval import RetrievalFormat

DPR, ICT = RECIPES["dpr"], RECIPES["ict"]
SharedData = Callable[[str], Path]
ROW: dict[str, Any] = {
    "question": "who wrote it?",
    "positive_ctxs": [{"title": "the pain", "text": "aspirin of it"}, {"text": "not learned"}],
    "hard_negative_ctxs": [{"title": "", "text": "cox"}],
    "negative_ctxs": [{"text": "and"}, {"text": "in"}],
}


def words(sample: Sample, tokenizer: Tokenizer) -> str:
    return " ".join(tokenizer.id_to_piece(token) for token in sample.tokens)


@pytest.mark.parametrize(
    ("wanted", "roles"),
    [(0, []), (1, [OTHER]), (2, [OTHER, OTHER]), (4, [OTHER, OTHER, OTHER, NOTHING])],
)
def test_a_row_is_a_question_its_passage_and_negatives(tokenizer: Tokenizer, wanted: int, roles: list[int]) -> None:
    """The first positive passage alone, hard negatives before others, and empty ones where the row has too few."""
    context = context_for(DPR, tokenizer, options={"hard_negatives": wanted})
    samples = samples_of(list(DPR.encode(ROW, 3, context, file="f")))  # type: ignore[arg-type]

    assert [sample.columns["role"] for sample in samples] == [QUERY, ANSWER, *roles]
    assert len(samples) == DPR.unit(context.options)
    assert words(samples[0], tokenizer) == "[CLS] who wrote it ? [SEP]"
    assert words(samples[1], tokenizer) == "[CLS] the pain [SEP] aspirin of it [SEP]"
    assert [words(sample, tokenizer) for sample in samples[2:4]] == ["[CLS] cox [SEP]", "[CLS] and [SEP]"][:wanted]
    assert [sample.num_supervised for sample in samples] == [1] + [0] * (len(samples) - 1)
    assert {sample.row for sample in samples} == {3}


@pytest.mark.parametrize(
    ("base", "shared", "encoders"),
    [
        ({}, None, 2),
        ({}, True, 1),
        ({"normalize": True, "pooling": "mean"}, None, 1),
        ({"normalize": True, "pooling": "mean"}, False, 2),
        ({"normalize": True, "pooling": "mean", "has_twin": True}, None, 2),
    ],
)
def test_a_trained_encoder_stays_one_and_others_become_two(
    tokenizer: Tokenizer, base: dict[str, Any], shared: bool | None, encoders: int
) -> None:
    """Questions and passages have an encoder each (2101.00408, 2.1), but for a base that compares texts already."""
    start = replace(context_for(DPR, tokenizer).model, **base)
    model = DPR.trained(start, DprOptions(shared=shared), None)

    assert model.has_twin == (encoders == 2)


def test_one_text_has_one_key(tokenizer: Tokenizer) -> None:
    """Passages of the same title and text are told to be one, wherever they stand."""
    context = context_for(DPR, tokenizer)
    first = samples_of(list(DPR.encode(ROW, 1, context, file="f")))  # type: ignore[arg-type]
    again = samples_of(list(DPR.encode({**ROW, "question": "and?"}, 2, context, file="f")))  # type: ignore[arg-type]

    assert first[1].columns["key"] == again[1].columns["key"] != first[2].columns["key"]


@pytest.mark.parametrize(
    ("row", "code", "path"),
    [
        ({"positive_ctxs": ROW["positive_ctxs"]}, "E-DATA-008", "question"),
        ({"question": "who?"}, "E-DATA-008", "positive_ctxs"),
        ({"question": "who?", "positive_ctxs": []}, "E-DATA-015", "positive_ctxs"),
        ({"question": " ", "positive_ctxs": [{"text": "a"}]}, "E-DATA-015", "question"),
        ({"question": "who?", "positive_ctxs": ["a"]}, "E-DATA-008", "positive_ctxs[0]"),
        ({"question": "who?", "positive_ctxs": [{"title": "a"}]}, "E-DATA-008", "positive_ctxs[0].text"),
        ({"question": "who?", "positive_ctxs": [{"txt": "a"}]}, "E-DATA-007", "positive_ctxs[0].txt"),
        (
            {"question": "who?", "positive_ctxs": [{"text": "a"}], "negative_ctxs": [{"text": "a"}]},
            "E-DATA-041",
            "negative_ctxs[0].text",
        ),
    ],
)
def test_R11_what_is_wrong_with_a_row_is_told(row: dict[str, Any], code: str, path: str) -> None:
    """Missing parts, unknown keys, empty texts, and a passage on both sides."""
    found = DPR.check(row, DPR.formats[0], file="f", line=1)

    assert (found[0].code, found[0].path) == (code, path)


def test_formats_of_titles(tokenizer: Tokenizer) -> None:
    """A separator for encoders from BERT, a sentence for those of sentences; what is long loses its end alone."""
    texts = [
        RetrievalFormat(title=title, max_passage_tokens=9).passage("who", "it, of the pain in it", tokenizer)
        for title in ("separator", "sentence")
    ]
    shown = [" ".join(tokenizer.id_to_piece(token) for token in encoded.tokens) for encoded in texts]

    assert shown == ["[CLS] who [SEP] it , of the pain [SEP]", "[CLS] who . it , of the pain [SEP]"]
    assert RetrievalFormat.from_task_file(RetrievalFormat(title="separator").task_file()).title == "separator"
    assert RetrievalFormat().query("[SEP] who", tokenizer).tokens.count(SEP) == 1
    assert RetrievalFormat().query("", tokenizer).tokens == (CLS, SEP)
    with pytest.raises(ValueError, match="title: Input should be 'separator' or 'sentence'"):
        RetrievalFormat.from_task_file({**RetrievalFormat().task_file(), "title": "none"})


class Remembering:
    """A tokenizer that cuts a sentence once, however many tests ask for its size."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = functools.cache(tokenizer.encode)


@pytest.fixture(scope="module")
def sizer(minilm_tokenizer: Tokenizer) -> Tokenizer:
    """What blocks of these tests are measured with."""
    return cast("Tokenizer", Remembering(minilm_tokenizer))


@pytest.fixture(scope="module")
def articles(shared_data: SharedData) -> list[tuple[str, str]]:
    """Titles and texts of real documents."""
    with shared_data("pretrain/wikipedia_en_articles.jsonl").open(encoding="utf-8") as file:
        return [(document.get("title", ""), document["text"]) for document in map(json.loads, file)]


def sentences_of(text: str) -> list[str]:
    return [" ".join(text[start:end].split()) for start, end in split_sentences(text)]


def size_of(text: str, tokenizer: Tokenizer) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def test_acc_A02_blocks_partition_their_document(articles: list[tuple[str, str]], sizer: Tokenizer) -> None:
    """
    Over all articles: every sentence in one block, in order; at least two a block; full but for the last; long
    sentences leave their document out.

    Inverse check: a block that ends although one sentence is left, and one that goes on where two are left.
    """
    left_out = []
    for title, text in articles:
        blocks = list(blocks_of(text, title, sizer, room=256))
        sentences = sentences_of(text)
        sizes = [size_of(sentence, sizer) for sentence in sentences]
        if max(sizes) > MAX_SENTENCE_TOKENS or len(sentences) < 2:
            assert not blocks
            left_out.append(max(sizes) > MAX_SENTENCE_TOKENS)
            continue
        room = 256 - 3 - size_of(title, sizer)
        counts = [len(block.sentences) for block in blocks]
        bounds = np.cumsum([0, *counts]).tolist()
        assert [s for block in blocks for s in block.sentences] == sentences
        assert min(counts) >= 2
        for first, last in list(pairwise(bounds))[:-1]:
            assert sum(sizes[first:last]) >= room
            assert last - first == 2 or sum(sizes[first : last - 1]) < room
        last = bounds[-2]
        assert len(sentences) - last < 4 or sum(sizes[last:-2]) < room

    assert len(articles) == 104
    assert 0 < sum(left_out) < 20


def test_acc_A02_a_sentence_that_is_too_long_leaves_its_document_out(minilm_tokenizer: Tokenizer) -> None:
    """
    At 512 tokens a sentence is kept, and its document with it; at one more, nothing of the document is.

    Inverse check: no limit, and one token less.
    """
    for size, blocks in ((MAX_SENTENCE_TOKENS, 1), (MAX_SENTENCE_TOKENS + 1, 0)):
        long = "The" + " mill" * (size - 2) + "."
        text = f"The river floods. {long} The town is dry."
        assert max(size_of(sentence, minilm_tokenizer) for sentence in sentences_of(text)) == size
        assert len(list(blocks_of(text, "", minilm_tokenizer, room=256))) == blocks


def test_acc_A02_sentences_are_taken_out_of_nine_blocks_of_ten(
    articles: list[tuple[str, str]], sizer: Tokenizer
) -> None:
    """
    Of 5,000 questions the share that stays in its block is the option's, within three standard deviations.

    Inverse check: a share of 0.13.
    """
    blocks = (block for title, text in articles for block in blocks_of(text, title, sizer, room=64))
    stays, places = [], []
    for block in islice(blocks, 5000):
        sentence, rest = taken(block, 0.1)
        stays.append(rest == " ".join(block.sentences))
        places.append(block.sentences.index(sentence) / (len(block.sentences) - 1))
        assert stays[-1] or len(rest) < len(" ".join(block.sentences))

    assert len(stays) == 5000
    assert abs(sum(stays) / 5000 - 0.1) <= 3 * (0.1 * 0.9 / 5000) ** 0.5
    assert abs(np.mean(places) - 0.5) < 0.05


def test_ict_is_the_same_every_time(tokenizer: Tokenizer) -> None:
    """A block's own text says which sentence is taken; another option takes other ones out."""
    row = {"text": "The pain of it. Aspirin inhibits cox. Who wrote it? In the pain. And of aspirin."}
    kept = context_for(ICT, tokenizer, options={"kept_in_block": 1.0})
    context = context_for(ICT, tokenizer, options={"kept_in_block": 0.0})
    samples = samples_of(list(ICT.encode(row, 1, context, file="f")))  # type: ignore[arg-type]
    whole = samples_of(list(ICT.encode(row, 1, kept, file="f")))  # type: ignore[arg-type]

    assert [s.tokens for s in samples] == [s.tokens for s in ICT.encode(row, 9, context, file="f")]  # type: ignore[union-attr]
    assert samples[0].tokens == whole[0].tokens
    assert len(whole[1].tokens) - len(samples[1].tokens) == len(samples[0].tokens) - 2


NO_BLOCK = ["One sentence alone.", f"Words {'of it ' * MAX_SENTENCE_TOKENS}. And in."]
"""Too few sentences; one that is too long."""


@pytest.mark.parametrize("text", NO_BLOCK, ids=["one sentence", "a long one"])
def test_R11_a_document_without_a_block_is_a_finding(tokenizer: Tokenizer, text: str) -> None:
    """Nothing is left out in silence. Inverse seen: no samples and no finding."""
    (found,) = ICT.encode({"text": text}, 4, context_for(ICT, tokenizer), file="f")

    assert isinstance(found, Finding)
    assert (found.code, found.line, found.path) == ("E-DATA-022", 4, "text")


@pytest.mark.parametrize(("train", "valid", "part"), [(1, 8, "training"), (8, 1, "validation")])
def test_R11_a_file_without_a_block_is_refused(
    minilm_dir: Path, tmp_path: Path, train: int, valid: int, part: str
) -> None:
    """As the owner's mistake, in either file. Inverse seen: a division by zero; a job without a validation."""
    files = [
        write_rows(tmp_path / f"{name}.jsonl", rows("ict", count, first=first) if count > 1 else [{"text": "Alone."}])
        for name, count, first in (("train", train, 0), ("valid", valid, 20))
    ]
    made = make_job(tmp_path, minilm_dir, *files, task="ict", training={"epochs": 1, "batch_size": 4})
    error = made.try_phase("validate")["error"]

    assert (error["code"], error["param"]) == (f"invalid_{part}_file", f"{part}_file")
    assert "E-DATA-022" in error["message"]


def test_ranks_leave_equal_texts_aside() -> None:
    """Passages before the answer count, its own text elsewhere doesn't, and pairs are told apart by row and number."""

    def output(value: list[float], role: int, row: int, key: int, pair: int = 0) -> Output:
        columns = {"role": role, "pair": pair, "key": key, "supervised": int(role == QUERY)}
        return Output(Sample((1, 2), columns=columns, row=row), np.array(value, np.float32))

    outputs = [
        output([1, 0], QUERY, 1, 0),
        output([0.5, 0], ANSWER, 1, 10),
        output([0, 1], QUERY, 1, 0, pair=1),
        output([0, 2], ANSWER, 1, 11, pair=1),
        output([0.9, 0], OTHER, 2, 12),
        output([0.8, 0], OTHER, 3, 10),
        output([9, 9], NOTHING, 3, 13),
    ]

    assert ranks_of(outputs) == [2, 1]
    assert ranks_of(outputs[4:]) == []
