"""
Hold what the real runs reached, as `results/` has it, against the bars that they are to reach.

    python benchmarks/quality/bars.py

A bar is a number, or another number of the same run. The exit status is 1 where one isn't reached or was not run.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Bar:
    """
    Attributes:
        line: the acceptance line. what: is measured. file: of `results/`, without its ending.
        reached: of the file's content. bar: a number, or of the content, too. most: the bar is not to be passed.
    """

    line: str
    what: str
    file: str
    reached: Callable[[Any], float]
    bar: float | Callable[[Any], float]
    most: bool = False


def _f1(runs: list[Any]) -> float:
    return statistics.mean(run["human"]["f1"] for run in runs)


def _best(found: Any, top: str) -> float:
    return max(found["dense"][top], found["bm25"][top]) - 1


def _recall(found: Any, scorer: str) -> float:
    return float(found[scorer]["recall_at_5"]["percent"])


def _share(found: Any, *, of: str) -> float:
    return float(found["perplexity"]["own"] / found["perplexity"][of])


BARS = (
    Bar("A07", "top-20 after inverse cloze", "retrieval_ict", lambda r: r["after"]["dense"]["top_20"], 31),
    *(
        Bar("A08", f"XQuAD, dense, {top}", "retrieval_zero_shot",
            lambda r, top=top: r["xquad_100_words"]["dense"][top], bar)
        for top, bar in (("top_1", 55), ("top_5", 85), ("top_20", 93))
    ),
    *(
        Bar("A08", f"QED, dense, {top}", "retrieval_zero_shot",
            lambda r, top=top: r["qed_paragraphs"]["dense"][top], bar)
        for top, bar in (("top_1", 65), ("top_20", 93))
    ),
    *(
        Bar("A08", f"{data}, hybrid, {top}", "retrieval_zero_shot",
            lambda r, data=data, top=top: r[data]["hybrid"][top],
            lambda r, data=data, top=top: _best(r[data], top))
        for data in ("xquad_100_words", "qed_paragraphs")
        for top in ("top_5", "top_20")
    ),
    Bar("A09", "validation loss of dpr, of its first", "retrieval_dpr",
        lambda r: r["valid_loss_best"] / r["valid_loss_first"], 0.9, most=True),
    Bar("A09", "QED's held-out, top-5", "retrieval_dpr", lambda r: r["after"]["dense"]["top_5"],
        lambda r: r["before"]["dense"]["top_5"] - 1),
    Bar("A09", "from new weights, top-20", "retrieval_dpr_new", lambda r: r["after"]["dense"]["top_20"], 3 * 5.5),
    Bar("A10", "span reader, exact match", "openqa_readers", lambda r: r["span"],
        lambda r: max(10, 3 * r["span_drawn_passages"])),
    Bar("A10", "causal reader, exact match", "openqa_readers", lambda r: r["causal"],
        lambda r: r["causal_closed_book"] + 8),
    Bar("A10", "causal reader, against its first passage", "openqa_readers", lambda r: r["causal"],
        lambda r: r["causal_first_passage"] - 2),
    Bar("B02", "XQuAD in article, dense, recall@5", "retrieval_sentences",
        lambda r: _recall(r["xquad_in_article"], "dense"), 93),
    Bar("B02", "XQuAD in article, hybrid, recall@5", "retrieval_sentences",
        lambda r: _recall(r["xquad_in_article"], "hybrid"),
        lambda r: max(_recall(r["xquad_in_article"], one) for one in ("dense", "bm25", "tfidf")) - 1),
    Bar("B02", "BEGIN, dense, recall@5", "retrieval_sentences", lambda r: _recall(r["begin"], "dense"), 20),
    Bar("B02", "Topical-Chat, section found first", "retrieval_sentences",
        lambda r: max(found["recall_at_1"]["percent"] for found in r["topical_chat_section"].values()
                      if isinstance(found, dict)), 47.1),
    Bar("B04", "perplexity with its knowledge, of another's", "dialogue_grounded",
        lambda r: _share(r["zero_shot"]["attributable"], of="another's"), 0.7, most=True),
    Bar("B04", "perplexity with its knowledge, of none", "dialogue_grounded",
        lambda r: _share(r["zero_shot"]["attributable"], of="none"), 0.7, most=True),
    Bar("B04", "the same where knowledge is not the ground", "dialogue_grounded",
        lambda r: _share(r["zero_shot"]["not_attributable"], of="another's"),
        lambda r: _share(r["zero_shot"]["attributable"], of="another's")),
    Bar("B05", "knowledge F1 of replies", "dialogue_grounded", lambda r: r["lora"]["written"]["knowledge_f1_with"],
        lambda r: 1.5 * r["lora"]["written"]["knowledge_f1_without"]),
    Bar("B05", "perplexity with both", "dialogue_grounded", lambda r: r["lora"]["topical_chat"]["perplexity"]["both"],
        lambda r: 1.01 * min(r["lora"]["topical_chat"]["perplexity"][x] for x in ("knowledge", "references")),
        most=True),
    Bar("C04", "recall@10 of a ranker", "stories_ranker", lambda r: r["recall_at_10"]["finetuned"],
        lambda r: max(3 * r["recall_at_10"]["chance"], r["recall_at_10"]["tfidf"],
                      r["recall_at_10"]["minilm, story alone"] + 0.01)),
    Bar("C05", "sentences with one of their keywords", "stories_keywords", lambda r: r["hits"]["finetuned"],
        lambda r: max(r["hits"]["frequent"] + 0.05, r["hits"]["smollm2"])),
    Bar("C05", "word perplexity", "stories_sentences", lambda r: r["word_perplexity"]["finetuned"],
        lambda r: 0.85 * r["word_perplexity"]["smollm2"], most=True),
    Bar("C06", "control rate", "stories_control", lambda r: r["control_rate"],
        lambda r: max(0.6, r["uncontrolled_rate"] + 0.3)),
    Bar("C06", "antonym rate", "stories_control", lambda r: r["antonym_rate"], 0.4),
    Bar("C06", "the old keyword", "stories_control", lambda r: r["leakage"], lambda r: r["uncontrolled_leakage"],
        most=True),
    Bar("C06", "stories that repeat four words", "stories_control", lambda r: r["repeat_4"]["free"], 0.15, most=True),
    Bar("D06", "gain of one's own persona, lower end", "dialogue_persona",
        lambda r: r["zero_shot"]["gain"]["own on another's"]["low"], 0),
    Bar("D06", "the same gain after a LoRA", "dialogue_persona",
        lambda r: r["lora"]["gain"]["own on another's"]["nats_a_token"],
        lambda r: r["zero_shot"]["gain"]["own on another's"]["nats_a_token"]),
    Bar("D06", "perplexity after a LoRA", "dialogue_persona", lambda r: r["lora"]["perplexity"]["own"],
        lambda r: 0.85 * r["zero_shot"]["perplexity"]["own"], most=True),
    Bar("E05", "answers among five", "synthetic_answers", lambda r: r["joint"][0]["best"]["answer_recall"],
        lambda r: max(0.12, r["independent"][0]["answer_recall"] - 0.01)),
    Bar("E06", "ROUGE-L of questions", "synthetic_questions", lambda r: r["written"]["rouge_l"], 0.27),
    Bar("E06", "questions that can be read", "synthetic_questions", lambda r: r["written"]["parsed"], 0.9),
    Bar("E06", "questions that ask", "synthetic_questions", lambda r: r["written"]["asking"], 0.7),
    Bar("E07", "share that is kept", "synthetic_filter", lambda r: r["keep_rate"], 0.1),
    Bar("E07", "share that is kept, at most", "synthetic_filter", lambda r: r["keep_rate"], 0.95, most=True),
    Bar("E07", "F1 of a second reader on what is kept", "synthetic_filter", lambda r: r["second_reader_f1"]["kept"],
        lambda r: r["second_reader_f1"]["dropped"] + 0.1),
    Bar("E08", "F1 of readers of kept questions", "synthetic_readers", lambda r: _f1(r["kept"]), 0.17),
)  # fmt: skip


@cache
def content(file: str) -> Any:
    """Of a results file; None where it was not written."""
    path = RESULTS / f"{file}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def main() -> None:
    """Tell how each bar stands."""
    table = Table("line", "measured", "file", "reached", "bar", "")
    missed = 0
    for bar in BARS:
        found = content(bar.file)
        if found is None:
            row, is_held = ("", "", "not run"), False
        else:
            reached, limit = bar.reached(found), bar.bar(found) if callable(bar.bar) else bar.bar
            is_held = reached <= limit if bar.most else reached >= limit
            sign = "≤" if bar.most else "≥"
            row = (f"{reached:.4g}", f"{sign} {limit:.4g}", "holds" if is_held else "MISSED")
        missed += not is_held
        table.add_row(bar.line, bar.what, bar.file, *row)
    Console().print(table)
    if missed:
        sys.exit(f"{missed} of {len(BARS)} bars are missed or were not run.")


if __name__ == "__main__":
    main()
