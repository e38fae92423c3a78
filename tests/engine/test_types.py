"""Token types and positions of the caller's own, through the real engine: kept in every step, told apart in caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_driver import Driver
from tiny import tiny_gpt2, tiny_llama

from trilithon_parallel.attention import PackedView
from trilithon_parallel.backend import select
from trilithon_parallel.config import load_config
from trilithon_parallel.grid import Grid
from trilithon_parallel.models import build_stage
from trilithon_parallel.weights.export import export_model
from trilithon_parallel.weights.loader import load_stage, load_state

Start = Callable[..., Driver]
FAMILIES = {"llama": tiny_llama, "gpt2": tiny_gpt2}
PROMPT = [(7 * i * i + 3 * i + 1) % 240 + 3 for i in range(40)]
TYPES = [0, 1] * 10 + [2] * 20
POSITIONS = [*range(17), *range(23)]
"""A conversation that begins anew in the middle."""


def typed(path: Path, family: str, *, zero: bool = False) -> Path:
    """A decoder with rows for four types."""
    original = FAMILIES[family](path / "original")
    config = load_config(original)
    generator = torch.Generator().manual_seed(3)
    rows = torch.zeros(4, config.hidden_size) if zero else torch.randn(4, config.hidden_size, generator=generator)
    state = load_state(original, config=config) | {"model.embed_types.weight": rows}
    export_model(state, replace(config, token_types=4), path / "typed", side_files_from=original)
    return path / "typed"


def greedy(model: Path, tokens: Sequence[int], types: Sequence[int], positions: Sequence[int], *, count: int) -> Any:
    """Tokens and their log-probabilities, each from a whole forward pass; the reference."""
    config, grid = load_config(model), Grid.single()
    stage: Any = build_stage(config, grid=grid, backend=select("torch", device="cpu"), dtype=torch.float32)
    load_stage(stage, model, config=config, grid=grid)
    found, logprobs = list(tokens), []
    types, positions = list(types), list(positions)
    for _ in range(count):
        with torch.no_grad():
            hidden_TH = stage(
                torch.tensor(found),
                positions_T=torch.tensor(positions),
                types_T=torch.tensor(types),
                view=PackedView([0, len(found)], causal=True),
            )
            values_V = torch.log_softmax(stage.gather_logits(hidden_TH[-1:])[0], -1)
        found.append(int(values_V.argmax()))
        logprobs.append(float(values_V.max()))
        types.append(3)
        positions.append(positions[-1] + 1)
    return found[len(tokens) :], logprobs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [16, 256])
def test_acc_001_answers_go_on_with_their_type_and_position(
    tmp_path: Path, start: Start, family: str, budget: int
) -> None:
    """
    Each step's type and position are those of the whole sequence computed at once, in chunks and one by one.

    Plain requests in the same steps keep their own. Inverse checks: positions counted on from the number of tokens;
    answers of type 0; the types of a chunk taken from its start in the batch.
    """
    model = typed(tmp_path, family)
    driver = start(model, max_batch_tokens=budget)
    shaped = driver.submit(PROMPT, types=TYPES, positions=POSITIONS, answer_type=3)
    plain = driver.submit(PROMPT)
    driver.run()
    tokens, logprobs = greedy(model, PROMPT, TYPES, POSITIONS, count=12)
    other, _ = greedy(model, PROMPT, [0] * 40, range(40), count=1)

    assert driver.answers[shaped, 0].tokens == tokens
    assert driver.answers[shaped, 0].logprobs == pytest.approx(logprobs, abs=5e-5)
    assert driver.answers[plain, 0].tokens[0] == other[0]
    assert driver.answers[plain, 0].tokens != tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_acc_001_zero_rows_change_no_bit(tmp_path: Path, start: Start, family: str) -> None:
    """With a table of zeros types say nothing, the cache's keys aside; without a table there are none to give."""
    model = typed(tmp_path, family, zero=True)
    driver, plain = start(model), start(tmp_path / "original")
    answers = [driver.answer(PROMPT, types=TYPES, answer_type=3), driver.answer(PROMPT), plain.answer(PROMPT)]

    assert answers[0].tokens == answers[1].tokens == answers[2].tokens
    assert answers[0].logprobs == answers[1].logprobs == answers[2].logprobs
    assert plain.answer(PROMPT, types=TYPES).last.error.message == "types must be below 1. Given: 2."


def test_acc_002_other_types_or_positions_never_share_a_block(tmp_path: Path, start: Start) -> None:
    """
    Equal tokens hit only with equal types and positions, and a hit is the miss; what an answer wrote is found too.

    Inverse checks: types left out of the key; positions left out.
    """
    driver = start(typed(tmp_path, "llama"))
    fields: list[dict[str, Any]] = [
        {"types": TYPES, "positions": POSITIONS, "answer_type": 3},
        {"types": TYPES},
        {"positions": POSITIONS},
        {},
        {"types": [0] * 40, "positions": list(range(40))},
    ]
    first = [driver.answer(PROMPT, **each) for each in fields]
    again = [driver.answer(PROMPT, **each) for each in fields]
    written = driver.answer(
        [*PROMPT, *first[0].tokens[:9]],
        types=[*TYPES, *[3] * 9],
        positions=[*POSITIONS, *range(23, 32)],
        answer_type=3,
    )

    assert [answer.cached_tokens for answer in first] == [0, 0, 0, 0, 32]
    assert [answer.cached_tokens for answer in again] == [32] * 5
    assert [answer.logprobs for answer in again] == [pytest.approx(answer.logprobs, abs=5e-5) for answer in first]
    assert len({tuple(answer.tokens) for answer in first}) == 4
    assert written.cached_tokens == 48
    assert written.tokens[:3] == first[0].tokens[9:]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_E1_types_and_positions_at_every_layout(tmp_path: Path, start: Start, tp: int, pp: int) -> None:
    """Ranks are told both with the plan. Inverse check: positions left out of the plan's message."""
    model = typed(tmp_path, "llama")
    fields = {"types": TYPES, "positions": POSITIONS, "answer_type": 3}
    one, many = start(model).answer(PROMPT, **fields), start(model, tp=tp, pp=pp).answer(PROMPT, **fields)

    assert many.tokens == one.tokens
    assert many.logprobs == pytest.approx(one.logprobs, abs=5e-5)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"types": [0] * 39}, "types must be one a token. Given: 39 for 40 tokens."),
        ({"types": [4] * 40}, "types must be below 4. Given: 4."),
        ({"answer_type": 4}, "types must be below 4. Given: 4."),
        ({"positions": [0] * 41}, "positions must be one a token, and below 40. Given: 41, up to 0."),
        ({"positions": [*range(39), 40]}, "positions must be one a token, and below 40. Given: 40, up to 40."),
    ],
)
def test_R11_what_does_not_fit_is_refused(tmp_path: Path, start: Start, fields: dict[str, Any], says: str) -> None:
    """Numbers that the model has no row for never reach a rank."""
    error = start(typed(tmp_path, "llama")).answer(PROMPT, **fields).last.error

    assert (error.code, error.message) == ("invalid_value", says)
