"""Published data as rows: offsets, counts and splits of the real files, and small broken ones."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_tasks.encoder_fixtures import context_for
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2

from trilithon_finetune.converters import CONVERTERS, convert, split_every_fifth
from trilithon_finetune.converters.conll import read_conll, to_conll, without_shared
from trilithon_finetune.converters.drugprot import read_drugprot, relation_rows, tagging_rows
from trilithon_finetune.converters.pubtator import Mention, read_pubtator, tagged_sentences
from trilithon_finetune.converters.questions import json_lines
from trilithon_finetune.converters.squad import read_squad
from trilithon_finetune.data.check import check_file
from trilithon_finetune.metrics.classification import positive_scores
from trilithon_finetune.metrics.span_f1 import micro, span_scores
from trilithon_finetune.recipes import RECIPES
from trilithon_parallel.tokenizer import Tokenizer
from trilithon_server.tasks.pieces import split_words
from trilithon_server.tasks.tagging import labels_of

SharedData = Callable[[str], Path]

SETS = [
    ("conll", "biomed/ncbi_disease_devel.tsv", (923, 0)),
    ("pubtator", "biomed/bc5cdr_sample_pubtator.txt", None),
    ("drugprot", "biomed/drugprot_re.jsonl", (4475, 1112)),
    ("drugprot13", "biomed/drugprot_re.jsonl", (4475, 1112)),
    ("squad", "qa/xquad_en.json", (759, 232)),
    ("qed", "qa/qed_nq_dev.jsonl", (1084, 271)),
    ("covidqa", "qa/covidqa_windows.jsonl", None),
    ("pubmedqa", "qa/pubmedqa_pqal.jsonl", (400, 100)),
    ("persona_chat", "dialogue/synthetic_persona_chat_valid.jsonl", (800, 200)),
    ("topical_chat", "dialogue/topical_chat_valid_freq.jsonl", (1282, 344)),
    ("begin", "dialogue/begin_wow.jsonl", (629, 184)),
]


@pytest.mark.parametrize(("name", "file", "sizes"), SETS, ids=[name for name, _, _ in SETS])
def test_rows_of_real_data_are_sound(
    shared_data: SharedData, tokenizer: Tokenizer, name: str, file: str, sizes: tuple[int, int] | None
) -> None:
    """Every row of every set passes its recipe's checks, also after a round through JSON, and some become samples."""
    split = convert(name, shared_data(file).read_bytes())
    recipe = RECIPES[CONVERTERS[name].task]
    rows = json.loads(json.dumps([*split.train, *split.dev]))

    assert sizes is None or sizes == (len(split.train), len(split.dev))
    findings = [
        item for i, row in enumerate(rows) for item in recipe.check(row, _format(recipe, row), file="f", line=i)
    ]
    assert findings == []
    options = recipe.Options()
    context = context_for(recipe, tokenizer, labels=recipe.labels(rows, options), on_long="truncate")
    for i, row in enumerate(rows[:20], start=1):
        assert all(hasattr(sample, "tokens") for sample in recipe.encode(row, i, context, file="f"))


def _format(recipe: Any, row: Any) -> str:
    format_ = recipe.detect(row)
    assert format_ in recipe.formats
    return str(format_)


def test_real_files_are_usable_as_they_stand(shared_data: SharedData, minilm_tokenizer: Tokenizer) -> None:
    """The NCBI files go through the check: every token is supervised once, and what both files hold is said."""
    context = context_for(RECIPES["ner"], minilm_tokenizer)
    files = [shared_data(f"biomed/ncbi_disease_{side}.tsv") for side in ("train", "devel")]
    report = check_file(files[0], recipe=RECIPES["ner"], context=context, validation=files[1])

    assert report.ok
    assert (report.rows, report.usable_rows, report.supervised_tokens) == (5424, 5424, 135701)
    assert report.labels == ("O", "B-Disease", "I-Disease")
    (shared,) = [item for item in report.findings if item.code == "E-DATA-032"]
    assert shared.message.startswith("stands in ncbi_disease_devel.tsv too (5 rows of it, 0.5%): lines 193, 23447")


def test_documents_stand_on_one_side(shared_data: SharedData) -> None:
    """COVID-QA's windows of one article, and XQuAD's paragraphs, are never both learned and asked for."""
    covid = list(json_lines(_bytes(shared_data, "qa/covidqa_windows.jsonl")))
    sides = split_every_fifth(covid, unit=lambda row: row["document_id"])
    squad = convert("squad", _bytes(shared_data, "qa/xquad_en.json"))
    titles = [{row["title"] for row in side} for side in (squad.train, squad.dev)]

    assert not {row["document_id"] for row in sides[0]} & {row["document_id"] for row in sides[1]}
    assert (len(titles[0]), len(titles[1])) == (31, 8)
    assert not titles[0] & titles[1]


def test_acc_F02_offsets_of_real_mentions_are_exact(shared_data: SharedData) -> None:
    """
    All 925 mentions of the PubTator sample and all 8,887 DrugProt entities are what their characters say.

    The readers refuse a file of which this does not hold; seen red with one offset moved.
    """
    documents = read_pubtator(_bytes(shared_data, "biomed/bc5cdr_sample_pubtator.txt"))
    mentions = [(item.text[m.start : m.end], m.text) for item in documents for m in item.mentions]
    abstracts = read_drugprot(_bytes(shared_data, "biomed/drugprot_re.jsonl"))
    entities = [(item.text[m.start : m.end], m.text) for item in abstracts for m in item.mentions.values()]

    assert (len(documents), len(mentions), len(abstracts), len(entities)) == (50, 925, 350, 8887)
    assert all(there == said for there, said in [*mentions, *entities])


def test_acc_F02_relation_rows_point_at_the_mentions(shared_data: SharedData) -> None:
    """In each row's sentence the characters of a and b are the mentions of the abstract."""
    for abstract in read_drugprot(_bytes(shared_data, "biomed/drugprot_re.jsonl"))[:60]:
        texts = {mention.text for mention in abstract.mentions.values()}
        for row in relation_rows(abstract, "chemprot5"):
            assert {row["text"][row[name]["start"] : row[name]["end"]] for name in "ab"} <= texts
            assert row["text"] in abstract.text


def test_acc_F02_pair_counts_and_constant_floors(shared_data: SharedData) -> None:
    """5,587 pairs by class, their split, and what constant answers reach."""
    split = convert("drugprot", _bytes(shared_data, "biomed/drugprot_re.jsonl"))
    counts = Counter(row["label"] for row in [*split.train, *split.dev])
    gold = [row["label"] for row in split.dev]

    wanted = {"CPR:4": 605, "CPR:9": 338, "CPR:3": 315, "CPR:6": 153, "CPR:5": 61, "false": 4115}
    assert dict(counts) == wanted
    assert (len(split.train), len(split.dev), gold.count("false")) == (4475, 1112, 817)
    assert f"{gold.count('false') / len(gold):.3f}" == "0.735"
    assert positive_scores(gold, ["false"] * len(gold), negative="false").f1 == 0.0
    assert f"{positive_scores(gold, ['CPR:4'] * len(gold), negative='false').f1:.3f}" == "0.173"


def test_a_pair_with_two_relations_takes_the_first_mapped(shared_data: SharedData) -> None:
    """29 pairs have two; the native classes take the first of the file."""
    abstracts = read_drugprot(_bytes(shared_data, "biomed/drugprot_re.jsonl"))
    two = [classes for abstract in abstracts for classes in abstract.relations.values() if len(classes) > 1]
    native = Counter(row["label"] for abstract in abstracts for row in relation_rows(abstract, "drugprot13"))

    assert len(two) == 29
    assert native["false"] < 4115
    assert native["DIRECT-REGULATOR"] + native["PART-OF"] >= 4115 - native["false"]
    assert sum(native.values()) == 5587


@pytest.mark.parametrize("file", ["ncbi_disease_devel", "bc5cdr_devel"])
def test_acc_F01_span_f1_equals_seqeval_on_real_tags(shared_data: SharedData, file: str) -> None:
    """Mentions are counted right, gold against gold is 1, and three damaged copies score as seqeval says."""
    rows = convert("conll", _bytes(shared_data, f"biomed/{file}.tsv")).train
    gold = [list(row["tags"]) for row in rows]
    generator = random.Random(7)

    def flip(tag: str) -> str:
        return generator.choice(labels_of(["Disease", "Chemical"])) if generator.random() < 0.05 else tag

    damaged = [
        [[flip(tag) for tag in tags] for tags in gold],
        [["O" if tag[0] == "B" and generator.random() < 0.2 else tag for tag in tags] for tags in gold],
        [["O", *tags[:-1]] if generator.random() < 0.1 else list(tags) for tags in gold],
    ]
    scores = span_scores(gold, gold)
    counts = {"Disease": 787} if "ncbi" in file else {"Chemical": 5347, "Disease": 4246}
    assert counts == {name: score.gold for name, score in scores.items()}
    assert micro(scores).f1 == 1.0
    for predicted in damaged:
        ours = micro(span_scores(gold, predicted)).f1
        assert 0.3 < ours < 1.0
        assert ours == pytest.approx(f1_score(gold, predicted, mode="strict", scheme=IOB2), abs=1e-12)


def test_sentences_of_both_ncbi_files_are_dropped(shared_data: SharedData) -> None:
    """Five sentences of the devel file occur in the training file, there in twelve places."""
    sides = [
        convert("conll", _bytes(shared_data, f"biomed/ncbi_disease_{side}.tsv")).train for side in ("train", "devel")
    ]
    kept = without_shared(*sides)
    shared = {tuple(row["tokens"]) for row in sides[0]} & {tuple(row["tokens"]) for row in sides[1]}

    assert (len(shared), len(sides[0]) - len(kept)) == (5, 12)
    assert not {tuple(row["tokens"]) for row in kept} & shared


@pytest.mark.parametrize("file", ["ncbi_disease_train", "bc5cdr_devel"])
def test_our_words_are_those_of_the_corpora(shared_data: SharedData, file: str) -> None:
    """A text that is made of a corpus's tokens is split into these tokens, so recipe and server see equal words."""
    for row in convert("conll", _bytes(shared_data, f"biomed/{file}.tsv")).train:
        text = " ".join(row["tokens"])
        assert list(row["tokens"]) == [text[start:end] for start, end in split_words(text)]


def test_pubtator_rows_equal_the_corpus_in_iob(shared_data: SharedData) -> None:
    """The sentences that we cut and tag out of the 50 abstracts are those of the published training file in IOB."""
    published = {
        (tuple(row["tokens"]), tuple(row["tags"]))
        for row in convert("conll", _bytes(shared_data, "biomed/bc5cdr_train.tsv")).train
    }
    split = convert("pubtator", _bytes(shared_data, "biomed/bc5cdr_sample_pubtator.txt"))
    rows = [(tuple(row["tokens"]), tuple(row["tags"])) for row in [*split.train, *split.dev]]

    assert sum(row in published for row in rows) / len(rows) > 0.9


def test_conll_reads_what_it_writes() -> None:
    """Tabs or spaces, carriage returns, several columns, document marks; lines are those of the file."""
    document = b"-DOCSTART- X\r\n\r\nIL-2 NN B-x\r\nis VB O\r\n\r\n\r\nit\tO\n"
    rows = read_conll(document, file="a.tsv")

    assert rows == [{"tokens": ["IL-2", "is"], "tags": ["B-x", "O"]}, {"tokens": ["it"], "tags": ["O"]}]
    assert [row.line for row in rows] == [3, 7]  # type: ignore[union-attr]  # rows, not findings
    again = read_conll(to_conll(rows).encode(), file="b.tsv")  # type: ignore[arg-type]  # rows, not findings
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in again]  # type: ignore[index]


def test_a_broken_conll_line_is_named() -> None:
    """Each line without a tag, and the first byte that is no UTF-8."""
    assert [item.line for item in read_conll(b"a\tO\nb\nc\n", file="f")] == [2, 3]  # type: ignore[union-attr]
    (finding,) = read_conll(b"a\tO\n\xff\tO\n", file="f")
    assert (finding.code, finding.line) == ("E-DATA-002", 2)  # type: ignore[union-attr]


def test_mentions_become_whole_words_the_longest_first() -> None:
    """A mention within a word takes the word; of overlapping ones the longest; two that touch are two."""
    text = "Anti-COX2 drug. Aspirin."
    mentions = [Mention(5, 8, "G", "COX"), Mention(0, 9, "D", "Anti-COX2"), Mention(16, 20, "C", "Aspi")]
    rows = tagged_sentences(text, [*mentions, Mention(10, 14, "D", "drug")])

    assert rows[0] == {"tokens": ["Anti", "-", "COX2", "drug", "."], "tags": ["B-D", "I-D", "I-D", "B-D", "O"]}
    assert rows[1] == {"tokens": ["Aspirin", "."], "tags": ["B-C", "O"]}


def test_entities_of_drugprot_are_rows_too(shared_data: SharedData) -> None:
    """Chemicals and genes, both kinds of genes as one type."""
    abstract = read_drugprot(_bytes(shared_data, "biomed/drugprot_re.jsonl"))[0]
    rows = tagging_rows(abstract)

    assert {"B-CHEMICAL", "B-GENE", "O"} <= {tag for row in rows for tag in row["tags"]}
    assert RECIPES["ner"].check(rows[0], "tokens/tags", file="f", line=1) == []


@pytest.mark.parametrize(
    ("document", "paths"),
    [
        ({"data": {}}, ["data"]),
        ({"data": [{"title": "t"}]}, ["data[0].paragraphs"]),
        ({"data": [1, {"paragraphs": [{"context": "c"}]}]}, ["data[0]", "data[1].paragraphs[0].qas"]),
    ],
)
def test_a_broken_squad_frame_is_named(document: Any, paths: list[str]) -> None:
    """Every part that is no list or no object, by its path."""
    found = read_squad(json.dumps(document).encode(), file="f")

    assert found is not None
    assert paths == [item.path for item in found]  # type: ignore[union-attr]  # findings, not rows


@pytest.mark.parametrize("document", [b'{"question": 1}\n{"question": 2}\n', b"[]", b"data", b"\xff"])
def test_what_is_no_squad_document_is_left_to_others(document: bytes) -> None:
    """JSON lines, other JSON, no JSON."""
    assert read_squad(document, file="f") is None


@pytest.mark.parametrize(
    ("name", "document", "message"),
    [
        ("drugprot", b"{}\n", "not drugprot data: KeyError"),
        ("squad", b"[]", "must be one JSON object with a list `data`"),
        ("conll", b"a\n", "line 1"),
        ("nothing", b"", "a converter must be one of conll"),
        ("pubtator", b"1|t|Title\n1\t0\t3\tTix\tX\tD1\n", "line 2: characters 0 to 3"),
    ],
)
def test_other_data_is_refused_in_one_sentence(name: str, document: bytes, message: str) -> None:
    """A file of another form is named as such, never half converted."""
    with pytest.raises(ValueError, match=message):
        convert(name, document)


def _bytes(shared_data: SharedData, file: str) -> bytes:
    return shared_data(file).read_bytes()
