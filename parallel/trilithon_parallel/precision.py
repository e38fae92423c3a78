"""
Dtypes of a training run, and the loss scale that fp16 needs.

fp32 trains as it is. bf16 and fp16 parameters have fp32 gradients, masters and moments; fp16's small gradients would
vanish, so its losses are multiplied by a scale that follows what overflows (arXiv 1710.03740, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_SCALE = 1.0


@dataclass
class LossScale:
    """
    What fp16 losses are multiplied by: halved after `hysteresis` overflows, doubled after `interval` good steps.

    Defaults are those of Megatron-LM.
    """

    value: float = 2.0**32
    interval: int = 1000
    hysteresis: int = 2
    good_steps: int = 0
    overflows: int = 0

    def update(self, *, is_finite: bool) -> None:
        """After each step: did all gradients fit?"""
        if is_finite:
            self.good_steps += 1
            if self.good_steps == self.interval:
                self.value, self.good_steps, self.overflows = self.value * 2, 0, 0
            return
        self.good_steps = 0
        self.overflows += 1
        if self.overflows >= self.hysteresis:
            self.value = max(self.value / 2, MIN_SCALE)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value, "good_steps": self.good_steps, "overflows": self.overflows}

    def load(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
        self.overflows = int(state["overflows"])
