"""Histories of a directory of versions: jobs that save, die, are followed, and live on too long."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from disk_model import Disk
from disk_recorder import Death, Recorder
from power_cuts import Key, Ledger, check
from power_writer import KEEP, RANKS, RUN, image_of

from ftrain.checkpoint.durable import DurableStore, Survey
from ftrain.checkpoint.retention import Retention
from ftrain.comms.errors import FtrainError
from ftrain.comms.protocol.messages import VersionId

LIFE_OPERATIONS = 500  # about as many as a life has
SHARES = (0.0, 0.3, 0.7, 1.0)  # of what is not safe


sweep = DurableStore.sweep


class Inline:
    """An executor that does it at once, in the thread that asks for it."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*arguments))
        return done


class World:
    """One history, drawn from a seed."""

    def __init__(self, root: Path, seed: int) -> None:
        self.recorder = Recorder(root, seed)
        self._chance = self.recorder.chance
        self._store = DurableStore(root / "checkpoints")
        self._fence = self._step = 0
        self._under_way: Key = (0, 0)  # written, and perhaps published
        self._held: VersionId | None = None  # in memory

    def run(self) -> None:
        """All of it."""
        for _ in range(self._chance.randrange(2, 5)):
            before = self._held  # of an epoch that was begun
            if self._chance.random() < 0.3:
                begin = len(self.recorder.trace) + self._chance.randrange(LIFE_OPERATIONS)
                self.recorder.full = range(begin, begin + self._chance.randrange(5, 60))
            runs: list[Callable[[], None]] = [self._newcomer]
            if before is not None and self._chance.random() < 0.4:
                zombie = before.epoch, before.step + 20
                runs.append(lambda zombie=zombie: self._late(*zombie))  # type: ignore[misc]
            deaths = (
                Death(operations=self._chance.randrange(1, LIFE_OPERATIONS)),
                Death(links=self._chance.randrange(1, 6)),  # a name is made, and not yet safe
                Death(),
            )
            self.recorder.go(*runs, death=self._chance.choices(deaths, (5, 3, 2))[0])
            self.recorder.full = range(0)
            if self._chance.random() < 0.5:
                self.recorder.go(self._heir)
            if self._chance.random() < 0.3:
                self.recorder.go(self._twin)
            if self._chance.random() < 0.3:
                self.recorder.go(self._sweep)

    # ---- processes

    def _newcomer(self) -> None:
        """A job that begins an epoch, and saves."""
        survey = self._store.survey()
        self._fence = survey.fence + 1
        parent = survey.versions[0].version if survey.versions else None
        if self._held is not None and self._chance.random() < 0.5:
            parent = max(self._held, parent or self._held)
        self._step = parent.step if parent else 0
        words = f"{self._fence} {parent.epoch if parent else 0} {self._step}"
        self.recorder.say(f"begins {words}")
        self._store.begin_fence(self._fence, RUN, parent)
        self.recorder.say(f"begun {words}")
        for _ in range(4):
            self._step += self._chance.randrange(1, 3)
            self._held = VersionId(self._fence, self._step + self._chance.randrange(3))
            self._save(self._fence, self._step)
            self._sweep()

    def _late(self, fence: int, step: int) -> None:
        """A process of an epoch that is over, or is just being ended."""
        for more in range(2):
            self._save(fence, step + more)
        if self._chance.random() < 0.5:
            self.recorder.say("sweeps late")
            self._sweep()

    def _heir(self) -> None:
        """Takes over within the epoch, and publishes what was under way."""
        fence, step = self._under_way
        if fence == self._fence and fence:
            self._publish(fence, step)

    def _twin(self) -> None:
        """Publishes something else under a fence and step that are taken."""
        newest = next(iter(self._store.versions()), None)
        if newest is not None:
            version, records = newest.version, newest.manifest.files
            self._tell(
                newest.key,
                lambda: self._store.publish(newest.fence, version, RUN, "f" * 32, RANKS, records),
            )

    def _sweep(self) -> None:
        """Also by a user, while nothing runs."""
        try:
            sweep(self._store, Retention(KEEP), RUN)
        except FtrainError:
            return

    def _save(self, fence: int, step: int) -> None:
        try:
            for rank in range(RANKS):
                image = image_of(fence, step, rank)
                self._store.write_image(fence, VersionId(fence, step), rank, image, Inline())  # type: ignore[arg-type]
        except FtrainError:
            return
        if fence == self._fence:
            self._under_way = fence, step
        self._publish(fence, step)

    def _publish(self, fence: int, step: int) -> None:
        version = VersionId(fence, step)
        self._tell((fence, step), lambda: self._store.publish_written(fence, version, RUN, RANKS))

    def _tell(self, key: Key, publish: Callable[[], object]) -> None:
        self.recorder.say(f"publishes {key[0]} {key[1]}")
        try:
            publish()
        except FtrainError:
            return
        self.recorder.say(f"published {key[0]} {key[1]}")


class PrunedWorld(World):
    """A publisher dies before its manifest's name is safe, and somebody sweeps right after."""

    def run(self) -> None:
        """All of it."""
        self.recorder.go(self._newcomer)
        self.recorder.go(self._newcomer, death=Death(links=2))
        self.recorder.go(self._sweep)


class UnsafeRecordWorld(World):
    """Who is granted an epoch dies before the record's name is safe; the one before goes on, and
    somebody sweeps."""

    def run(self) -> None:
        """All of it."""
        self.recorder.go(self._newcomer)
        before = self._fence, self._step + 20
        self.recorder.go(self._newcomer, death=Death(links=1))
        self.recorder.go(lambda: self._late(*before), self._sweep)
        self.recorder.go(self._sweep)


class Hesitant(DurableStore):
    """Looks, and often acts long after."""

    def __init__(self, directory: Path, recorder: Recorder) -> None:
        super().__init__(directory)
        self._recorder = recorder

    def survey(self) -> Survey:
        """As it was a while ago."""
        found = super().survey()
        if self._recorder.chance.random() < 0.7:
            self._recorder.stand_still()
        return found


class LateSweepWorld(World):
    """Whoever is granted an epoch goes on from a version that the epoch before sweeps away."""

    def __init__(self, root: Path, seed: int) -> None:
        super().__init__(root, seed)
        self._store = Hesitant(self._store.directory, self.recorder)

    def run(self) -> None:
        """All of it."""
        self.recorder.go(self._newcomer)
        before = self._fence, self._step + 20
        death = Death(operations=self._chance.randrange(10, 40))  # with a record, and no more
        self.recorder.go(self._newcomer, lambda: self._late(*before), self._sweeps, death=death)
        self.recorder.go(self._sweep)

    def _late(self, fence: int, step: int) -> None:
        """It sweeps as well, and may not know of the new epoch."""
        for more in range(KEEP):
            self._save(fence, step + more)
        self._sweeps()

    def _sweeps(self) -> None:
        self.recorder.say("sweeps late")
        for _ in range(3):
            self._sweep()


def explore(root: Path, seed: int, points: int) -> dict[str, int]:
    """One history, and what a disk may hold after a power cut at so many points of it."""
    (root / "live").mkdir(parents=True)
    world = World(root / "live", seed)
    world.run()
    trace = world.recorder.trace
    chance, disk, ledger = random.Random(seed), Disk(), Ledger()
    told = [at for at, op in enumerate(trace) if op[0] == "said"]
    chosen = {*chance.sample(range(len(trace)), min(points, len(trace)))}
    chosen |= {*chance.sample(told, min(points // 3, len(told)))}  # right after somebody was told
    for at, op in enumerate(trace):
        disk.apply(op)
        if op[0] == "said":
            ledger.note(str(op[1]))
        if at in chosen:
            place = root / str(at)
            disk.after_cut(place, chance, chance.choice(SHARES))
            if (place / "checkpoints").is_dir():
                (seen := Ledger()).merge(ledger)
                check(DurableStore(place / "checkpoints"), seen, zombies=True)
    return {"states": len(chosen), "operations": len(trace), "full": world.recorder.faults}
