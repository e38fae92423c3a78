"""
Pictures of plans: memory bars and the pipeline's timeline, as PNG or SVG files. matplotlib is imported when drawing.

The figure is drawn without a display and without matplotlib's global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trilithon_parallel.memory import Memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PARTS = (
    ("weights", "#4c72b0"),
    ("gradients", "#55a868"),
    ("optimizer", "#8172b2"),
    ("activations", "#c44e52"),
    ("working", "#dd8452"),
    ("ends", "#937860"),
)
# From the first chunk to the last, forward blue and backward green.
_COLORS = {"F": ("#1f4e9c", "#c9dcf7"), "B": ("#1c6b3a", "#c6ebd2")}
# Numbers of micro-batches are written into boxes while they stay this few.
_LABELLED = 600


class PictureError(RuntimeError):
    """A picture cannot be drawn or written; the message says what to do."""


@dataclass(frozen=True)
class Event:
    """A forward (F) or backward (B) of a micro-batch through a chunk of a pipeline rank, from `start` to `end`."""

    rank: int
    kind: Literal["F", "B"]
    microbatch: int
    chunk: int
    start: float
    end: float


def draw_memory(bars: Sequence[tuple[str, Memory]], *, limit_bytes: float, title: str, path: Path) -> None:
    """
    One bar for each (label, memory), stacked by part, and the device's limit as a line.

    Raises:
        PictureError: matplotlib is missing, or `path` cannot be written.
    """
    figure = _figure(width=3.0 + 1.1 * len(bars), height=4.5)
    axes = figure.subplots()
    bottoms = [0.0] * len(bars)
    labels = [label for label, _ in bars]
    for part, color in _PARTS:
        sizes = [getattr(memory, part) / 1e9 for _, memory in bars]
        axes.bar(labels, sizes, bottom=bottoms, label=part, color=color, width=0.7)
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    axes.axhline(limit_bytes / 1e9, color="black", linestyle="--", linewidth=1, label="device")
    axes.set_ylabel("GB on the fullest stage")
    axes.set_title(title, fontsize=10)
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def draw_timeline(events: Sequence[Event], *, title: str, path: Path) -> None:
    """
    A row for each pipeline rank, a box for each event; what stays white is the bubble.

    Raises:
        PictureError: as `draw_memory`.
    """
    from_rank = max((event.rank for event in events), default=0) + 1
    chunks = max((event.chunk for event in events), default=0) + 1
    figure = _figure(width=12.0, height=1.2 + 0.28 * from_rank)
    axes = figure.subplots()
    for rank in range(from_rank):
        for kind, shades in _COLORS.items():
            mine = [event for event in events if event.rank == rank and event.kind == kind]
            colors = [_blend(*shades, event.chunk / max(1, chunks - 1)) for event in mine]
            spans = [(event.start, event.end - event.start) for event in mine]
            axes.broken_barh(spans, (rank - 0.45, 0.9), facecolors=colors, edgecolor="white", linewidth=0.4)
    if len(events) <= _LABELLED:
        for event in events:
            at = ((event.start + event.end) / 2, event.rank)
            ink = "white" if event.chunk < chunks / 2 else "black"
            axes.text(*at, str(event.microbatch), ha="center", va="center", fontsize=6, color=ink)
    axes.set_ylim(from_rank - 0.5, -0.5)
    axes.set_xlim(0, max((event.end for event in events), default=1.0))
    axes.set_ylabel("pipeline rank")
    axes.set_xlabel("time")
    axes.set_yticks(range(from_rank) if from_rank <= 16 else range(0, from_rank, from_rank // 8))
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def _figure(*, width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PictureError("pictures need matplotlib. Install it with: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise PictureError(f"{path} cannot be written: {error.strerror}. Name a directory of yours.") from None


def _blend(first: str, last: str, share: float) -> str:
    """A colour between two, as #rrggbb."""
    pairs = ((int(first[i : i + 2], 16), int(last[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)
