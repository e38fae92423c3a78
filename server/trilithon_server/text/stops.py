"""Stop strings in a text that comes in pieces: nothing that could still become a stop string is let out too early."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """
    Looks for the first stop string; the result does not depend on how the text is cut into pieces.

    >>> finder = StopFinder(["\\n\\n"])
    >>> finder.push("one\\n"), finder.push("\\ntwo")
    (('one', None), ('', '\\n\\n'))
    >>> finder.tail
    'two'

    Args:
        stops: strings that are not empty. The one that is complete first wins; of two that are complete at the
            same character, the longer.
        keep: let the stop string out as well.
    """

    __slots__ = ("_firsts", "_held", "_keep", "_longest", "_stops", "tail")

    def __init__(self, stops: Sequence[str], *, keep: bool = False) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._keep = keep
        self._held = ""
        self.tail = ""
        """What came after the stop string in the piece that completed it."""

    def push(self, piece: str) -> tuple[str, str | None]:
        """Take the next piece; returns the text that may go out and the stop string, once one is complete."""
        if not self._stops:
            return piece, None
        text = self._held + piece
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        if best is not None:
            end, start, stop = best
            self._held = ""
            self.tail = text[end:]
            return text[: end if self._keep else start], stop
        cut = self._hold_from(text)
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _hold_from(self, text: str) -> int:
        """Where the longest tail of `text` that begins a stop string starts."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._firsts:
                tail = text[start:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return start
        return len(text)
