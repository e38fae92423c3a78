"""Prepared data: what was written is read, a directory is whole or not there, and its key says what it holds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finetune_data.data_fixtures import MakeContext, WriteRows
from hypothesis import given, settings
from hypothesis import strategies as st

from trilithon_finetune.config import JobConfig, parse_config
from trilithon_finetune.data.prepare import prepare, prepared_key
from trilithon_finetune.data.prepared import PreparedFacts, open_prepared, write_prepared
from trilithon_finetune.errors import FinetuneError
from trilithon_finetune.recipes import RECIPES
from trilithon_finetune.recipes.base import Sample

FACTS: dict[str, Any] = {
    "digest": "d",
    "task": "sft",
    "labels": ("a", "b"),
    "unit": 1,
    "rows": 0,
    "bad_rows": 0,
    "dropped": 0,
    "truncated": 0,
    "made_from": {"train": "x"},
}


@st.composite
def _samples(draw: st.DrawFn) -> list[Sample]:
    """Samples that have targets, types and columns alike."""
    targets, types, names = draw(st.booleans()), draw(st.booleans()), draw(st.sets(st.sampled_from("ab")))
    token = st.integers(-1, 2**31 - 1)
    samples = []
    for row in range(draw(st.integers(0, 6))):
        length = draw(st.integers(1, 9))
        line = st.lists(token, min_size=length, max_size=length).map(tuple)
        samples.append(
            Sample(
                tokens=draw(line),
                targets=draw(line) if targets else (),
                types=draw(line) if types else (),
                columns={name: draw(token) for name in sorted(names)},
                row=row,
                part=draw(st.integers(0, 3)),
                cut=draw(st.integers(0, 3)),
            )
        )
    return samples


@settings(max_examples=40, deadline=None)
@given(train=_samples(), valid=_samples())
def test_samples_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, train: list[Sample], valid: list[Sample]
) -> None:
    """Tokens, targets, types, columns, rows and parts are read as they were written, and the facts count them."""
    directory = tmp_path_factory.mktemp("prepared") / "data"
    facts = write_prepared(directory, train, valid, facts=FACTS)
    prepared = open_prepared(directory, verify=True)

    assert [prepared.train.sample(i) for i in range(len(prepared.train))] == train
    assert [prepared.valid.sample(i) for i in range(len(prepared.valid))] == valid
    assert prepared.train.supervised.tolist() == [sample.num_supervised for sample in train]
    assert facts.train.tokens == sum(len(sample.tokens) for sample in train)
    assert facts == prepared.facts
    assert sorted(path.name for path in directory.iterdir()) == ["index.json", "train.safetensors", "valid.safetensors"]


def test_files_are_safetensors(tmp_path: Path) -> None:
    """Any reader of safetensors takes the files."""
    from safetensors.numpy import load_file

    write_prepared(tmp_path / "data", [Sample((1, 2, 3), (2, 3, -1), row=4)], [], facts=FACTS)
    arrays = load_file(tmp_path / "data" / "train.safetensors")

    assert {name: values.tolist() for name, values in arrays.items()} == {
        "tokens": [1, 2, 3],
        "targets": [2, 3, -1],
        "offsets": [0, 3],
        "row": [4],
        "part": [0],
        "cut": [0],
        "supervised": [2],
    }


def test_R10_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """A directory is there whole or not at all, and nothing of the attempt stays."""

    def broken() -> Iterator[Sample]:
        yield Sample((1,))
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError):
        write_prepared(tmp_path / "data", broken(), [], facts=FACTS)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("harm", ["cut", "flip", "index", "header", "format"])
def test_R11_a_damaged_directory_is_refused(tmp_path: Path, harm: str) -> None:
    """Missing bytes, changed bytes and a broken index are found when the directory is opened, with what to do."""
    directory = tmp_path / "data"
    write_prepared(directory, [Sample((1, 2, 3))], [], facts=FACTS)
    path, index = directory / "train.safetensors", directory / "index.json"
    raw = path.read_bytes()
    if harm == "cut":
        path.write_bytes(raw[:-1])
    elif harm == "flip":
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif harm == "index":
        index.write_text("{")
    elif harm == "header":
        path.write_bytes(b"\xff" * len(raw))
    else:
        index.write_text(index.read_text().replace('"format": 1', '"format": 2'))

    with pytest.raises(FinetuneError, match=r"prepared data data: .*Remove the directory; it is made again\."):
        open_prepared(directory, verify=harm == "flip")


def _config(**data: Any) -> JobConfig:
    return parse_config({"model": "m", "task": "sft", "training_file": "t", "data": data})


def _rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"number {i} is", "completion": f" {i * i}"} for i in range(count)]


def _prepare(config: JobConfig, context: Any, train: Path, valid: Path | None, root: Path) -> PreparedFacts:
    recipe = RECIPES["sft"]
    key = prepared_key(config, recipe, context, train, valid)
    return prepare(config, recipe, context, train, valid, root / key)


def test_validation_rows_are_held_out_by_content(
    tmp_path: Path, make_context: MakeContext, write_rows: WriteRows
) -> None:
    """
    The same rows are held out in whatever order the file has them, none is in both parts, and none is lost.

    Inverse check: holding out by line number instead of content fails here.
    """
    config, context, rows = _config(validation_share=0.3), make_context(), _rows(40)
    shuffled = random.Random(1).sample(rows, len(rows))
    held = []
    for name, order in (("a", rows), ("b", shuffled)):
        path = write_rows(order, name=f"{name}.jsonl")
        facts = _prepare(config, context, path, None, tmp_path)
        prepared = open_prepared(tmp_path / facts.digest)
        lines = {
            p: [part.sample(i).row for i in range(len(part))]
            for p, part in (("t", prepared.train), ("v", prepared.valid))
        }
        assert sorted(lines["t"] + lines["v"]) == list(range(1, 41))
        assert facts.train.samples + facts.valid.samples == 40
        held.append({order[line - 1]["prompt"] for line in lines["v"]})

    assert held[0] == held[1]
    assert 4 <= len(held[0]) <= 20


def test_the_key_is_of_everything_that_matters(
    tmp_path: Path, make_context: MakeContext, write_rows: WriteRows
) -> None:
    """Another file, length, option, template or tokenizer end gives another key; a name does not."""
    recipe, path = RECIPES["sft"], write_rows(_rows(3))
    same, other = write_rows(_rows(3), name="renamed.jsonl"), write_rows(_rows(4), name="other.jsonl")
    context, config = make_context(), _config()
    key = prepared_key(config, recipe, context, path, None)
    changed = [
        prepared_key(config, recipe, context, other, None),
        prepared_key(config, recipe, context, path, other),
        prepared_key(config, recipe, replace(context, max_tokens=64), path, None),
        prepared_key(config, recipe, replace(context, on_long="drop"), path, None),
        prepared_key(config, recipe, replace(context, train_on="all"), path, None),
        prepared_key(config, recipe, make_context(template="{{ messages }}"), path, None),
        prepared_key(_config(validation_share=0.5), recipe, context, path, None),
        prepared_key(config, RECIPES["lm"], context, path, None),
    ]

    assert key == prepared_key(config, recipe, context, same, None)
    assert len({key, *changed}) == len(changed) + 1


def test_prepared_data_is_used_again(tmp_path: Path, make_context: MakeContext, write_rows: WriteRows) -> None:
    """The next job with the same key finds the directory and writes nothing; progress ends at 1 either way."""
    path, context, config, recipe = write_rows(_rows(30)), make_context(), _config(), RECIPES["sft"]
    directory = tmp_path / prepared_key(config, recipe, context, path, None)
    told: list[float] = []
    first = prepare(config, recipe, context, path, None, directory, on_progress=told.append)
    stamp = (directory / "index.json").stat().st_mtime_ns
    again = prepare(config, recipe, context, path, None, directory, on_progress=told.append)

    assert first == again
    assert (directory / "index.json").stat().st_mtime_ns == stamp
    assert told == sorted(told)
    assert told[-2:] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("rows", "data", "code", "says"),
    [
        ([{"prompt": "a"}], {}, "invalid_training_file", "E-DATA-008  train.jsonl:1  completion: is missing."),
        ([], {}, "invalid_training_file", "E-DATA-001  train.jsonl  has no rows."),
        ([*_rows(1), *_rows(1), {"a": 1}], {}, "invalid_training_file", "^E-DATA-007  train.jsonl:3"),
        (_rows(2), {"validation_share": 1e-9}, "invalid_config", "holds out no row of 2"),
        (_rows(2), {"validation_share": 1 - 1e-9}, "invalid_config", "holds out every row of 2"),
    ],
    ids=["bad row", "empty", "behind a warning", "none held out", "all held out"],
)
def test_R11_what_cannot_be_trained_on_is_refused(
    tmp_path: Path,
    make_context: MakeContext,
    write_rows: WriteRows,
    rows: list[dict[str, str]],
    data: dict[str, Any],
    code: str,
    says: str,
) -> None:
    """A file without usable rows, or a share that leaves one part empty, is refused in words; nothing is written."""
    path = write_rows(rows)
    with pytest.raises(FinetuneError, match=says) as raised:
        _prepare(_config(**data), make_context(), path, None, tmp_path / "prepared")

    assert raised.value.error.code == code
    assert not list((tmp_path / "prepared").glob("*"))
