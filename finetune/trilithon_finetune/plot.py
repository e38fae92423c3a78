"""
The curves of a job as an SVG picture, drawn by hand: no library, no script, no style sheet.

    loss            training and validation, as panels above one another over the same steps
    token accuracy  likewise
    learning rate
    throughput

Dashed verticals are where a new attempt began, ticks on the step axis are checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, TOP, GAP, BOTTOM = 860, 74, 22, 60, 38, 44
MAX_POINTS = 1000
"""Of a curve; more are thinned to the least and the greatest of each stretch, so that peaks stay."""

MAX_STEP = 1e12
HUGE = 1e30
"""Numbers from here on are left out, like those that are not finite: nothing could be seen beside them."""

_INK, _MUTED, _GRID = "#1f2430", "#5c6470", "#e3e6ea"
_FONT = "ui-sans-serif, system-ui, sans-serif"

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One line of a panel: the column of its values, its name and its colour."""

    column: str
    label: str
    colour: str
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis."""

    title: str
    height: int
    curves: tuple[Curve, ...]


PANELS = (
    Panel(
        "loss",
        250,
        (
            Curve("train_loss", "training", "#2f6fde"),
            Curve("valid_loss", "validation", "#d9622b", dots=True),
        ),
    ),
    Panel(
        "token accuracy",
        110,
        (
            Curve("train_mean_token_accuracy", "training", "#2f6fde"),
            Curve("valid_mean_token_accuracy", "validation", "#d9622b", dots=True),
        ),
    ),
    Panel("learning rate", 110, (Curve("lr", "learning rate", "#2c8c5a"),)),
    Panel("tokens per second", 110, (Curve("tokens_per_second", "tokens per second", "#7a6a1c"),)),
)


def plot(
    rows: Iterable[Mapping[str, Any]],
    *,
    title: str,
    attempts: Sequence[int] = (),
    checkpoints: Sequence[int] = (),
    panels: Sequence[Panel] = PANELS,
) -> str:
    """
    The picture of a run.

    >>> svg = plot([{"step": 1, "train_loss": 2.5}, {"step": 2, "train_loss": 2.0}], title="a <job>")
    >>> svg.startswith("<svg"), "a &lt;job&gt;" in svg
    (True, True)

    Args:
        rows: each a `step` and numbers by name, in any order; what is not finite, or huge, is left out.
        title: over the picture.
        attempts: the first step of each attempt but the first.
        checkpoints: their steps.
        panels: what is drawn; those but the first are left out where they have no numbers.
    """
    rows = list(rows)
    series = {curve.column: _points(rows, curve.column) for panel in panels for curve in panel.curves}
    steps = [step for points in series.values() for step, _ in points]
    low, high = (min(steps), max(steps)) if steps else (0.0, 1.0)
    if high == low:
        low, high = low - 1, high + 1
    panels = [panel for panel in panels if panel is panels[0] or any(series[item.column] for item in panel.curves)]
    height = TOP + sum(panel.height for panel in panels) + GAP * (len(panels) - 1) + BOTTOM
    across = _scale(low, high, LEFT, WIDTH - RIGHT)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="{_FONT}" font-size="12">',
        f"<title>{_plain(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(LEFT, 24, title, size=15, weight=600),
    ]
    top = TOP
    for panel in panels:
        bottom = top + panel.height
        out += _panel(panel, series, top=top, bottom=bottom, across=across)
        out += [_vertical(across(step), top, bottom) for step in attempts if low <= step <= high]
        last_bottom, top = bottom, bottom + GAP
    out += _step_axis(low, high, across, y=last_bottom)
    seen = [step for step in checkpoints if low <= step <= high]
    out += [_mark(across(step), last_bottom) for step in seen]
    if seen:
        out += [_mark(LEFT + 1, last_bottom + 36), _text(LEFT + 9, last_bottom + 36, "checkpoint", colour=_MUTED)]
    out.append("</svg>")
    return "\n".join(out) + "\n"


def _panel(
    panel: Panel, series: Mapping[str, Sequence[Point]], *, top: int, bottom: int, across: Callable[[float], float]
) -> list[str]:
    values = [value for curve in panel.curves for _, value in series[curve.column]]
    marks = ticks(min(values), max(values)) if values else [0.0, 1.0]
    up = _scale(marks[0], marks[-1], bottom, top)
    out = []
    for mark in marks:
        y = up(mark)
        out.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{_GRID}"/>')
        out.append(_text(LEFT - 8, y + 4, number(mark), anchor="end", colour=_MUTED))
    shown = [curve for curve in panel.curves if series[curve.column]]
    x = float(LEFT)
    for curve in shown:
        if len(shown) > 1:
            out.append(f'<path d="M{x:.1f} {top - 11}h16" stroke="{curve.colour}" stroke-width="2.5"/>')
            out.append(_text(x + 21, top - 7, f"{panel.title}, {curve.label}", colour=_MUTED))
            x += 44 + 6.4 * len(f"{panel.title}, {curve.label}")
        else:
            out.append(_text(x, top - 7, panel.title, colour=_MUTED))
        points = [(across(step), up(value)) for step, value in thinned(series[curve.column])]
        path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
        if len(points) > 1:
            out.append(f'<path d="{path}" fill="none" stroke="{curve.colour}" stroke-width="1.6"/>')
        if curve.dots or len(points) == 1:
            out += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.6" fill="{curve.colour}"/>' for px, py in points]
    if not shown:
        out.append(
            _text((LEFT + WIDTH - RIGHT) / 2, (top + bottom) / 2, "no steps yet", anchor="middle", colour=_MUTED)
        )
    return out


def _step_axis(low: float, high: float, across: Callable[[float], float], *, y: int) -> list[str]:
    out = [f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="{_INK}"/>']
    for mark in ticks(low, high, whole=True):
        if low <= mark <= high:
            out.append(f'<path d="M{across(mark):.1f} {y}v5" stroke="{_INK}"/>')
            out.append(_text(across(mark), y + 18, number(mark), anchor="middle", colour=_MUTED))
    out.append(_text(WIDTH - RIGHT, y + 36, "step", anchor="end", colour=_MUTED))
    return out


def ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> list[float]:
    """
    Round numbers that enclose a range, about `count` of them: steps of 1, 2 or 5 times a power of ten.

    >>> ticks(0.13, 0.92), ticks(3, 3)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [2.8, 3.0, 3.2])
    """
    if high - low <= max(1 / HUGE, 1e-9 * max(abs(low), abs(high))):
        pad = abs(low) / 30 if abs(low) > 1 / HUGE else 1.0
        low, high, count = low - pad, high + pad, 2
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(base * power for base in (1, 2, 5, 10) if base * power >= rough * (1 - 1e-9))
    if whole:
        unit = max(1.0, unit)
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [float(f"{index * unit:.12g}") for index in range(first, last + 1)]


def number(value: float) -> str:
    """
    A tick's text.

    >>> number(0.0002), number(1500000), number(0.25), number(12000)
    ('2e-4', '1.5M', '0.25', '12k')
    """
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    if 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def thinned(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points: the first and the last, and of each stretch the least and the greatest, in order."""
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(len(points) / (most // 2 - 1))
    kept = [points[0]]
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return [*dict.fromkeys([*kept, points[-1]])]


def _points(rows: Sequence[Mapping[str, Any]], column: str) -> list[Point]:
    """By step; a step that was repeated after a resume counts once, as it was seen last."""
    found: dict[float, float] = {}
    for row in rows:
        step, value = row.get("step"), row.get(column)
        if _finite(step) and abs(step) < MAX_STEP and _finite(value):
            found[float(step)] = float(value)
    return sorted(found.items())


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < HUGE


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    factor = (end - start) / (high - low)
    return lambda value: start + (value - low) * factor


def _mark(x: float, bottom: int) -> str:
    return f'<path d="M{x:.1f} {bottom - 8}v8" stroke="{_INK}" stroke-width="3"/>'


def _vertical(x: float, top: int, bottom: int) -> str:
    return f'<path d="M{x:.1f} {top}V{bottom}" stroke="{_MUTED}" stroke-dasharray="4 4"/>'


def _plain(words: str) -> str:
    """Text as XML may hold it: what would be markup is escaped, control characters are left out."""
    return escape("".join(letter for letter in words if letter.isprintable()))


def _text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    colour: str = _INK,
    size: int = 12,
    weight: int = 400,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}" '
        f'font-weight="{weight}">{_plain(words)}</text>'
    )
