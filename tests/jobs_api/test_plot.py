"""The picture of a run: well formed whatever the numbers, and with everything in it that it should show."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from trilithon_finetune.plot import MAX_POINTS, plot, thinned, ticks

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_curves_attempts_and_checkpoints_are_drawn() -> None:
    """Each series has its curve and name, each attempt a dashed line, each checkpoint a mark; markup is escaped."""
    rows = [{"step": step, "train_loss": 3 / step, "lr": 1e-4, "tokens_per_second": 900.0} for step in range(1, 51)]
    rows[9] |= {"valid_loss": 0.5, "valid_mean_token_accuracy": 0.75}

    svg = plot(rows, title="<job> & co\x00", attempts=[20], checkpoints=[10, 20, 50, 999])

    words = texts(svg)
    assert words[0] == "<job> & co"
    for name in (
        "loss, training",
        "loss, validation",
        "token accuracy",
        "learning rate",
        "tokens per second",
        "step",
        "checkpoint",
    ):
        assert name in words
    assert svg.count("stroke-dasharray") == 4  # one in each panel
    assert svg.count('stroke-width="3"') == 3 + 1  # the last in the legend
    assert "<script" not in svg


def test_a_job_without_steps_has_a_picture_too() -> None:
    """No rows, and rows without numbers, say so instead of failing."""
    assert "no steps yet" in texts(plot([], title="x"))
    assert "no steps yet" in texts(plot([{"step": 1}, {"train_loss": 2.0}], title="x"))


NUMBERS = st.one_of(st.floats(), st.integers(-(10**6), 10**6), st.booleans(), st.none(), st.text(max_size=3))


@example(rows=[{"step": 0.0, "lr": 2.2e-309}], title="")  # a thirtieth of it is nothing
@given(
    rows=st.lists(st.fixed_dictionaries({"step": NUMBERS, "train_loss": NUMBERS, "lr": NUMBERS}), max_size=8),
    title=st.text(max_size=20),
)
def test_any_numbers_give_well_formed_svg(rows: list[dict[str, Any]], title: str) -> None:
    """Infinite, missing and huge values never break the picture."""
    svg = plot(rows, title=title, attempts=[1, 3], checkpoints=[2])

    for node in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        assert "nan" not in node.attrib["d"]
        assert "inf" not in node.attrib["d"]
    assert len(svg) < 100_000


@given(low=st.floats(-1e6, 1e6), size=st.floats(0, 1e6))
def test_ticks_enclose_their_range_and_are_few(low: float, size: float) -> None:
    """Ticks are in order, few, and enclose what they are for."""
    high = low + size

    marks = ticks(low, high)

    assert marks == sorted(set(marks))
    assert 2 <= len(marks) <= 12
    slack = 1e-6 * (marks[-1] - marks[0])
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack


def test_thinning_keeps_the_ends_and_the_peaks() -> None:
    """Of a long curve few points stay, among them the first, the last, the least and the greatest."""
    points = [(float(i), math.sin(i / 50)) for i in range(20_000)]
    points[7777] = (7777.0, 9.0)

    kept = thinned(points)

    assert len(kept) <= MAX_POINTS
    assert kept == sorted(kept)
    assert {points[0], points[-1], points[7777]} <= set(kept)
