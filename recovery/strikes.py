"""How each kind of deliberate fault is committed, and what is written down about it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftrain.comms.events import EventLog
from ftrain.comms.protocol.phases import Phase
from ftrain.comms.telemetry import Word
from ftrain.configs.schema import FaultConfig
from ftrain.recovery.faults import OOM_ALLOWANCE_BYTES, PHASES, FaultKind, FaultSpec, Target, arm
from ftrain.recovery.hold import hold_coordinator, let_go
from ftrain.recovery.sightings import Sighting, Sightings
from ftrain.recovery.victims import MemoryTrap, Victim, seize_node

_POLL_S = 0.002
_END_S_MAX = 30.0  # how long a killed process may take to go
_SHORT_PHASES = ("optimizer", "boundary")
_LASTING = {  # nobody ends
    FaultKind.GIL_HANG: "it sleeps now and holds the GIL",
    FaultKind.SKIP_COLLECTIVE: "it left out an all-reduce",
    FaultKind.SIGSTOP: "stopped",
}


@dataclass(frozen=True, slots=True)
class Tools:
    """What every strike uses."""

    run_dir: Path
    sightings: Sightings
    log: EventLog
    check_running: Callable[[], None]  # raises when the job is over
    pages: dict[int, asyncio.Lock] = field(default_factory=dict)  # a page holds one fault


@dataclass(slots=True)
class Strike:
    """One fault on one victim."""

    id: str
    fault: FaultConfig  # with its victim
    spec: FaultSpec
    began_s: float  # when the injector began, CLOCK_MONOTONIC
    tools: Tools
    _facts: dict[str, Any] = field(default_factory=dict)

    @property
    def by_rank(self) -> bool:
        """Whether the rank commits it itself."""
        short = self.spec.target is Target.RANK and self.fault.phase in _SHORT_PHASES
        return self.spec.inside or (short and self.fault.resume_s < 0)

    @property
    def timed_by_rank(self) -> bool:
        """Whether the rank waits for the step and the phase too.

        Not with a delay; and an OOM victim's memory is limited at the last moment only.
        """
        alone = self.spec.kind is not FaultKind.OOM and self.fault.delay_s == 0
        return self.by_rank and alone and self.fault.phase != "recovery"

    async def commit(self) -> dict[str, Any]:
        """Do it now; returns the ``fault_end`` event's own fields."""
        if self.by_rank:
            outcome = await self._by_rank()
        elif self.spec.target is Target.RANK:
            outcome = await self._signal_rank()
        elif self.spec.kind is FaultKind.COORDINATOR:
            outcome = await self._coordinator()
        elif self.spec.kind is FaultKind.NODE:
            outcome = await self._node()
        else:
            outcome = await self._node_process()
        return self._write("fault_end", outcome=outcome)

    # ---- ranks

    async def _signal_rank(self) -> str:
        async with self._rank_victim() as victim:
            self._begin(victim.pid)
            if self.spec.kind is FaultKind.SIGKILL:
                return await self._kill([victim])
            self._strike([victim], signal.SIGSTOP)
            if self.fault.resume_s < 0:
                return "stopped"
            await asyncio.sleep(self.fault.resume_s)
            victim.send(signal.SIGCONT)
            return "ended while stopped" if victim.ended else "stopped and resumed"

    async def _by_rank(self) -> str:
        """Arm the rank's page, again for each new process of the rank, until it says it did it."""
        lock = self.tools.pages.setdefault(self.fault.rank, asyncio.Lock())
        async with lock:
            return await self._armed_until_done()

    async def _armed_until_done(self) -> str:
        while True:
            async with self._rank_victim() as victim:
                trap = None
                self._begin(victim.pid)
                if self.spec.kind is FaultKind.OOM:
                    trap = MemoryTrap(victim.pid, OOM_ALLOWANCE_BYTES)
                try:
                    if await self._armed(victim):
                        return await self._after_firing(victim)
                finally:
                    while trap is not None and victim.ended and not trap.remove():
                        await asyncio.sleep(_POLL_S)

    async def _armed(self, victim: Victim) -> bool:
        """Whether the rank committed the fault; False when its process ended without."""
        step, phase = 0, None
        if self.timed_by_rank:
            step = max(0, self.fault.at_step)
            wanted = PHASES[self.fault.phase]
            phase = wanted[0] if len(wanted) == 1 else None
        began_ns = time.monotonic_ns()
        armed: Sighting | None = None
        while True:
            ended = victim.ended  # before the page is read: it may fire and end in between
            if armed is not None and armed.page[Word.FAULT_FIRED_NS] >= began_ns:
                self._see_fired(armed)
                return True
            if ended:
                return False
            seen = self._sighting()
            if seen is not None and seen.entry.pid == victim.pid:
                # In this order: the rank says that it fired, then forgets that it is armed.  It
                # may also be unarmed because the agent cleared the page.
                unarmed = not seen.page[Word.FAULT_KIND]
                if unarmed and seen.page[Word.FAULT_FIRED_NS] < began_ns:
                    arm(seen.page, self.spec.kind, step, phase)
                armed = seen
            await asyncio.sleep(_POLL_S)

    async def _after_firing(self, victim: Victim) -> str:
        if self.spec.kind in _LASTING:
            return _LASTING[self.spec.kind]
        return await self._gone([victim])

    @contextlib.asynccontextmanager
    async def _rank_victim(self) -> AsyncIterator[Victim]:
        """The rank's process, as soon as there is one."""
        while True:
            self.tools.check_running()
            seen = self._sighting()
            victim = _seize(seen.entry.pid, seen.file.starts) if seen is not None else None
            if victim is not None:
                break
            await asyncio.sleep(_POLL_S)
        with victim:
            yield victim

    def _sighting(self) -> Sighting | None:
        self.tools.sightings.look()
        return next(self.tools.sightings.ranks(rank=self.fault.rank), None)

    # ---- nodes and the coordinator

    async def _node_process(self) -> str:
        attribute = f"{self.spec.name}_pid"
        while True:
            self.tools.check_running()
            self.tools.sightings.look()
            file = self.tools.sightings.files.get(self.fault.node)
            victim = _seize(getattr(file, attribute), file.starts) if file is not None else None
            if victim is not None:
                break
            await asyncio.sleep(_POLL_S)
        with victim:
            self._begin(victim.pid)
            return await self._kill([victim])

    async def _node(self) -> str:
        while True:
            self.tools.check_running()
            self.tools.sightings.look()
            file = self.tools.sightings.files.get(self.fault.node)
            if file is not None and _alive(file.agent_pid, file.starts):
                break
            await asyncio.sleep(_POLL_S)
        self._begin(file.agent_pid)
        victims = seize_node(file)
        try:
            self._facts["pids"] = [victim.pid for victim in victims]
            return await self._kill(victims)
        finally:
            for victim in victims:
                victim.send(signal.SIGKILL)  # also when this was cut short: none stays stopped
                victim.close()

    async def _coordinator(self) -> str:
        while (victim := _coordinator(self.tools.run_dir)) is None:
            self.tools.check_running()
            await asyncio.sleep(_POLL_S)
        with victim:
            self._begin(victim.pid)
            try:
                if self.fault.down_s > 0:
                    hold_coordinator(self.tools.run_dir, self.fault.down_s)
                outcome = await self._kill([victim])
                await asyncio.sleep(self.fault.down_s)
                return outcome
            finally:
                let_go(self.tools.run_dir)

    # ---- common

    async def _kill(self, victims: list[Victim]) -> str:
        self._strike(victims, signal.SIGKILL)
        return await self._gone(victims)

    def _strike(self, victims: Iterable[Victim], number: signal.Signals) -> None:
        for victim in victims:
            victim.send(number)
        self._facts["struck_ns"] = time.monotonic_ns()

    async def _gone(self, victims: list[Victim]) -> str:
        deadline_s = time.monotonic() + _END_S_MAX
        while not all(victim.ended for victim in victims):
            if time.monotonic() > deadline_s:
                left = [victim.pid for victim in victims if not victim.ended]
                return f"still there after {_END_S_MAX:.0f} s: {left}"
            await asyncio.sleep(_POLL_S)
        return "ended"

    def _begin(self, pid: int) -> None:
        self.tools.sightings.look()
        rank = self.fault.rank if self.spec.target is Target.RANK else -1
        ranks = self.tools.sightings.ranks
        there = list(ranks(node=self.fault.node, rank=rank)) or (ranks() if rank < 0 else ())
        seen = max(there, key=lambda each: each.step, default=None)
        self._facts |= {"pid": pid, "node": self.fault.node, "step": -1, "phase": ""}
        self._facts["epoch"] = -1
        if seen is not None:
            self._see(seen)
        self._facts |= {
            "rank": rank,
            "reached": self.tools.sightings.reached,
            "elapsed_s": time.monotonic() - self.began_s,
        }
        self._write("fault_begin", config=dataclasses.asdict(self.fault))

    def _see(self, seen: Sighting) -> None:
        """Note where the victim (or, where it is no rank, the foremost rank) stands."""
        self._facts |= {"step": seen.step, "phase": seen.phase.name.lower()}
        self._facts |= {"epoch": seen.file.epoch, "node": self.fault.node}
        if self.spec.target is Target.RANK:
            self._facts["node"] = seen.file.node

    def _see_fired(self, seen: Sighting) -> None:
        """Note what the rank wrote down when it committed the fault."""
        page = seen.page
        self._facts["struck_ns"] = page[Word.FAULT_FIRED_NS]
        self._facts["step"] = page[Word.FAULT_FIRED_STEP]
        self._facts["phase"] = Phase(page[Word.FAULT_FIRED_PHASE]).name.lower()
        self._facts["epoch"] = seen.file.epoch

    def _write(self, kind: str, **fields: object) -> dict[str, Any]:
        event = {"id": self.id, "fault": self.spec.name, **self._facts, **fields}
        self.tools.log.write(kind, **event)
        return event


def _seize(pid: int, starts: dict[int, int]) -> Victim | None:
    """The process, if it runs and is the one meant."""
    if pid not in starts:
        return None
    try:
        return Victim(pid, starts[pid])
    except ProcessLookupError:
        return None


def _alive(pid: int, starts: dict[int, int]) -> bool:
    victim = _seize(pid, starts)
    if victim is not None:
        victim.close()
    return victim is not None


def _coordinator(run_dir: Path) -> Victim | None:
    """The coordinator, by the pid that it wrote down and its command line."""
    try:
        pid = int((run_dir / "state" / "coordinator.pid").read_text())
        victim = Victim(pid)
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    if b"coordinator" in command:
        return victim
    victim.close()
    return None
