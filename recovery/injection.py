"""The fault injector: breaks a running job on a schedule, and writes down what it did.

``python -m ftrain.recovery.injection --job <run_dir>/job.json`` is started by the front.  It is no
part of what it breaks: it knows a node by its file (``node_file``), the ranks by their telemetry
pages, and writes the ground truth to ``<run_dir>/faults.jsonl``, one event before each fault
(``fault_begin``) and one after (``fault_end``).  Such a file can be replayed (``faults.replay``).

A fault at a phase shorter than the injector's own reaction (inside the optimizer, at a boundary),
or one that is code inside the rank, is armed in the rank's page, and the rank commits it itself.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ftrain.comms.errors import ConfigError, FtrainError, RunDirectoryError
from ftrain.comms.events import EventLog, read_events
from ftrain.comms.job import JobSpec, read_job
from ftrain.comms.process import die_with_parent, ignore_stop_signals
from ftrain.comms.protocol.phases import Phase
from ftrain.configs.schema import FaultConfig, FaultsConfig
from ftrain.recovery.faults import (
    CATALOGUE,
    PHASES,
    FaultKind,
    Target,
    check_fault,
    check_schedule,
)
from ftrain.recovery.sightings import Sighting, Sightings
from ftrain.recovery.strikes import Strike, Tools
from ftrain.recovery.victims import check_memory_trap

FAULTS_FILE = "faults.jsonl"
_LOG_BYTES_MAX = 64 * 1024 * 1024
_NEAR_S = 0.0005  # between two looks when the moment is near
_FAR_S = 0.05
_ARM_S = 0.05  # what arming a rank may take
_PHASE_MISSES = 4  # steps in which the wanted phase was too short to be seen; then any will do


class Injector:
    """Commits faults on one job. :meth:`run` returns the ``fault_end`` events."""

    def __init__(self, job: JobSpec, faults: Sequence[FaultConfig], seed: int) -> None:
        self._job = job
        self._faults = faults
        self._seed = seed
        self._began_s = time.monotonic()
        self._sightings = Sightings(job.run_dir, job.all_nodes)
        self._log = EventLog(Path(job.run_dir) / FAULTS_FILE, _LOG_BYTES_MAX)
        self._tools = Tools(Path(job.run_dir), self._sightings, self._log, self._check_running)
        if any(CATALOGUE[fault.kind].kind is FaultKind.OOM for fault in faults):
            check_memory_trap()

    async def run(self) -> list[dict[str, Any]]:
        """Commit every fault of the schedule, each when it is due."""
        tasks = [
            asyncio.create_task(self._follow(index, fault))
            for index, fault in enumerate(self._faults)
        ]
        try:
            return [end for ends in await asyncio.gather(*tasks) for end in ends]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._sightings.close()
            self._log.close()

    async def _follow(self, index: int, fault: FaultConfig) -> list[dict[str, Any]]:
        """Everything that one line of the schedule asks for."""
        chance = random.Random(f"{self._seed}:{index}")
        repeats = fault.count_max if fault.mtbf_s > 0 else 1
        ends = []
        for number in range(repeats):
            if fault.mtbf_s > 0:
                await asyncio.sleep(chance.expovariate(1.0 / fault.mtbf_s))
            strike = Strike(
                f"{os.getpid()}-{index}-{number}",
                self._drawn(fault, chance),
                CATALOGUE[fault.kind],
                self._began_s,
                self._tools,
            )
            local = self._drawn_local(strike.fault, chance)
            await self._wait(strike)
            strike.fault = await self._found(strike.fault, local)
            ends.append(await strike.commit())
        return ends

    def _drawn(self, fault: FaultConfig, chance: random.Random) -> FaultConfig:
        """The fault with a rank drawn, where it says random: where that is, time will tell."""
        target = CATALOGUE[fault.kind].target
        if target is Target.JOB or max(fault.rank, fault.node) >= 0:
            return fault
        first = chance.randrange(self._job.nodes) * self._job.local_world
        return replace(fault, rank=first + (self._draw(chance) if target is Target.RANK else 0))

    def _drawn_local(self, fault: FaultConfig, chance: random.Random) -> int:
        """Which of its node's ranks it hits, where it names the node alone."""
        named = CATALOGUE[fault.kind].target is Target.RANK and fault.rank < 0
        return self._draw(chance) if named else 0

    def _draw(self, chance: random.Random) -> int:
        return chance.randrange(self._job.local_world)

    async def _found(self, fault: FaultConfig, local: int) -> FaultConfig:
        """The fault, now that it is due, with the victim's number: ranks move between nodes."""
        target = CATALOGUE[fault.kind].target
        if target is Target.RANK and fault.rank < 0:
            while len(seen := self._there(fault)) <= local:
                await asyncio.sleep(_NEAR_S)
            return replace(fault, rank=sorted(each.rank for each in seen)[local], node=-1)
        if target is Target.NODE and fault.node < 0:
            while not (seen := self._there(fault)):
                await asyncio.sleep(_NEAR_S)
            return replace(fault, node=seen[0].file.node)
        return fault

    def _there(self, fault: FaultConfig) -> list[Sighting]:
        self._look()
        return self._sightings.there(fault.node, fault.rank)

    async def _wait(self, strike: Strike) -> None:
        """Until the fault is due; what a rank can time better itself is due at once."""
        fault = strike.fault
        if fault.at_s >= 0:
            await asyncio.sleep(self._began_s + fault.at_s - time.monotonic())
        if strike.timed_by_rank:
            if fault.at_step >= 0:
                await self._wait_for_step(replace(fault, phase="any"), early=True)
            return
        if fault.phase == "recovery":
            await self._wait_for_recovery(fault)
        elif fault.at_step >= 0 or fault.phase != "any":
            await self._wait_for_step(fault)
        await asyncio.sleep(fault.delay_s)

    async def _wait_for_recovery(self, fault: FaultConfig) -> None:
        """Until ranks start again, in a later formation than the first, after ``at_step``."""
        while True:
            self._look()
            if self._sightings.reached >= fault.at_step:
                for seen in self._candidates(fault):
                    later = seen.file.epoch > self._sightings.first_epoch
                    if later and seen.phase in PHASES["recovery"]:
                        return
            await asyncio.sleep(_NEAR_S)

    async def _wait_for_step(self, fault: FaultConfig, *, early: bool = False) -> None:
        """Until the victim (any rank, if it is none) is at the step and in the phase; or so long
        before that there is time to arm it."""
        enough = -1  # step from which the phase is no longer waited for
        while True:
            self._look()
            wait_s = _FAR_S
            for seen in self._candidates(fault):
                ahead = fault.at_step - seen.step
                if early:
                    ahead -= 2 + int(_ARM_S / seen.median_s if seen.median_s else 0)
                if ahead <= 0:
                    enough = enough if enough >= 0 else seen.step + _PHASE_MISSES
                    if seen.phase in PHASES[fault.phase] or seen.step >= enough:
                        return
                near_s = max(_NEAR_S, (ahead - 1) * seen.median_s / 2)
                wait_s = min(wait_s, near_s)
            await asyncio.sleep(wait_s)

    def _candidates(self, fault: FaultConfig) -> list[Sighting]:
        """Ranks whose progress says that the fault is due."""
        node = fault.node
        found = list(self._sightings.ranks(node, fault.rank if node < 0 else -1))
        # A node without ranks, a spare, has no progress of its own.
        return found if found or node < 0 else list(self._sightings.ranks())

    def _look(self) -> None:
        self._check_running()
        self._sightings.look()

    def _check_running(self) -> None:
        if self._job.front_pid and not Path(f"/proc/{self._job.front_pid}").exists():
            raise RunDirectoryError(
                f"no job runs in {self._job.run_dir}: launch it before breaking it"
            )


def inject_now(run_dir: str | os.PathLike[str], fault: FaultConfig) -> dict[str, Any]:
    """Commit one fault on the job that runs in ``run_dir``; returns what was written of its end.

    At once, or at ``at_step``, ``at_s`` or in ``phase`` where the fault says so.  Raises
    :class:`ConfigError` for a fault that this job can't have, :class:`RunDirectoryError` when no
    job runs there.
    """
    job = read_job(Path(run_dir) / "job.json")
    check_fault(fault, nodes=job.all_nodes, world_size=job.nodes * job.local_world, now=True)
    seed = random.SystemRandom().getrandbits(32)
    return asyncio.run(Injector(job, (fault,), seed).run())[-1]


def never_struck(job: JobSpec, injector_pid: int) -> list[str]:
    """The faults with a set time that this injector, which has ended, did not come to."""
    begun = {
        event["id"]
        for event in read_events(Path(job.run_dir) / FAULTS_FILE)
        if event["kind"] == "fault_begin"
    }
    missed = []
    for index, fault in enumerate(_schedule(job.config.faults)):
        if fault.mtbf_s > 0 or f"{injector_pid}-{index}-0" in begun:
            continue
        when = f"step {fault.at_step}" if fault.at_step >= 0 else f"{fault.at_s:g} s"
        missed.append(f"{fault.kind} at {when}")
    return missed


def _schedule(faults: FaultsConfig) -> tuple[FaultConfig, ...]:
    """Every fault, replayed ones last."""
    replayed = replay_schedule(faults.replay) if faults.replay else ()
    return (*faults.schedule, *replayed)


def replay_schedule(path: str | os.PathLike[str]) -> tuple[FaultConfig, ...]:
    """The schedule that commits again what a ``faults.jsonl`` says was done, each at its step.

    Raises :class:`ConfigError` when the file holds no fault.
    """
    done: dict[str, dict[str, Any]] = {}
    for event in read_events(path):
        if event["kind"] in ("fault_begin", "fault_end"):
            done[event["id"]] = {**done.get(event["id"], {}), **event}
    if not done:
        raise ConfigError(
            f"faults.replay={path}: no fault is written there; was it a faults.jsonl?"
        )
    try:
        return tuple(_again(event) for event in done.values())
    except (KeyError, ValueError, msgspec.ValidationError) as error:
        raise ConfigError(f"faults.replay={path}: a fault can't be read: {error}") from None


def _again(event: dict[str, Any]) -> FaultConfig:
    fault = msgspec.convert(event["config"], FaultConfig)
    still = replace(fault, at_step=-1, at_s=-1.0, mtbf_s=-1.0, count_max=1, delay_s=0.0)
    if fault.phase == "recovery":  # which boundary it began from, and which phase, are its own
        return replace(still, at_step=event["reached"], delay_s=fault.delay_s)
    if event["step"] < 0:
        return replace(still, at_s=event["elapsed_s"])
    return replace(still, at_step=event["step"], phase=_phase_name(event["phase"]))


def _phase_name(phase: str) -> str:
    names = {Phase.STEP: "forward_backward", Phase.OPTIMIZER: "optimizer"}
    names[Phase.BOUNDARY] = "boundary"
    return names.get(Phase[phase.upper()], "any") if phase else "any"


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow the schedule of a job to its end; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ftrain.recovery.injection")
    parser.add_argument("--job", required=True, help="path of the job file")
    try:
        job = read_job(parser.parse_args(arguments).job)
        if job.front_pid:
            die_with_parent(job.front_pid)
            ignore_stop_signals()
        faults = replace(job.config.faults, schedule=_schedule(job.config.faults))
        check_schedule(faults, nodes=job.all_nodes, world_size=job.nodes * job.local_world)
        asyncio.run(Injector(job, faults.schedule, faults.seed).run())
    except FtrainError as error:
        sys.stderr.write(f"ftrain: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
