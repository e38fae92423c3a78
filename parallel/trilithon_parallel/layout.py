"""How a training run is laid out over ranks: one frozen description, checked against model and batch. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trilithon_parallel.config import ModelConfig, ModelError
from trilithon_parallel.placement import check_layout, stage_layers

ScheduleName = Literal["gpipe", "1f1b", "interleaved"]


@dataclass(frozen=True)
class Layout:
    """
    Sizes of the axes and what goes with them.

    `virtual`: model chunks per rank (above 1 needs the interleaved schedule). `layer_counts`: layers of each of the
    pp * virtual stages, None for as even as possible. `micro_batch_size`: samples of one micro-batch.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    virtual: int = 1
    micro_batch_size: int = 1
    schedule: ScheduleName = "1f1b"
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    layer_counts: tuple[int, ...] | None = None

    @property
    def world_size(self) -> int:
        """Ranks of all axes together."""
        return self.tp * self.pp * self.dp

    def micro_batches(self, global_batch_size: int) -> int:
        """
        Micro-batches of each pipeline in a global batch of so many samples.

        Raises:
            ModelError: `layout_invalid`, micro_batch_size * dp does not divide the batch.
        """
        share = self.micro_batch_size * self.dp
        if global_batch_size % share or global_batch_size < 1:
            fewer = global_batch_size // share
            raise ModelError(
                f"training global_batch_size must be a multiple of micro_batch_size * dp = {self.micro_batch_size} * "
                f"{self.dp}. Given: {global_batch_size}.",
                code="layout_invalid",
                hint=f"Near values: {max(1, fewer) * share}, {(fewer + 1) * share}.",
            )
        return global_batch_size // share

    def check(self, config: ModelConfig, *, tokens_per_micro_batch: int) -> None:
        """
        Refuse what does not fit before any process starts.

        Raises:
            ModelError: `layout_invalid`, with the values that are allowed.
        """
        for name in ("tp", "pp", "dp", "virtual", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise _invalid(name, "at least 1", getattr(self, name), "1 and up")
        check_layout(config, tp=self.tp, pp=self.pp)
        stages = self.pp * self.virtual
        if self.virtual > 1 and (self.pp == 1 or self.schedule != "interleaved"):
            raise _invalid(
                "virtual", "1 without a pipeline and the interleaved schedule", self.virtual,
                "1, or pp above 1 and schedule interleaved",
            )  # fmt: skip
        if self.virtual == 1 and self.schedule == "interleaved":
            raise _invalid("virtual", "at least 2 with the interleaved schedule", 1, "2 and up, or schedule 1f1b")
        if stages > config.num_layers:
            most = config.num_layers // self.pp
            raise _invalid("virtual", f"at most layers / pp = {most}", self.virtual, f"1 to {most}")
        counts = self.layer_counts
        if counts is not None and (len(counts) != stages or sum(counts) != config.num_layers or min(counts) < 1):
            raise _invalid(
                "layer_counts", f"{stages} counts of at least 1 whose sum is {config.num_layers}", list(counts),
                f"for example {[len(layers) for layers in stage_layers(config.num_layers, stages)]}",
            )  # fmt: skip
        if self.sequence_parallel and (config.reads is not None or config.has_twin):
            raise _invalid("sequence_parallel", "off for a reader of passages and for two encoders", True, "false")
        if self.sequence_parallel and tokens_per_micro_batch % self.tp:
            raise _invalid(
                "sequence_parallel", f"off where tp does not divide a micro-batch's {tokens_per_micro_batch} tokens",
                True, f"false, or a tp that divides {tokens_per_micro_batch}",
            )  # fmt: skip


def _invalid(field: str, rule: str, given: object, allowed: str) -> ModelError:
    return ModelError(
        f"layout {field} must be {rule}. Given: {given}.", code="layout_invalid", hint=f"Allowed: {allowed}."
    )
