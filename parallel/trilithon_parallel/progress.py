"""How a run looks while it goes on: a live display on a terminal, one plain line a step anywhere else."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from trilithon_parallel.report import StepMetrics

_BLOCKS = "".join(map(chr, range(0x2581, 0x2589)))  # one eighth of a cell to a whole one
_SPARK_CELLS = 40
_ETA_STEPS = 50
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Display(Protocol):
    """Shows steps as they end."""

    def start(self) -> None:
        """Before the first step."""

    def step(self, metrics: StepMetrics, eta_s: float | None) -> None:
        """A step is done; `eta_s` is how long the rest will take, None before that can be said."""

    def say(self, text: str) -> None:
        """A line of its own."""

    def stop(self) -> None:
        """After the last step; the terminal is as it was."""


def make_display(console: Console, *, total_steps: int, resume_step: int) -> Display:
    """A live display where the console can redraw and knows our blocks, plain lines elsewhere."""
    kind = LiveDisplay if console.is_interactive and console.encoding.startswith("utf") else LineDisplay
    return kind(console, total_steps=total_steps, resume_step=resume_step)


class LineDisplay:
    """One plain line a step, for files and pipes."""

    def __init__(self, console: Console, *, total_steps: int, resume_step: int) -> None:
        self._console, self._total_steps, self._resume_step = console, total_steps, resume_step

    def start(self) -> None:
        """Say where a resumed run continues."""
        if self._resume_step:
            self.say(f"continues after step {self._resume_step}")

    def step(self, metrics: StepMetrics, eta_s: float | None) -> None:
        """All numbers of a step in one line."""
        parts = [f"step {metrics.step}/{self._total_steps}", *(f"{name} {value}" for name, value in describe(metrics))]
        self.say("  ".join([*parts, f"ETA {duration(eta_s)}"]))

    def say(self, text: str) -> None:
        """Neither wrapped nor coloured."""
        self._console.print(Text(text), soft_wrap=True)

    def stop(self) -> None:
        """Nothing to put back."""


class LiveDisplay:
    """A bar with the time that is left, the last numbers, and the losses of the run so far as blocks."""

    def __init__(self, console: Console, *, total_steps: int, resume_step: int) -> None:
        self._total_steps, self._done = total_steps, resume_step
        self._losses = Trace(_SPARK_CELLS)
        self._last: tuple[StepMetrics, float | None] | None = None
        # No thread of its own: it redraws at the end of a step.
        self._live = Live(console=console, auto_refresh=False, get_renderable=self._render)

    def start(self) -> None:
        """Take the bottom of the terminal; other output of this process goes above it."""
        self._live.start(refresh=True)

    def step(self, metrics: StepMetrics, eta_s: float | None) -> None:
        """Redraw."""
        self._done, self._last = metrics.step, (metrics, eta_s)
        self._losses.add(metrics.loss)
        self._live.refresh()

    def say(self, text: str) -> None:
        """A line above the display."""
        self._live.console.print(Text(text))

    def stop(self) -> None:
        """Leave the last numbers on the screen."""
        self._live.stop()

    def _render(self) -> Group:
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(self._total_steps, 1), completed=self._done, width=40)
        share = self._done / max(self._total_steps, 1)
        eta = duration(self._last[1]) if self._last is not None else "?"
        head.add_row(Text("step"), bar, Text(f"{self._done}/{self._total_steps}  {share:.0%}  ETA {eta}"))
        if self._last is None:
            return Group(head)
        numbers = Table.grid(padding=(0, 2))
        entries = describe(self._last[0])
        for start in range(0, len(entries), 3):
            row = [Text.assemble((f"{name} ", "dim"), value) for name, value in entries[start : start + 3]]
            numbers.add_row(*row)
        return Group(head, Text(f"loss {sparkline(self._losses.means())}"), numbers)


class Trace:
    """
    Any number of values as at most `max_cells` means of neighbours; where they would be more, pairs become one.

    >>> trace = Trace(4)
    >>> for value in (4.0, 2.0, 1.0, 3.0, 5.0):
    ...     trace.add(value)
    >>> trace.means()
    [3.0, 2.0, 5.0]
    """

    def __init__(self, max_cells: int) -> None:
        self._max_cells, self._per_cell = max_cells, 1
        self._cells: list[float] = []
        self._filling: list[float] = []

    def add(self, value: float) -> None:
        """One more at the end."""
        self._filling.append(value)
        if len(self._filling) == self._per_cell:
            self._cells.append(_finite_mean(self._filling))
            self._filling = []
        if len(self._cells) == self._max_cells:
            self._cells = [_finite_mean(self._cells[start : start + 2]) for start in range(0, self._max_cells, 2)]
            self._per_cell *= 2

    def means(self) -> list[float]:
        """Oldest first; NaN where no value of a cell is finite."""
        return [*self._cells, *([_finite_mean(self._filling)] if self._filling else [])]


def _finite_mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


class Eta:
    """How long the rest takes, from the mean of the last 50 steps; the first one, which warms up, doesn't count."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._times: deque[float] = deque(maxlen=_ETA_STEPS)
        self._is_warm = False

    def add(self, step_s: float) -> None:
        """A step took so long."""
        if self._is_warm:
            self._times.append(step_s)
        self._is_warm = True

    def seconds(self, step: int) -> float | None:
        """Seconds from the end of `step` to the end of the run; None before two steps were seen."""
        left = max(self._total_steps - step, 0)
        return left * sum(self._times) / len(self._times) if self._times else None


def describe(metrics: StepMetrics) -> list[tuple[str, str]]:
    """The numbers of a step as (name, text), those that aren't known left out."""
    entries = [
        ("loss", f"{metrics.loss:.4f}"),
        ("grad norm", f"{metrics.grad_norm:.3f}"),
        ("lr", f"{metrics.learning_rate:.3e}"),
        ("tokens/s", f"{metrics.tokens_per_s:,.0f}"),
        ("model FLOP/s", si(metrics.model_flops_per_s)),
    ]
    if metrics.mfu is not None:
        entries.append(("MFU", f"{metrics.mfu:.1%}"))
    if metrics.hfu is not None and metrics.hfu != metrics.mfu:
        entries.append(("HFU", f"{metrics.hfu:.1%}"))
    if metrics.bubble_planned is not None or metrics.bubble_measured is not None:
        pair = (metrics.bubble_measured, metrics.bubble_planned)
        entries.append(("bubble", of_planned(*("?" if value is None else f"{value:.1%}" for value in pair))))
    if metrics.peak_bytes is not None:
        planned = "?" if metrics.predicted_bytes is None else size(metrics.predicted_bytes)
        entries.append(("memory", of_planned(size(metrics.peak_bytes), planned)))
    if metrics.loss_scale is not None:
        entries.append(("loss scale", f"{metrics.loss_scale:g}"))
    if metrics.skipped:
        entries.append(("skipped", f"{metrics.skipped}"))
    if metrics.validation_loss is not None:
        entries.append(("validation loss", f"{metrics.validation_loss:.4f}"))
    return [*entries, ("samples", f"{metrics.consumed_samples:,}")]


def of_planned(measured: str, planned: str) -> str:
    """
    >>> of_planned("7.5%", "?"), of_planned("1.2 GiB", "1.4 GiB")
    ('7.5%', '1.2 GiB (planned 1.4 GiB)')
    """
    return measured if planned == "?" else f"{measured} (planned {planned})"


def sparkline(values: Sequence[float]) -> str:
    """
    Values as blocks, lowest to highest; what is not finite is a cross.

    >>> [_BLOCKS.find(block) for block in sparkline([3.0, 2.0, float("nan"), 1.0])]
    [7, 4, -1, 0]
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "x" * len(values)
    low, high = min(finite), max(finite)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] if math.isfinite(value) else "x" for value in values)


def duration(seconds: float | None) -> str:
    """
    >>> duration(42.4), duration(3720), duration(90000), duration(None)
    ('42 s', '1 h 02 min', '1 d 1 h', '?')
    """
    if seconds is None:
        return "?"
    minutes = int(seconds) // 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def si(value: float) -> str:
    """
    >>> si(1.5e13), si(950.0)
    ('15.0 T', '950.0 ')
    """
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.1f} "


def size(num_bytes: float) -> str:
    """
    >>> size(512), size(3 << 30)
    ('512 B', '3.0 GiB')
    """
    unit = 0
    while num_bytes >= 1024 and unit < len(_BYTE_UNITS) - 1:
        num_bytes, unit = num_bytes / 1024, unit + 1
    return f"{num_bytes:.1f} {_BYTE_UNITS[unit]}" if unit else f"{num_bytes:.0f} B"
