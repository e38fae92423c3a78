"""
The KV cache's blocks: who holds which, and what a free one still remembers.

    free ----allocate----> in use ----last release, has no key----> free
                             ^  |
                      claim  |  +----last release, has a key------> cached (least recently used first)
                             +---------------------------------------+
                    allocate, when nothing is free, takes the oldest cached block and forgets its key

`free + cached + in_use == total` holds after every call.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """
    `total` blocks with reference counts and a key -> block table for reuse.

    Releasing a sequence's blocks from last to first makes the least recently used cached block always a leaf: whoever
    holds a block also holds all blocks before it, so a parent is never released before its child.

    >>> pool = BlockPool(2)
    >>> a, b = pool.allocate(2)
    >>> pool.register(a, b"key"); pool.release([a, b])
    >>> pool.num_free, pool.num_cached, pool.num_in_use, pool.lookup([b"key"]) == [a]
    (1, 1, 0, True)
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._refs = [0] * total
        self._keys: list[bytes | None] = [None] * total
        self._by_key: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self.releases = 0  # grows whenever blocks become available: what waits for room looks again only then

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds and that remember nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds but that a prompt may claim by key."""
        return len(self._cached)

    @property
    def num_in_use(self) -> int:
        """Blocks that some sequence holds."""
        return self.total - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with one reference each; the caller has checked `num_available`."""
        assert count <= self.num_available, "allocation beyond what is available"
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _nothing = self._cached.popitem(last=False)
                self._forget(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the longest run of `keys` from the first on that the cache knows; takes no reference."""
        blocks = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_unheld(self, blocks: Sequence[int]) -> int:
        """How many of these are cached, so that claiming them takes from what is available."""
        return sum(1 for block in blocks if not self._refs[block])

    def claim(self, blocks: Sequence[int]) -> None:
        """Add one reference to each block; a cached one comes back into use."""
        for block in blocks:
            if not self._refs[block]:
                del self._cached[block]
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block, last first."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, "release of a block that nobody holds"
            self._refs[block] -= 1
            if not self._refs[block]:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None
        if blocks:
            self.releases += 1

    def register(self, block: int, key: bytes) -> None:
        """Remember a full, computed block under its key; the first block to claim a key keeps it."""
        if key not in self._by_key and self._keys[block] is None:
            self._by_key[key] = block
            self._keys[block] = key

    def is_shared(self, block: int) -> bool:
        """Whether more than one sequence holds the block: writing into it needs a copy first."""
        return self._refs[block] > 1

    def forget_all(self) -> None:
        """Drop every key; cached blocks become free."""
        self._by_key.clear()
        self._keys = [None] * self.total
        self._free.extend(self._cached)
        self._cached.clear()
        self.releases += 1

    def check(self) -> None:
        """
        Recount everything. For tests and idle moments: O(total).

        Raises:
            RuntimeError: a block is lost, counted twice, or remembered wrongly.
        """
        in_use = sum(1 for refs in self._refs if refs > 0)
        idle = set(self._free) | set(self._cached)
        lawful = (
            len(self._free) + len(self._cached) + in_use == self.total
            and len(idle) == len(self._free) + len(self._cached)
            and all(self._refs[block] == 0 for block in idle)
            and all(self._keys[block] is None for block in self._free)
            and all(self._keys[block] == key for key, block in self._by_key.items())
            and len(self._by_key) == sum(1 for key in self._keys if key is not None)
        )
        if not lawful:
            raise RuntimeError(
                "KV block accounting is broken: "
                f"free {len(self._free)} + cached {len(self._cached)} + in use {in_use}, total {self.total}"
            )

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        del self._by_key[key]
        self._keys[block] = None
