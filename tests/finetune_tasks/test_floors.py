"""The floors that a trained model must beat, from the data alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from trilithon_finetune.converters import convert
from trilithon_finetune.converters.conll import without_shared
from trilithon_finetune.metrics.span_f1 import micro, span_scores

FLOORS = Path(__file__).resolve().parents[2] / "benchmarks" / "quality" / "floors.py"

SharedData = Callable[[str], Path]


@pytest.fixture(scope="module")
def floors() -> ModuleType:
    """The benchmark's module, which is no package."""
    spec = importlib.util.spec_from_file_location("quality_floors", FLOORS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "expected", "seen"),
    [
        ("ncbi_disease", {"Disease": (80.7, 54.1, 64.8), "all": (80.7, 54.1, 64.8)}, 64.8),
        (
            "bc5cdr",
            {"Chemical": (94.6, 61.8, 74.8), "Disease": (84.7, 54.5, 66.3), "all": (90.3, 58.6, 71.0)},
            63.3,
        ),
    ],
)
def test_acc_F01_dictionary_floors(
    shared_data: SharedData,
    floors: ModuleType,
    name: str,
    expected: dict[str, tuple[float, float, float]],
    seen: float,
) -> None:
    """
    A dictionary of the training mentions reaches the published precision, recall and F1, to 0.1 points.

    Seen to fail with a dictionary that keeps every mention, whatever share of its occurrences is an entity.
    """
    files = (shared_data(f"biomed/{name}_{side}.tsv") for side in ("train", "devel"))
    train, devel = (convert("conll", file.read_bytes()).train for file in files)
    scores = span_scores([row["tags"] for row in devel], floors.dictionary_tags(without_shared(train, devel), devel))

    for type_, score in {**scores, "all": micro(scores)}.items():
        reached = [100 * value for value in (score.precision, score.recall, score.f1)]
        assert reached == pytest.approx(expected[type_], abs=0.1)
    assert 100 * floors.seen_share(train, devel) == pytest.approx(seen, abs=0.1)


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("squad", "xquad_en.json", 15.5),
        ("qed", "qed_nq_dev.jsonl", 19.1),
        ("covidqa", "covidqa_windows.jsonl", 35.8),
    ],
)
def test_acc_F02_best_sentence_floors(
    shared_data: SharedData, floors: ModuleType, name: str, file: str, expected: float
) -> None:
    """The sentence that is most like the question has the published F1, to 0.1 points."""
    split = convert(name, shared_data(f"qa/{file}").read_bytes())

    assert 100 * floors.sentence_f1([*split.train, *split.dev]) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("between", "expected"), [(False, 19.9), (True, 24.0)], ids=["sentence", "between"])
def test_acc_F02_linear_floors(shared_data: SharedData, floors: ModuleType, between: bool, expected: float) -> None:
    """A linear model on hashed words reaches the published F1 of relations, to 3 points, and equally each time."""
    split = convert("drugprot", shared_data("biomed/drugprot_re.jsonl").read_bytes())

    assert 100 * floors.linear_relation_f1(split.train, split.dev, between=between) == pytest.approx(expected, abs=3)
