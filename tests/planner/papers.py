"""What the papers print, for the tests that hold the planner against them."""

from __future__ import annotations

from typing import NamedTuple

from trilithon_parallel.presets import TABLE_1, Recipe


class Row(NamedTuple):
    """A row of PTD-P's Table 1 (arXiv 2104.04473), and what follows from it."""

    parameters_b: float
    tflops: float
    percent_of_peak: float
    pflops: float
    dp: int
    microbatches: int
    bubble: float
    step_s: float
    state_gb: float
    zero_gb: float
    kept_gb: float


ROWS = {
    "1.7B": Row(1.7, 137, 44, 4.4, 32, 1, 0, 3.53, 29.7, 10.5, 3.62),
    "3.6B": Row(3.6, 138, 44, 8.8, 32, 1, 0, 3.70, 32.1, 11.4, 6.04),
    "7.5B": Row(7.5, 142, 46, 18.2, 32, 1, 0, 3.70, 33.6, 11.9, 9.66),
    "18.4B": Row(18.4, 135, 43, 34.6, 32, 4, 0, 9.40, 41.5, 14.7, 8.05),
    "39.1B": Row(39.1, 138, 44, 70.8, 32, 12, 0.083, 14.45, 44.5, 15.8, 6.44),
    "76.1B": Row(76.1, 140, 45, 143.8, 32, 28, 0.036, 16.06, 43.7, 15.5, 6.29),
    "145.6B": Row(145.6, 148, 47, 227.1, 24, 48, 0.073, 24.82, 42.2, 15.3, 11.58),
    "310.1B": Row(310.1, 155, 50, 297.4, 15, 144, 0.052, 37.61, 45.5, 17.2, 9.46),
    "529.6B": Row(529.6, 163, 52, 410.2, 9, 280, 0.040, 54.08, 36.4, 14.8, 11.66),
    "1008.0B": Row(1008.0, 163, 52, 502.0, 6, 512, 0.123, 102.6, 38.5, 17.1, 13.42),
}
RECIPE_OF: dict[str, Recipe] = dict(zip(ROWS, TABLE_1, strict=True))
A100_PEAK = 312e12

# Table 2: (parameters, global batch, gpus, TFLOP/s a GPU, days printed) of 300B tokens.
TABLE_2 = [
    ("zero3", 174.6, 1536, 384, 144, 90),
    ("zero3", 174.6, 1536, 768, 88, 74),
    ("zero3", 174.6, 1536, 1536, 44, 74),
    ("zero3", 529.6, 2560, 640, 138, 169),
    ("zero3", 529.6, 2240, 1120, 98, 137),
    ("zero3", 529.6, 2240, 2240, 48, 140),
    ("ptdp", 174.6, 1536, 384, 153, 84),
    ("ptdp", 174.6, 1536, 768, 149, 43),
    ("ptdp", 174.6, 1536, 1536, 141, 23),
    ("ptdp", 529.6, 2240, 560, 171, 156),
    ("ptdp", 529.6, 2240, 1120, 167, 80),
    ("ptdp", 529.6, 2240, 2240, 159, 42),
]
