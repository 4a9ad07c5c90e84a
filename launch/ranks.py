"""The ranks of one node in one epoch: their processes, telemetry pages and ends."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from ftrain.checkpoint.durable import DurableStore
from ftrain.comms.errors import FtrainError
from ftrain.comms.job import JobSpec
from ftrain.comms.process import OomKills, describe_exit, oom_kills
from ftrain.comms.protocol.effects import FlushVersion
from ftrain.comms.protocol.messages import Formation, Phases, RankFailure
from ftrain.comms.protocol.roster import is_consequence
from ftrain.comms.telemetry import Phase, TelemetryPage, Word
from ftrain.launch.contract import Seat
from ftrain.launch.rank_main import read_error_file
from ftrain.recovery.node_file import NodeRank

_SECOND_NS = 1_000_000_000
_TRACEBACK_CHARACTERS_MAX = 12_000


@dataclass(slots=True)
class LocalRank:
    """One rank."""

    seat: Seat
    page: TelemetryPage
    page_fd: int
    pid: int = 0  # 0: not forked yet
    status: int | None = None  # wait status, once it has ended
    blamed: bool = False  # a failure of it was reported

    @property
    def rank(self) -> int:
        """Its number in the group."""
        return self.seat.rank

    @property
    def alive(self) -> bool:
        """Whether it has a process."""
        return self.pid != 0 and self.status is None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the ranks of a node are."""

    step: int
    step_max: int
    kept_max: int  # highest boundary of which a rank set out to keep the version
    loss: float
    step_s: float  # median
    total_steps: int  # 0 unknown
    save_step: int  # boundary of the newest session.save() of all ranks, plus one


class PageStore:
    """Telemetry pages, one for each local rank, used again by its successors."""

    def __init__(self) -> None:
        self._pages: list[tuple[TelemetryPage, int]] = []

    def take(self, count: int) -> list[tuple[TelemetryPage, int]]:
        """``count`` zeroed pages and their descriptors; no rank may be using them."""
        while len(self._pages) < count:
            fd = TelemetryPage.create()
            self._pages.append((TelemetryPage(fd), fd))
        for page, _ in self._pages[:count]:
            page.clear()
        return self._pages[:count]

    def close(self) -> None:
        """Unmap and close all pages."""
        for page, fd in self._pages:
            page.close()
            os.close(fd)
        self._pages.clear()


@dataclass(slots=True)
class RankGroup:
    """All ranks of a node in one epoch."""

    formation: Formation
    ranks: tuple[LocalRank, ...]
    noticed_ns: int = 0  # of the failure that ended the epoch before
    stopped_ns: int = 0
    forked_ns: int = 0
    stepped: bool = False
    ooms: OomKills = field(default_factory=oom_kills)

    @classmethod
    def plan(cls, formation: Formation, seats: Sequence[Seat], pages: PageStore) -> RankGroup:
        """The ranks before they are forked."""
        taken = pages.take(len(seats))
        ranks = (LocalRank(seat, page, fd) for seat, (page, fd) in zip(seats, taken, strict=True))
        return cls(formation, tuple(ranks))

    @property
    def epoch(self) -> int:
        """The formation's."""
        return self.formation.epoch

    @property
    def all_forked(self) -> bool:
        """Whether every rank got a process."""
        return all(rank.pid for rank in self.ranks)

    @property
    def all_done(self) -> bool:
        """Whether every rank ended with exit code 0."""
        return all(rank.status == 0 for rank in self.ranks)

    @property
    def any_alive(self) -> bool:
        """Whether a rank has a process."""
        return any(rank.alive for rank in self.ranks)

    def of(self, rank: int) -> LocalRank:
        """The rank of that number; KeyError when it is another node's."""
        for local in self.ranks:
            if local.rank == rank:
                return local
        raise KeyError(rank)

    def dead(self) -> tuple[int, ...]:
        """Ranks that ended."""
        return tuple(rank.rank for rank in self.ranks if rank.status is not None)

    def listing(self) -> tuple[NodeRank, ...]:
        """The living ranks, for the node file."""
        return tuple(
            NodeRank(rank=rank.rank, pid=rank.pid, telemetry_fd=rank.page_fd)
            for rank in self.ranks
            if rank.alive
        )

    def has_stepped(self) -> bool:
        """Whether every rank completed its first step of this epoch, or ended well before it."""
        return all(r.page[Word.FIRST_STEP_NS] or r.status == 0 for r in self.ranks)

    def phases(self) -> Phases:
        """When the parts of this start happened."""
        return Phases(
            noticed_ns=self.noticed_ns,
            stopped_ns=self.stopped_ns,
            forked_ns=self.forked_ns,
            script_ns=self._latest(Word.SCRIPT_NS),
            formed_ns=self._latest(Word.FORMED_NS),
            restored_ns=self._latest(Word.RESTORED_NS),
            stepped_ns=self._latest(Word.FIRST_STEP_NS),
        )

    def progress(self) -> Progress | None:
        """How far the ranks are; None until every one has its state."""
        pages = [rank.page for rank in self.ranks]
        if not all(page[Word.RESTORED_NS] for page in pages):
            return None
        steps = [page[Word.STEP] for page in pages]
        medians = [page[Word.STEP_MEDIAN_NS] for page in pages]
        median_ns = statistics.median(medians)
        return Progress(
            step=min(steps),
            step_max=max(steps),
            kept_max=max(page[Word.KEPT_STEP] for page in pages),
            loss=pages[0].loss,
            step_s=median_ns / _SECOND_NS,
            total_steps=pages[0][Word.TOTAL_STEPS],
            save_step=min(page[Word.SAVE_STEP] for page in pages),
        )

    @property
    def unprotected(self) -> bool:
        """Whether the script never made a Session."""
        return not any(rank.page[Word.SESSION_NS] for rank in self.ranks)

    def hold(self) -> None:
        """Tell every rank to hold at its next boundary."""
        for rank in self.ranks:
            rank.page[Word.PAUSE] = 1

    def boundaries(self) -> tuple[int, ...]:
        """For each rank: the boundary at which it holds, or the last one it can still hold at."""
        return tuple(_boundary(rank.page) for rank in self.ranks)

    def release(self, stop_step: int) -> None:
        """Let every rank run on to the boundary ``stop_step``, and end there."""
        for rank in self.ranks:
            rank.page[Word.STOP_AT] = stop_step + 1
            rank.page[Word.PAUSE] = 0

    def stopped_at(self) -> int:
        """The boundary at which ranks ended because they were told to; -1: they were not."""
        stopped = [r.page[Word.STEP] for r in self.ranks if r.page[Word.PHASE] == Phase.STOPPED]
        return min(stopped, default=-1)

    def failure(self, rank: LocalRank, now_ns: int) -> RankFailure:
        """Why a rank that ended with another status than 0 did so."""
        assert rank.status is not None
        cause = describe_exit(rank.status)
        kind = "signal" if os.WIFSIGNALED(rank.status) else "exit"
        error = read_error_file(rank.seat.error_file)
        if kind == "exit" and error.line:
            kind, cause = error.kind, error.line
        ooms = oom_kills()
        if cause == "SIGKILL" and (how := ooms.explain(self.ooms)):
            kind, cause = "oom", f"{how} (SIGKILL)"
        self.ooms = ooms
        rank.blamed = True
        return RankFailure(rank.rank, kind, cause, now_ns, _shortened(error.traceback), error.step)

    def deserter(self, failure: RankFailure) -> LocalRank | None:
        """The rank that ended with code 0 and so made another one fail; None: there is none."""
        if not is_consequence(failure):
            return None
        return next((rank for rank in self.ranks if rank.status == 0 and not rank.blamed), None)

    def desertion(self, rank: LocalRank, now_ns: int) -> RankFailure:
        """The failure of a rank that ended with code 0 while others need it."""
        rank.blamed = True
        cause = "it ended with code 0 while others wait for it in a collective"
        return RankFailure(rank.rank, "desync", cause, now_ns)

    def _latest(self, word: Word) -> int:
        return max(rank.page[word] for rank in self.ranks)


def _boundary(page: TelemetryPage) -> int:
    held_at = page[Word.HELD_AT]
    if held_at:
        return held_at - 1
    step = page[Word.STEP]
    if page[Word.PHASE] in (Phase.STOPPED, Phase.FINISHED):
        return step
    total = page[Word.TOTAL_STEPS]
    return min(step + 1, total) if total > 0 else step + 1


def _shortened(text: str) -> str:
    if len(text) <= _TRACEBACK_CHARACTERS_MAX:
        return text
    half = _TRACEBACK_CHARACTERS_MAX // 2
    return f"{text[:half]}\n  [...]\n{text[-half:]}"


def append_traceback(seat: Seat, failure: RankFailure) -> None:
    """Put the traceback into the rank's stderr log; the terminal shows it once for all ranks."""
    if not failure.traceback:
        return
    try:
        with open(seat.directory / "stderr.log", "a", encoding="utf-8") as log:
            log.write(failure.traceback)
    except OSError:
        return  # a full disk: the coordinator has it


def lacking_file(job: JobSpec, group: RankGroup | None, order: FlushVersion) -> str:
    """Why a version is not in durable files, in words; "" when it is.

    Without snapshots in memory the ranks write them themselves, at the boundary of a stop.
    """
    config = job.config.checkpoint
    if not config.enabled or group is None:
        return "nobody writes durable versions (snapshot=off checkpoint=off)"
    store = DurableStore(config.dir or f"{job.run_dir}/checkpoints")
    try:
        for rank in group.ranks:
            store.file_record(order.fence, order.version, rank.rank)
    except (FtrainError, OSError) as error:
        return str(error)
    return ""
