"""The language-model recipes: what each row becomes, token by token, and what is wrong with the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from finetune_data.data_fixtures import MakeContext, WriteRows
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_safetensors
from tiny_tokenizers import TURN_END

from trilithon_finetune.config import Task
from trilithon_finetune.data.check import check_file
from trilithon_finetune.data.findings import Finding
from trilithon_finetune.data.untrained import untrained_tokens
from trilithon_finetune.errors import FinetuneError
from trilithon_finetune.recipes import RECIPES
from trilithon_finetune.recipes.base import IGNORE, Context, Output, Sample
from trilithon_server.tasks.answer_format import answer_prompt, answer_text, read_answer
from trilithon_server.tasks.yes_no_maybe import ANSWERS, yes_no_prompt, yes_no_text

END = 2


def _samples(task: str, row: Mapping[str, Any], context: Context) -> list[Sample]:
    recipe = RECIPES[task]
    form = recipe.detect(row)
    assert form in recipe.formats
    assert not recipe.check(row, form, file="f", line=1)
    found = recipe.encode(row, 1, context, file="f")
    assert all(isinstance(item, Sample) for item in found), found
    return [item for item in found if isinstance(item, Sample)]


def _wrong(task: str, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    recipe = RECIPES[task]
    return [(f.code, f.path) for f in recipe.check(row, recipe.formats[0], file="f", line=1)]


def test_every_task_of_the_configuration_has_a_recipe() -> None:
    """The table knows each task that a job may name, under the recipe's own name."""
    assert set(RECIPES) == set(get_args(Task))
    assert all(recipe.task == task for task, recipe in RECIPES.items())
    assert all(recipe.Options() for recipe in RECIPES.values())


@settings(deadline=None)
@given(text=st.text(min_size=1, max_size=60).filter(str.strip), most=st.integers(2, 30))
def test_lm_learns_every_token_once(decoder_context: Context, text: str, most: int) -> None:
    """Windows of a text of any length join to the text with its end, and each token but the first is a target once."""
    context = replace(decoder_context, options=RECIPES["lm"].Options(), max_tokens=most)
    whole = [*context.tokenizer.encode(text, add_special_tokens=True), END]
    samples = _samples("lm", {"text": text}, context)

    assert [t for s in samples for t in s.targets if t != IGNORE] == whole[1:]
    assert [t for s in samples for t in s.tokens][: len(whole) - 1] == whole[:-1]
    assert all(len(s.tokens) == len(s.targets) <= most for s in samples)
    assert [s.part for s in samples] == list(range(len(samples)))


def test_a_prompt_is_what_the_server_feeds(make_context: MakeContext) -> None:
    """Of prompt and completion the completion and the end token are learned, and nothing of the prompt."""
    context = make_context()
    (sample,) = _samples("sft", {"prompt": "How far is", "completion": " the sea"}, context)
    prompt = context.tokenizer.encode("How far is", add_special_tokens=True)
    targets = [t for t in sample.targets if t != IGNORE]

    assert list(sample.tokens[: len(prompt)]) == prompt
    assert context.tokenizer.decode(targets, skip_special_tokens=False) == f" the sea{TURN_END}"
    assert sample.targets[: len(prompt) - 1] == (IGNORE,) * (len(prompt) - 1)
    assert sample.targets[-1] == IGNORE


def test_a_token_across_the_seam_is_not_learned_as_one(make_context: MakeContext) -> None:
    """Where prompt and completion would share a token, the prompt stays as the server would feed it."""
    context = make_context()
    prompt = context.tokenizer.encode("t", add_special_tokens=True)
    (sample,) = _samples("sft", {"prompt": "t", "completion": "he"}, context)

    assert context.tokenizer.encode("the", add_special_tokens=True)[: len(prompt)] != prompt
    assert list(sample.tokens[: len(prompt)]) == prompt


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ([], [("E-DATA-011", "messages")]),
        ([7], [("E-DATA-004", "messages[0]")]),
        ([{"role": "user"}], [("E-DATA-008", "messages[0].content"), ("E-DATA-014", "messages")]),
        ([{"role": 1, "content": "a"}], [("E-DATA-008", "messages[0].role")]),
        ("system user system assistant", [("E-DATA-013", "messages[2].role")]),
        ("user user assistant", [("E-DATA-013", "messages[1].role")]),
        ("tool user assistant", [("E-DATA-013", "messages[0].role")]),
        ("user assistant user", [("E-DATA-013", "messages[2].role")]),
        ("user system", [("E-DATA-013", "messages[1].role")]),
        ("system user assistant user assistant", []),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}], []),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "b"}],
            [("E-DATA-008", "messages[0].content[0]")],
        ),
        (
            [{"role": "user", "content": "a", "weight": 1}, {"role": "assistant", "content": "b", "weight": 2}],
            [("E-DATA-007", "messages[0].weight"), ("E-DATA-008", "messages[1].weight")],
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "tool", "content": "c"}],
            [("E-DATA-013", "messages[2].role")],
        ),
        (
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [{}]},
                {"role": "user", "content": "c"},
            ],
            [("E-DATA-013", "messages[2].role")],
        ),
    ],
)
def test_R11_conversations_that_are_wrong(messages: str | list[Any], wrong: list[tuple[str, str]]) -> None:
    """Roles, order, contents, keys: each mistake is one finding at its place, and sound conversations have none."""
    if isinstance(messages, str):
        messages = [{"role": role, "content": "x"} for role in messages.split()]

    found = [item for item in _wrong("sft", {"messages": messages}) if item[0] != "E-DATA-014" or item in wrong]
    assert found == wrong


def test_dpo_keeps_pairs_together(make_context: MakeContext) -> None:
    """A row is two samples, the preferred first, which share the prompt; only the two answers count."""
    context = make_context("dpo")
    row = {
        "input": {
            "messages": [
                {"role": "user", "content": "Sea?"},
                {"role": "assistant", "content": "What of it?"},
                {"role": "user", "content": "Far?"},
            ]
        },
        "preferred_output": [{"role": "assistant", "content": "Two days."}],
        "non_preferred_output": [{"role": "assistant", "content": "No."}],
    }
    chosen, rejected = _samples("dpo", row, context)

    def answer(sample: Sample) -> str:
        return context.tokenizer.decode([t for t in sample.targets if t != IGNORE], skip_special_tokens=False)

    assert (chosen.part, rejected.part) == (0, 1)
    assert (answer(chosen), answer(rejected)) == (f"Two days.{TURN_END}", f"No.{TURN_END}")
    first = next(i for i, target in enumerate(chosen.targets) if target != IGNORE)
    assert chosen.tokens[: first + 1] == rejected.tokens[: first + 1]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"input": {"messages": []}}, [("E-DATA-011", "input.messages")]),
        ({"input": {"messages": [{"role": "assistant", "content": "a"}]}}, [("E-DATA-013", "input.messages[0].role")]),
        ({"preferred_output": [{"role": "user", "content": "a"}]}, [("E-DATA-013", "preferred_output[0].role")]),
        ({"preferred_output": [{"role": "assistant", "content": "b"}]}, [("E-DATA-022", "non_preferred_output")]),
        ({"rejected": 1}, [("E-DATA-007", "rejected")]),
    ],
)
def test_R11_preferences_that_are_wrong(change: dict[str, Any], wrong: list[tuple[str, str]]) -> None:
    """A preference needs a question, two answers of the assistant, and that they differ."""
    row = {
        "input": {"messages": [{"role": "user", "content": "a"}]},
        "preferred_output": [{"role": "assistant", "content": "a"}],
        "non_preferred_output": [{"role": "assistant", "content": "b"}],
        **change,
    }
    assert wrong == [item for item in _wrong("dpo", row) if item[0] != "E-DATA-014"]


def test_dpo_findings_name_the_list(make_context: MakeContext) -> None:
    """What is wrong with a question is told once, and an answer's place counts from its own list."""
    row = {
        "input": {"messages": [{"role": "user", "content": f"Say {TURN_END}"}]},
        "preferred_output": [{"role": "assistant", "content": "a"}],
        "non_preferred_output": [{"role": "assistant", "content": f"b {TURN_END}"}],
    }
    found = RECIPES["dpo"].encode(row, 1, make_context("dpo"), file="f")

    assert [item.path for item in found if isinstance(item, Finding)] == [
        "input.messages[0].content",
        "non_preferred_output[0].content",
    ]


def test_mlm_masks_as_pretraining_does(encoder_context: Context) -> None:
    """
    An epoch masks 15% of what can be masked, says so in `supervised`, is the same when asked again, and differs from
    the next.

    Inverse check: leaving the epoch out of the sample's id fails here.
    """
    context, recipe = replace(encoder_context, max_tokens=40), RECIPES["mlm"]
    samples = _samples("mlm", {"text": "the old mason set two stones upright " * 8}, context)
    pieces = [context.tokenizer.id_to_piece(token) for token in range(9)]
    cls, sep, mask = (pieces.index(piece) for piece in ("[CLS]", "[SEP]", "[MASK]"))

    assert len(samples) > 1
    for sample in samples:
        assert (sample.tokens[0], sample.tokens[-1]) == (cls, sep)
        assert len(sample.tokens) <= 40
        first, again, later = (recipe.dress(sample, seed=5, epoch=epoch) for epoch in (0, 0, 1))
        masked = [i for i, target in enumerate(first.targets) if target != IGNORE]
        assert first == again != later
        assert len(masked) == sample.num_supervised == round(0.15 * (len(sample.tokens) - 2))
        assert all(first.targets[i] == sample.tokens[i] for i in masked)
        assert all(first.tokens[i] == sample.tokens[i] for i in range(len(first.tokens)) if i not in masked)
    dressed = [recipe.dress(sample, seed=5, epoch=0) for sample in samples]
    assert sum(sample.tokens.count(mask) for sample in dressed) > 0
    assert recipe.dress(samples[0], seed=6, epoch=0) != dressed[0]


def test_mlm_needs_an_encoders_tokenizer(make_context: MakeContext) -> None:
    """A decoder's vocabulary has no mask, which is the configuration's mistake and not a row's."""
    with pytest.raises(FinetuneError, match=r"needs a tokenizer with the special token \[CLS\]"):
        RECIPES["mlm"].encode({"text": "a"}, 1, make_context("mlm"), file="f")


def test_an_answer_is_learned_behind_the_servers_prompt(make_context: MakeContext) -> None:
    """The text that is trained is that of the server's format, and reading an answer gives it back."""
    context = make_context("answer_qa")
    row = {
        "question": "How many?",
        "context": "Twelve sacks.",
        "answers": [{"text": "twelve", "answer_start": 0}, "12"],
    }
    (sample,) = _samples("answer_qa", row, context)
    text = context.tokenizer.decode(sample.tokens, skip_special_tokens=False)
    prompt = answer_prompt("How many?", "Twelve sacks.")
    served = context.tokenizer.encode(prompt, add_special_tokens=True)

    assert text == prompt + answer_text("twelve") + TURN_END
    assert sample.num_supervised == len(sample.tokens) - len(served)
    assert read_answer(answer_text("twelve") + "\nQuestion: more") == "twelve"


def test_a_long_context_loses_its_end_and_nothing_else(make_context: MakeContext) -> None:
    """`truncate` takes words from the context, keeps question and answer whole, and counts what it took."""
    words = " ".join(f"word{i}" for i in range(60))
    row = {"question": "Which?", "context": words, "answers": ["the first"]}
    whole = len(_samples("answer_qa", row, make_context("answer_qa", max_tokens=4000))[0].tokens)
    context = make_context("answer_qa", max_tokens=100, on_long="truncate")
    (sample,) = _samples("answer_qa", row, context)
    text = context.tokenizer.decode(sample.tokens, skip_special_tokens=False)

    assert 90 < len(sample.tokens) <= 100
    assert sample.cut == whole - len(sample.tokens)
    assert text.startswith("Context: word0 word1 ")
    assert text.endswith(f"\nQuestion: Which?\nAnswer: the first{TURN_END}")


@pytest.mark.parametrize(
    ("task", "row", "wrong"),
    [
        ("answer_qa", {"question": "a", "answers": []}, [("E-DATA-015", "answers")]),
        (
            "answer_qa",
            {"question": "a", "answers": [3, " "]},
            [("E-DATA-008", "answers[0]"), ("E-DATA-015", "answers[1]")],
        ),
        ("answer_qa", {"answers": ["a"], "contxt": "b"}, [("E-DATA-007", "contxt"), ("E-DATA-008", "question")]),
        ("yes_no_maybe", {"question": "a", "contexts": [], "answer": "perhaps"}, [("E-DATA-008", "answer")]),
        ("yes_no_maybe", {"question": "a", "contexts": [1], "answer": "no"}, [("E-DATA-008", "contexts[0]")]),
        ("lm", {"text": 5}, [("E-DATA-008", "text")]),
        ("mlm", {"text": "  "}, [("E-DATA-015", "text")]),
    ],
)
def test_R11_rows_that_are_wrong(task: str, row: dict[str, Any], wrong: list[tuple[str, str]]) -> None:
    """Each field that is missing, unknown, empty or of another kind is one finding at its place."""
    assert _wrong(task, row) == wrong


def test_yes_no_maybe_is_judged_by_the_likeliest(make_context: MakeContext) -> None:
    """Training sees the gold answer alone; a validation scores all three, of which the loss counts the gold one."""
    row = {"question": "Does it help?", "contexts": ["Half recovered.", "Half did not."], "answer": "maybe"}
    context = make_context("yes_no_maybe")
    (learned,) = _samples("yes_no_maybe", row, context)
    judged = _samples("yes_no_maybe", row, replace(context, validating=True))
    prompt = yes_no_prompt("Does it help?", row["contexts"])  # type: ignore[arg-type]  # a list of texts

    assert [context.tokenizer.decode(s.tokens, skip_special_tokens=False) for s in judged] == [
        prompt + yes_no_text(answer) + TURN_END for answer in ("maybe", "yes", "no")
    ]
    assert judged[0] == learned
    assert [bool(sample.num_supervised) for sample in judged] == [True, False, False]
    for best, accuracy in (("maybe", 1.0), ("no", 0.0)):
        outputs = [Output(s, np.asarray([-float(ANSWERS[s.columns["label"]] != best)], np.float32)) for s in judged]
        assert RECIPES["yes_no_maybe"].metrics(outputs, {1: row}, context)["accuracy"] == accuracy


def test_squad_documents_are_questions_to_answer(make_context: MakeContext, tmp_path: Path) -> None:
    """A nested SQuAD file is read whole, and its rows are the questions."""
    qas = [{"id": "1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]}]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "Ada wrote.", "qas": qas}]}]}))
    report = check_file(path, recipe=RECIPES["answer_qa"], context=make_context("answer_qa"))

    assert (report.ok, report.format, report.usable_rows) == (True, "data/paragraphs/qas", 1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_that_never_learned(tmp_path: Path, dtype: str) -> None:
    """A row of the head that is zero, or twice the same among the special tokens, was never trained."""
    rng = np.random.RandomState(0)
    head = rng.randn(8, 4).astype(np.float32)
    head[2], head[5] = 0.0, head[4]
    tied = rng.randn(8, 4).astype(np.float32)
    write_safetensors(
        tmp_path / "model.safetensors", {"lm_head.weight": head, "model.embed_tokens.weight": tied}, dtype=dtype
    )

    assert untrained_tokens(tmp_path, [0, 2, 4, 5, 99]) == {2, 4, 5}
    assert untrained_tokens(tmp_path, [0, 4]) == frozenset()
    assert untrained_tokens(tmp_path / "nowhere", [0]) == frozenset()


@pytest.mark.parametrize(
    ("task", "path", "rows"),
    [
        ("lm", "pretrain/wikipedia_en_abstracts.jsonl", None),
        ("sft", "instruct/dolly_hhrlhf_small.jsonl", 700),
    ],
)
def test_real_files(
    make_context: MakeContext,
    write_rows: WriteRows,
    shared_data: Callable[[str], Path],
    task: str,
    path: str,
    rows: int | None,
) -> None:
    """Published files, brought to our keys, pass without a bad row."""
    source = [json.loads(line) for line in shared_data(path).read_text("utf-8").split("\n") if line]
    ours = [
        {"prompt": row["prompt"], "completion": row["response"]} if task == "sft" else {"text": row["text"]}
        for row in source
    ]
    context = make_context(task, max_tokens=20_000)
    report = check_file(write_rows(ours), recipe=RECIPES[task], context=context)

    assert report.ok
    assert report.rows == report.usable_rows == (rows or len(source))
