"""
What keeps many ranks one run: the same facts at the start, one answer to signals, and repeatable bits on request.

The watchdog that ends a hang in words is in `watchdog.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping

import torch

from trilithon_parallel.collectives import all_gather, all_reduce_max
from trilithon_parallel.grid import Grid

ECHO_S = 1.0  # a signal that comes this soon after the first is the same wish, told by two launchers
_SHOWN_CHARACTERS = 80  # of a fact's value in an error

# Variable -> values that make the library behind it repeatable; the first is set where there is none.
_DETERMINISTIC: Mapping[str, tuple[str, ...]] = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),  # cuBLAS, documented at torch.use_deterministic_algorithms
    "NCCL_ALGO": ("Ring", "ring"),  # trees sum in an order that depends on timing
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),  # Transformer Engine's attention
}


class HealthError(ValueError):
    """
    The ranks can't be one run: they disagree, or the environment forbids what was asked.

    `fields` names what differs, `ranks` those that differ from most; `code`, `message` and `hint` as everywhere.
    """

    def __init__(
        self, message: str, *, code: str, hint: str = "", fields: tuple[str, ...] = (), ranks: tuple[int, ...] = ()
    ) -> None:
        super().__init__(f"{message} {hint}".strip())
        self.code, self.message, self.hint, self.fields, self.ranks = code, message, hint, fields, ranks


def agree(grid: Grid, facts: Mapping[str, str]) -> None:
    """
    Make sure that every rank was told the same: configuration, layout, versions, hashes of data and placement.

    Every rank must call it, soon after the grid is built. Costs two small all-gathers over all ranks.

    Args:
        grid: the grid of this rank.
        facts: name -> value. Values are compared by hash; their first 80 characters are shown where they differ.

    Raises:
        HealthError: `ranks_disagree`, on every rank alike, naming each fact that differs and the ranks that differ
            from most.
    """
    mine = {name: [_hash(value), value[:_SHOWN_CHARACTERS]] for name, value in sorted(facts.items())}
    told: list[dict[str, list[str]]] = _gather_json(grid, mine)
    names = sorted({name for facts_of_rank in told for name in facts_of_rank})
    findings, fields, odd = [], [], set[int]()
    for name in names:
        values = [facts_of_rank.get(name, ["", "nothing"]) for facts_of_rank in told]
        hashes = [value[0] for value in values]
        if len(set(hashes)) == 1:
            continue
        counts = Counter(hashes)  # insertion order breaks ties: the value of the lowest rank wins
        usual = max(counts, key=lambda value: counts[value])
        shown = ", ".join(
            f"{values[hashes.index(value)][1]!r} on {_ranks([r for r, h in enumerate(hashes) if h == value])}"
            for value in counts
        )
        fields.append(name)
        odd |= {rank for rank, value in enumerate(hashes) if value != usual}
        findings.append(f"{name} must be the same on all ranks. Given: {shown}.")
    if findings:
        raise HealthError(
            " ".join(findings),
            code="ranks_disagree",
            hint="Start every rank with the same command, code, packages and data.",
            fields=tuple(fields),
            ranks=tuple(sorted(odd)),
        )


class Signals:
    """
    SIGTERM and SIGINT as a flag, inside a `with` block of the main thread.

    The first sets `should_stop`: the trainer finishes its step, writes a checkpoint and ends with `exit_code`. Another
    one, more than a second later, ends the process at once (within it, it is the same wish told twice: Slurm signals
    ranks, and so does torchrun).
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._came_at = 0.0

    def __enter__(self) -> Signals:
        self._old = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @property
    def should_stop(self) -> bool:
        """Whether this rank was asked to stop. Others may hear of it a step later: see `agreed`."""
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal, so that no launcher takes a run that was cut short for one that is done; 0 without one."""
        return 0 if self.signum is None else 128 + self.signum

    def agreed(self, grid: Grid) -> bool:
        """Whether any rank was asked to stop, the same answer on all; every rank calls it at the same step."""
        asked = torch.tensor([self.signum or 0], dtype=torch.int64)
        signum = int(all_reduce_max(asked, grid.world, label="stop").item())
        if signum:
            self.signum = self.signum or signum
        return signum != 0

    def _take(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._came_at and now - self._came_at > ECHO_S:
            os._exit(128 + number)
        if not self._came_at:
            self.signum, self._came_at = number, now


def set_deterministic(*, num_threads: int) -> None:
    """
    Make this process compute the same bits each time: torch's deterministic algorithms, one thread count, no choices.

    Call it before the first use of a GPU.

    Raises:
        HealthError: `environment_not_deterministic`, a variable is set to a value that allows something else.
    """
    wrong = [
        f"{name} must be one of {list(allowed)} in deterministic mode. Given: {os.environ[name]!r}."
        for name, allowed in _DETERMINISTIC.items()
        if os.environ.get(name, allowed[0]) not in allowed
    ]
    if wrong:
        raise HealthError(" ".join(wrong), code="environment_not_deterministic", hint="Unset it.")
    for name, allowed in _DETERMINISTIC.items():
        os.environ.setdefault(name, allowed[0])
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(num_threads)


def _gather_json(grid: Grid, value: dict[str, list[str]]) -> list[dict[str, list[str]]]:
    """Every rank's value, as bytes in fixed-layout tensors on the CPU."""
    data = json.dumps(value).encode()
    lengths = all_gather(torch.tensor([len(data)]), grid.world, dim=0, label="agree.lengths").tolist()
    padded = torch.zeros(1, max(lengths), dtype=torch.uint8)
    padded[0, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = all_gather(padded, grid.world, dim=0, label="agree.facts").numpy()
    return [json.loads(rows[rank, :length].tobytes()) for rank, length in enumerate(lengths)]


def _hash(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


def _ranks(ranks: list[int]) -> str:
    """
    >>> _ranks([2]), _ranks([0, 1, 3])
    ('rank 2', 'ranks 0, 1, 3')
    """
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
