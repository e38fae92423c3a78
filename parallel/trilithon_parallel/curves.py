"""A picture of one run's loss, or of several runs in one frame. Needs matplotlib, which is imported when drawing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from trilithon_parallel.report import read_metrics

_SMOOTH_SHARE, _SMOOTH_STEPS = 0.02, 25  # half the width of the mean: a share of the run, and at most so many steps
_SUFFIXES = (".svg", ".png", ".pdf")


def draw_curves(runs: Mapping[str, Path], out: Path) -> None:
    """
    Draw loss and gradient norm over steps: every step faint, the mean of its neighbours strong, evaluations as dots.

    Args:
        runs: name -> run directory or `metrics.jsonl`, in the order of the legend.
        out: the picture; its suffix chooses the kind (.svg, .png, .pdf). Replaced as a whole.

    Raises:
        ValueError: there is nothing to draw, or no such kind of picture.
    """
    if out.suffix not in _SUFFIXES:
        raise ValueError(f"picture must end in one of {', '.join(_SUFFIXES)}. Given: {out}.")
    metrics = {name: read_metrics(path) for name, path in runs.items()}
    if not any(metrics.values()):
        raise ValueError(f"no run has a finished step. Given: {', '.join(runs) or 'no run'}.")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot: no window system, no state that a notebook would share.
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    loss_plot, norm_plot = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for index, (name, steps) in enumerate(metrics.items()):
        colour = f"C{index}"
        x = [step.step for step in steps]
        half_width = min(int(len(steps) * _SMOOTH_SHARE), _SMOOTH_STEPS)
        for plot, values in (
            (loss_plot, [step.loss for step in steps]),
            (norm_plot, [step.grad_norm for step in steps]),
        ):
            plot.plot(x, values, color=colour, alpha=0.25, linewidth=0.8)
            plot.plot(x, smooth(values, half_width), color=colour, linewidth=1.5, label=name)
        checked = [(step.step, step.validation_loss) for step in steps if step.validation_loss is not None]
        if checked:
            loss_plot.plot(*zip(*checked, strict=True), "o", color=colour, markersize=4, label=f"{name} (validation)")
    loss_plot.set_ylabel("loss")
    norm_plot.set_ylabel("gradient norm")
    norm_plot.set_xlabel("step")
    loss_plot.legend()
    part = out.with_suffix(f".part{out.suffix}")
    # Without a date and with fixed ids the same numbers give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "trilithon"}):
        figure.savefig(part, dpi=120, metadata={"Date": None} if out.suffix == ".svg" else None)
    part.replace(out)


def smooth(values: Sequence[float], half_width: int) -> list[float]:
    """
    Mean of the finite values at most `half_width` places away, at each place.

    >>> smooth([4.0, 2.0, float("nan"), 6.0], half_width=1)
    [3.0, 3.0, 4.0, 6.0]
    """
    means = []
    for place in range(len(values)):
        window = values[max(0, place - half_width) : place + half_width + 1]
        finite = [value for value in window if math.isfinite(value)]
        means.append(math.fsum(finite) / len(finite) if finite else math.nan)
    return means
