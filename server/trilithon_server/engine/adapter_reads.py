"""A rank's part in loading adapters: read beside the steps, agree with the other ranks, then use."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from trilithon_parallel.collectives import all_gather
from trilithon_parallel.config import ModelError
from trilithon_parallel.grid import Grid
from trilithon_parallel.lora.bank import Adapter, AdapterBank
from trilithon_server.engine.adapters import Action, Command, Report

LOAD_FAILED = "adapter_load_failed"
_WORDS_BYTES = 1024  # of a failure's words, as ranks exchange them


class AdapterReads:
    """
    Carries out commands on this rank's bank, in the order of plans.

    Args:
        bank: of this rank's stage.
        grid: all of its ranks carry out the same commands.
    """

    def __init__(self, bank: AdapterBank, grid: Grid) -> None:
        self.bank = bank
        self._grid = grid
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._reads: dict[int, Future[Adapter | str]] = {}
        self._unreported: list[int] = []

    def run(self, commands: Sequence[Command]) -> list[Report]:
        """
        Carry out a plan's commands; what there is to report, of earlier reads too.

        Raises:
            CollectiveError: another rank is gone.
        """
        reports = []
        for command in commands:
            if command.action == Action.READ:
                self._reads[command.slot] = self._pool.submit(self._read, command.digest, Path(command.directory))
                self._unreported.append(command.slot)
            elif command.action == Action.PUT:
                reports.append(self._put(command.slot))
            else:
                self.bank.unload(command.slot)
        for slot in [slot for slot in self._unreported if self._reads[slot].done()]:
            self._unreported.remove(slot)
            reports.append(Report(Action.READ, slot))
        return reports

    def _read(self, digest: str, directory: Path) -> Adapter | str:
        """The adapter, or why there is none, in words."""
        try:
            adapter = self.bank.read(directory)
        except ModelError as error:
            return f"{error.message} {error.hint}".strip()
        except (OSError, MemoryError) as error:
            return f"the files of the adapter cannot be read: {type(error).__name__}."
        except Exception as error:  # the edge: whatever a file does to its reader, the engine goes on
            traceback.print_exception(error, file=sys.stderr)
            return "the files of the adapter cannot be read: an error of the server, which its log has."
        if digest and adapter.digest != digest:
            return (
                f"the files of the adapter must have digest {digest[:16]}. Given: {adapter.digest[:16]}. They were "
                "changed after they were registered: restore them, or register the new ones under a name of their own."
            )
        return adapter

    def _put(self, slot: int) -> Report:
        """Take what was read, if every rank has read it."""
        self._unreported = [item for item in self._unreported if item != slot]
        read = self._reads.pop(slot).result()
        words = self._first_words(read if isinstance(read, str) else "")
        if not words and isinstance(read, Adapter):
            self.bank.put(slot, read)
            return Report(Action.PUT, slot)
        return Report(Action.PUT, slot, LOAD_FAILED, words)

    def _first_words(self, words: str) -> str:
        """The words of the first rank that has any: the same on all of them."""
        if self._grid.world_size == 1:
            return words
        mine = torch.zeros(1, _WORDS_BYTES, dtype=torch.uint8)
        data = words.encode()[:_WORDS_BYTES]
        mine[0, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else mine[0, :0]
        for row in all_gather(mine, self._grid.world, dim=0, label="adapter").tolist():
            if any(row):
                return bytes(row).rstrip(b"\0").decode(errors="ignore")
        return ""
