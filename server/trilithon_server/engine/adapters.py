"""
Which adapter is in which slot of every rank: the leader's mind for it. No clock, no files, no tensors.

    wanted --READ--> reading (a thread of each rank) --PUT--> all ranks agree --> ready --DROP--> free
                                                          \\--> failed: its requests alone are told

Commands travel in plans, so every rank carries them out in the same order, between the same steps. A request pins its
slot from the moment it is handed to the scheduler until it ends; what nobody pins may be evicted, least recently used
first, and is read again at its next use. Where all slots are pinned, one of them is closed: it takes no new requests,
so what waits for a slot gets one however busy the others are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from trilithon_server.engine.request import Request
from trilithon_server.engine.wire_pb2 import Adapter, AdapterControl, AdapterEvent, Error


class Action(IntEnum):
    """READ: begin to read, beside the steps. PUT: take what was read. DROP: empty the slot."""

    READ = 0
    PUT = 1
    DROP = 2


@dataclass(frozen=True, slots=True)
class Command:
    """What every rank does with a slot. Of a READ: where, and which digest the content must have (empty: any)."""

    action: Action
    slot: int
    digest: str = ""
    directory: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a READ (the sampling rank is done with it) or of a PUT (`code` empty: all ranks have it)."""

    action: Action
    slot: int
    code: str = ""
    message: str = ""


@dataclass(slots=True, eq=False)
class _Slot:
    """One slot in use; a free one is none of these."""

    number: int
    digest: str
    ready: bool = False
    closing: bool = False  # takes no new request; dropped when the last pin goes
    pins: int = 0
    used: int = 0  # when it was last pinned or let go


@dataclass(slots=True)
class Failure:
    """Requests whose adapter could not be loaded."""

    requests: list[Request]
    code: str
    message: str


@dataclass(slots=True, eq=False)
class AdapterSlots:
    """
    Slots and who waits for them. `num_slots` 0: this engine serves no adapters.

    Attributes:
        waiting: requests whose adapter has no slot or is still being loaded, in order of arrival.
        events: what fronts are to be told.
        loads, failures: counters.
    """

    num_slots: int
    waiting: list[Request] = field(default_factory=list)
    events: list[AdapterEvent] = field(default_factory=list)
    loads: int = 0
    failures: int = 0
    _slots: dict[str, _Slot] = field(default_factory=dict)  # by digest
    _pins: dict[int, _Slot] = field(default_factory=dict)  # by request id
    _warm: dict[str, Adapter] = field(default_factory=dict)  # asked for without a request, by digest
    _commands: list[Command] = field(default_factory=list)
    _clock: int = 0

    @property
    def num_loaded(self) -> int:
        """Adapters that can be used now."""
        return sum(slot.ready for slot in self._slots.values())

    @property
    def has_errand(self) -> bool:
        """Whether the ranks have something to be told, or to tell, though no step may be due."""
        return bool(self._commands) or any(not slot.ready for slot in self._slots.values())

    @property
    def is_busy(self) -> bool:
        """Whether anything here is unfinished, requests aside."""
        return bool(self._warm) or self.has_errand

    def slot_of(self, request: Request) -> int:
        """The slot of a request that was admitted; -1 for one of the base model."""
        slot = self._pins.get(request.id)
        return -1 if slot is None else slot.number

    def is_ready(self, digest: str) -> bool:
        """Whether it can be used now."""
        slot = self._slots.get(digest)
        return slot is not None and slot.ready and not slot.closing

    def pins_of(self, digest: str) -> int:
        """Requests at work with it."""
        slot = self._slots.get(digest)
        return 0 if slot is None else slot.pins

    # -- requests -------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """A request of an adapter waits for it, if only until `admit`."""
        self.waiting.append(request)

    def release(self, request: Request) -> None:
        """A request has ended, wherever it was."""
        if request in self.waiting:
            self.waiting.remove(request)
        slot = self._pins.pop(request.id, None)
        if slot is not None:
            slot.pins -= 1
            self._touch(slot)
            if slot.closing and not slot.pins:
                self._drop(slot)

    def admit(self) -> list[Request]:
        """Pin and hand over the requests whose adapter is ready; begin to load what others wait for."""
        admitted = []
        for request in self.waiting:
            digest = request.submit.adapter.digest
            if self.is_ready(digest):
                slot = self._slots[digest]
                slot.pins += 1
                self._touch(slot)
                self._pins[request.id] = slot
                admitted.append(request)
        if admitted:
            self.waiting = [request for request in self.waiting if request.id not in self._pins]
        if self.waiting or self._warm:
            self._begin()
        return admitted

    # -- by an operator's word ------------------------------------------------------------------------------

    def control(self, control: AdapterControl) -> None:
        """Load an adapter or drop it, as a front asks."""
        if not self.num_slots:
            error = Error(code="adapters_unsupported", message="this engine serves no adapters.")
            self.events.append(AdapterEvent(digest=control.adapter.digest, error=error))
        elif control.kind == AdapterControl.LOAD:
            self.load(control.adapter)
        else:
            self.unload(control.adapter.digest)

    def load(self, adapter: Adapter) -> None:
        """Load an adapter without a request; an event says when it is there."""
        if self.is_ready(adapter.digest):
            self._touch(self._slots[adapter.digest])
            self.events.append(AdapterEvent(digest=adapter.digest, loaded=True))
        else:
            self._warm[adapter.digest] = adapter

    def unload(self, digest: str) -> int:
        """Drop an adapter once its requests have ended; how many they are. One that is being loaded stays."""
        slot = self._slots.get(digest)
        if slot is None or not slot.ready:
            return 0
        slot.closing = True
        if not slot.pins:
            self._drop(slot)
        return slot.pins

    # -- plans ----------------------------------------------------------------------------------------------

    def take_commands(self) -> list[Command]:
        """What the next plan tells the ranks."""
        commands, self._commands = self._commands, []
        return commands

    def land(self, reports: Sequence[Report]) -> list[Failure]:
        """Take in what ranks say; the requests that end with it."""
        failed = []
        for report in reports:
            slot = next(slot for slot in self._slots.values() if slot.number == report.slot)
            if report.action == Action.READ:  # here; the others are about to be, or wait in the PUT
                self._commands.append(Command(Action.PUT, slot.number))
            elif not report.code:
                slot.ready = True
                self.loads += 1
                self._touch(slot)
                self._warm.pop(slot.digest, None)
                self.events.append(AdapterEvent(digest=slot.digest, loaded=True))
            else:
                del self._slots[slot.digest]
                self.failures += 1
                self._warm.pop(slot.digest, None)
                error = Error(code=report.code, message=report.message)
                self.events.append(AdapterEvent(digest=slot.digest, error=error))
                theirs = [request for request in self.waiting if request.submit.adapter.digest == slot.digest]
                failed.append(Failure(theirs, report.code, report.message))
        return failed

    def check(self) -> None:
        """
        The law of slots, for tests and idle moments.

        Raises:
            RuntimeError: a slot is held twice, or pins are not those of the requests.
        """
        numbers = [slot.number for slot in self._slots.values()]
        pins = {slot.digest: 0 for slot in self._slots.values()}
        for slot in self._pins.values():
            pins[slot.digest] = pins.get(slot.digest, 0) + 1
        lawful = (
            len(numbers) == len(set(numbers)) <= self.num_slots
            and all(0 <= number < self.num_slots for number in numbers)
            and all(slot.pins == pins[digest] and slot.digest == digest for digest, slot in self._slots.items())
            and all(slot.ready or not slot.pins for slot in self._slots.values())
            and pins.keys() == self._slots.keys()
        )
        if not lawful:
            raise RuntimeError(f"adapter slots are broken: {self._slots}, pins {pins}")

    # -- slots ----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Give slots to adapters that are wanted and have none, in order; close one where all are pinned."""
        wanted = {request.submit.adapter.digest: request.submit.adapter for request in self.waiting} | self._warm
        missing = [adapter for digest, adapter in wanted.items() if digest not in self._slots]
        if not missing:  # then nobody needs what was closed, and it may be wanted again
            self._reopen(wanted)
        closing = sum(slot.closing for slot in self._slots.values())
        for adapter in missing:
            number = self._free()
            if number is None:
                if closing:
                    closing -= 1  # one slot on its way for each that waits
                    continue
                pinned = [slot for slot in self._slots.values() if slot.ready and not slot.closing]
                if pinned:
                    min(pinned, key=lambda slot: slot.used).closing = True
                continue
            slot = self._slots[adapter.digest] = _Slot(number, adapter.digest)
            self._touch(slot)
            content = adapter.digest if adapter.checked else ""
            self._commands.append(Command(Action.READ, number, content, adapter.directory))

    def _reopen(self, wanted: Mapping[str, Adapter]) -> None:
        for slot in self._slots.values():
            if slot.closing and slot.digest in wanted:
                slot.closing = False
                if self._warm.pop(slot.digest, None) is not None:
                    self.events.append(AdapterEvent(digest=slot.digest, loaded=True))

    def _free(self) -> int | None:
        """A slot that nobody has, if need be by dropping the one that has not been used for longest."""
        held = {slot.number for slot in self._slots.values()}
        if len(held) == self.num_slots:
            idle = [slot for slot in self._slots.values() if slot.ready and not slot.pins]
            if not idle:
                return None
            oldest = min(idle, key=lambda slot: slot.used)
            self._drop(oldest)
            held.discard(oldest.number)
        return next(number for number in range(self.num_slots) if number not in held)

    def _drop(self, slot: _Slot) -> None:
        del self._slots[slot.digest]
        self._commands.append(Command(Action.DROP, slot.number))
        self.events.append(AdapterEvent(digest=slot.digest))

    def _touch(self, slot: _Slot) -> None:
        self._clock += 1
        slot.used = self._clock
