"""
Beam search over the sequences of one request: which candidates go on, which have ended, when nothing can improve.

Pure: scores in, (parent, token) pairs out. Blocks, matchers and the sampler's answers follow what is decided here.
Scores are sums of the model's log-probabilities; a hypothesis is worth its sum over length^length_penalty, as in
`transformers` (version 5), whose choices and order of steps this follows (tests compare).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from trilithon_server.engine.logprobs import TokenInfo
from trilithon_server.engine.wire_pb2 import Beam, Finish

Early = Literal["heuristic", "first", "never"]
EARLY: dict[Beam.Early.ValueType, Early] = {Beam.HEURISTIC: "heuristic", Beam.FIRST: "first", Beam.NEVER: "never"}

Candidate = tuple[float, TokenInfo]
"""What a token adds to its beam's score, and the token."""


@dataclass(frozen=True, slots=True)
class Path:
    """The tokens of a beam, shared with the beams that it came from; None is the empty one."""

    before: Path | None
    info: TokenInfo

    def tokens(self) -> list[TokenInfo]:
        """From the first."""
        out: list[TokenInfo] = []
        path: Path | None = self
        while path is not None:
            out.append(path.info)
            path = path.before
        return out[::-1]


@dataclass(frozen=True, slots=True)
class End:
    """How a token ends a beam."""

    finish: Finish.ValueType
    matched: int = 0
    complete: bool = False


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An answer that has ended, and what it is worth."""

    worth: float
    path: Path | None
    end: End


@dataclass(frozen=True, slots=True)
class Move:
    """A beam of the next step: the one it comes from and the token that it takes."""

    parent: int
    token: int


class BeamSearch:
    """
    Args:
        width: beams kept.
        num_answers: of which so many are returned.
        length_penalty: exponent of the length; above 0 it favours long answers.
        early: when to stop with `width` ended: once no open beam looks better at its present length (`heuristic`), at
            once (`first`), or when none can become better at the longest (`never`).
        max_new_tokens: of each answer.
    """

    def __init__(
        self, width: int, *, num_answers: int, length_penalty: float, early: Early, max_new_tokens: int
    ) -> None:
        self.width, self.num_answers = width, num_answers
        self._penalty, self._early, self._max_new = length_penalty, early, max_new_tokens
        # Every beam starts as the prompt; only one of them may, or all would go the same way.
        self._scores = [0.0] + [-float("inf")] * (width - 1)
        self._paths: list[Path | None] = [None] * width
        self._length = 0
        self._ended: list[Hypothesis] = []  # best first, at most `width`

    @property
    def beams_used(self) -> int:
        """How many sequences have something to say at the next step: one at first."""
        return 1 if self._length == 0 else self.width

    def advance(
        self, candidates: Sequence[Sequence[Candidate]], end_of: Callable[[int, TokenInfo], End | None]
    ) -> list[Move]:
        """
        One step.

        Args:
            candidates: per beam, the best tokens that may follow it, best first.
            end_of: whether a token (after the beam of that index) ends it.
        Returns:
            The next beams, best first, always `width` of them; empty when the search is over.
        """
        totals = [
            (self._scores[beam] + gain, beam, info)
            for beam, row in enumerate(candidates)
            for gain, info in row
            if self._scores[beam] + gain > -float("inf")
        ]
        totals.sort(key=lambda item: -item[0])  # stable: equals stay by beam, then as their row has them
        self._length += 1
        survivors: list[tuple[float, int, TokenInfo]] = []
        ended: list[Hypothesis] = []
        for rank, (total, beam, info) in enumerate(totals):
            if rank >= self.width and len(survivors) == self.width:
                break
            end = end_of(beam, info)
            if end is None and self._length == self._max_new:
                end = End(Finish.MAX_TOKENS)
            if end is None:
                if len(survivors) < self.width:
                    survivors.append((total, beam, info))
            elif rank < self.width:
                ended.append(Hypothesis(self._worth(total), Path(self._paths[beam], info), end))
        self._ended = sorted([*self._ended, *ended], key=lambda one: -one.worth)[: self.width]
        if not survivors or not self._may_improve(survivors[0][0]):
            return []
        # Fewer than `width` ways on (a constraint): the rest repeat the best and count for nothing.
        best = survivors[0]
        survivors += [(-float("inf"), best[1], best[2])] * (self.width - len(survivors))
        self._paths = [Path(self._paths[beam], info) for _, beam, info in survivors]
        self._scores = [total for total, _, _ in survivors]
        return [Move(beam, info.id) for _, beam, info in survivors]

    def answers(self) -> list[Hypothesis]:
        """The best that have ended, at most `num_answers`."""
        return self._ended[: self.num_answers]

    def interrupted(self, finish: Finish.ValueType) -> list[Hypothesis]:
        """The best so far, ended or not; always `num_answers`, empty ones where there is nothing yet."""
        open_beams = [
            Hypothesis(self._worth(score), path, End(finish))
            for score, path in zip(self._scores, self._paths, strict=True)
            if score > -float("inf")
        ]
        best = sorted([*self._ended, *open_beams], key=lambda one: -one.worth)[: self.num_answers]
        return best + [Hypothesis(-float("inf"), None, End(finish))] * (self.num_answers - len(best))

    def _worth(self, score: float) -> float:
        return float(score / max(1, self._length) ** self._penalty)

    def _may_improve(self, best_open: float) -> bool:
        if len(self._ended) < self.width:
            return True
        if self._early == "first":
            return False
        longest = self._early == "never" and self._penalty > 0
        length = self._max_new if longest else self._length
        return float(best_open / length**self._penalty) > self._ended[-1].worth
