"""Steps lost when processes that hold snapshots die: ftrain beside lm-resiliency, in one run.

::

    python benchmarks/memory_loss.py [--kills 5] [--width 1600] [--rate-mib 30 120]

The same FSDP2 training on four nodes with one rank each.  At random steps one trainer, all
trainers at once, or one node (trainer and what holds its snapshots: memory for ours, its disk for
the peer) are SIGKILLed.  *Lost* is the highest step that any rank had completed, less that of the
version which new processes then load; what they load is compared with digests of that step.

lm-resiliency saves at its default settings (every 10 steps, to disk every 100), and tuned: saves
after every step, to disk every few.  Its torchrun rendezvous does not start on torch 2.13, so the
benchmark does what a launcher would do: it starts the ranks, sends SIGTERM to the ones left over
(their handler writes what they hold to disk), puts every file that survives where the rank that it
belongs to looks for it, at no cost, and starts new processes.  One launch for each of its kills.

Replication: from the start of a save until it is with the peer, beside our capture and parity of
as many nodes (one may be lost) and bytes; sizes are of each rank's state, rates of all of it.
Ours hashes every byte meanwhile, and its captures are threads of one process; the peer checks none.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from common import FTRAIN, ROOT, LaunchError, Record, launched, print_table, write_results
from nodes import grouped

from ftrain.comms.events import read_events
from ftrain.recovery.node_file import read_node_files

JOB = ROOT / "benchmarks" / "memory_loss_job.py"
PEER = ROOT / "benchmarks" / "peers" / "lm_resiliency_job.py"
MIB = 1 << 20
NODES = 4
MODES = {"one": "one trainer", "all": "all trainers", "node": "one node"}
ARMS = ("ftrain", "lm-resiliency", "lm-resiliency, tuned")
PATIENCE_S = 180.0
_GRACE_S = 30.0  # from SIGTERM to SIGKILL, as torchrun has it
_WARM = 2


@dataclass(frozen=True)
class Kill:
    """What one kill cost."""

    completed: int
    loaded: int  # 0: nothing
    exact: bool | None  # None: nothing was loaded

    @property
    def lost(self) -> int:
        """In steps."""
        return self.completed - self.loaded


def lines_of(folder: Path) -> list[Record]:
    """All complete lines of all ranks; each knows its ``rank``."""
    found = []
    for path in (folder / "states").glob("rank*.jsonl"):
        rank = int(path.stem.removeprefix("rank"))
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        found += [{**json.loads(line), "rank": rank} for line in whole.splitlines()]
    return found


def wait_for(
    folder: Path, wanted: Callable[[list[Record]], bool], running: Callable[[], str]
) -> list[Record]:
    """The lines as soon as they are as wanted; ``running``: why they never will be, or nothing."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        ended = running()  # looked at first: its last lines count
        lines = lines_of(folder)
        if wanted(lines):
            return lines
        if ended or time.monotonic() > deadline:
            raise LaunchError(ended or f"nothing new for {PATIENCE_S:g} s")
        time.sleep(0.02)


def next_start(folder: Path, epoch: int, running: Callable[[], str]) -> tuple[int, list[Record]]:
    """The next start for which all ranks have loaded, and the lines then."""

    def loaded(lines: Sequence[Record]) -> list[int]:
        later = [n["epoch"] for n in lines if n["kind"] == "loaded" and n["epoch"] > epoch]
        return [each for each in later if later.count(each) == NODES]

    lines = wait_for(folder, lambda found: bool(loaded(found)), running)
    return max(loaded(lines)), lines


def outcome(lines: Sequence[Record], epoch: int) -> Kill:
    """What the ranks of this start loaded, and what was there before."""
    before = [line for line in lines if line["kind"] == "done" and line["epoch"] < epoch]
    digests = {(line["rank"], line["done"]): line["digest"] for line in before}
    starts = [line for line in lines if line["kind"] == "loaded" and line["epoch"] == epoch]
    (loaded,) = {line["done"] for line in starts}
    exact = all(line["digest"] == digests.get((line["rank"], loaded)) for line in starts)
    return Kill(max(line["done"] for line in before), loaded, exact if loaded else None)


def reach(
    folder: Path, epoch: int, steps: int, chance: random.Random, running: Callable[[], str]
) -> list[Record]:
    """Wait until this start has gone so many steps, and for a random part of one more."""

    def there(lines: list[Record]) -> bool:
        mine = [line for line in lines if line["epoch"] == epoch]
        begun = [line["done"] for line in mine if line["kind"] == "loaded"]
        return bool(begun) and max(line["done"] for line in mine) >= begun[0] + steps

    lines = wait_for(folder, there, running)
    time.sleep(chance.random() * step_s(lines, epoch))
    return lines


def step_s(lines: Sequence[Record], epoch: int) -> float:
    """Median length of a step."""
    mine = [line for line in lines if line["epoch"] == epoch and line["rank"] == 0]
    times = [line["t_ns"] for line in mine]
    gaps = [(after - at) / 1e9 for at, after in itertools.pairwise(times)]
    return median(gaps or [float("nan")])


def training(folder: Path, args: argparse.Namespace) -> list[str | Path]:
    """The arguments of both jobs."""
    size = ("--width", str(args.width), "--pace-s", str(args.pace_s))
    return ["--out", folder, *size]


def pids_of(lines: Sequence[Record], epoch: int) -> dict[int, int]:
    """The process of each rank."""
    return {line["rank"]: line["pid"] for line in lines if line["epoch"] == epoch}


def shoot(pids: Sequence[int]) -> None:
    """SIGKILL all of them, at once."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ours(mode: str, args: argparse.Namespace) -> Record:
    """One launch with all kills of a mode."""
    kills: list[Kill] = []
    epoch, chance = 0, random.Random(f"{args.seed}-{mode}")
    lines: list[Record] = []
    with tempfile.TemporaryDirectory(prefix="ftrain-loss-", dir=args.dir) as name:
        folder = Path(name)
        place = (f"--local-nodes={NODES}", "--nproc-per-node=1", "--spares=1")
        command = [*FTRAIN, "launch", "--run-dir", folder, *place, "snapshot.parity=1"]
        command += [JOB, *training(folder, args)]
        with launched(command, folder, {"OMP_NUM_THREADS": "1"}) as launch, telling("ftrain"):

            def running() -> str:
                code = launch.process.poll()
                return "" if code is None else f"ended with {code}:\n{launch.tail()}"

            for _ in range(args.kills):
                lines = reach(folder, epoch, args.steps.draw(chance), chance, running)
                rank, pids = chance.randrange(NODES), pids_of(lines, epoch)
                victims = {"one": [pids[rank]], "all": list(pids.values())}
                shoot(victims[mode] if mode in victims else node_of(folder, rank))
                epoch, lines = next_start(folder, epoch, running)
                kills.append(outcome(lines, epoch))
        events = read_events(folder / "events.jsonl")
        notices = {e["data"]["node"]: e["data"]["bytes"] for e in events if e["kind"] == "memory"}
    return summary(kills, args.kills, lines, sum(notices.values()))


@contextlib.contextmanager
def telling(arm: str) -> Iterator[None]:
    """A launch that does not come back is told, counted as such, and ends nothing else."""
    try:
        yield
    except LaunchError as error:
        print(f"{arm}: {error}", flush=True)


def node_of(folder: Path, rank: int) -> list[int]:
    """All processes of the node that has this rank: also those that hold its memory."""
    nodes = read_node_files(folder)
    return [n for node in nodes if any(r.rank == rank for r in node.ranks) for n in node.pids]


class Ranks:
    """The peer's ranks, with the benchmark in the launcher's place."""

    def __init__(self, folder: Path, count: int, arguments: Sequence[str | Path]) -> None:
        self.folder = folder
        meet = folder / f"meet{time.monotonic_ns()}"
        self.logs = [folder / f"{meet.name}-rank{rank}.log" for rank in range(count)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            with log.open("wb") as file:
                place = {"RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, PEER, *arguments, "--meet", meet, "--out", folder],
                        env={**os.environ, **place},
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def running(self) -> str:
        """What the first that failed said; nothing when none has."""
        for process, log in zip(self.processes, self.logs, strict=True):
            if process.poll():
                end = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                return f"a rank of the peer ended with {process.returncode}:\n{end}"
        return ""

    def finish(self) -> None:
        """Wait for a good end."""
        deadline = time.monotonic() + PATIENCE_S
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > deadline or self.running():
                break
            time.sleep(0.02)
        if said := self.running():
            raise LaunchError(said)
        if any(process.poll() is None for process in self.processes):
            raise LaunchError(f"not done after {PATIENCE_S:g} s")

    def stop(self) -> None:
        """End the ones left over as torchrun does: it looks every 0.1 s, and gives them time."""
        time.sleep(0.1)
        for process in self.processes:
            process.terminate()
        deadline = time.monotonic() + _GRACE_S
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End all."""
        for process in self.processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def peers(folder: Path, count: int, *arguments: str | Path) -> Iterator[Ranks]:
    """Ranks that are ended."""
    ranks = Ranks(folder, count, arguments)
    try:
        yield ranks
    finally:
        ranks.kill()


def hand_over(disks: Path) -> None:
    """Put every shard on the disk of the rank that it belongs to, if it has none of that step."""
    for path in list(disks.glob("node*/runs/*/*/step-*/rank-*.pt")):
        rank = path.stem.removeprefix("rank-")
        target = disks / f"node{rank}" / Path(*path.relative_to(disks).parts[1:])
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def theirs(mode: str, interval: int, flush: int, args: argparse.Namespace) -> Record:
    """As many launches as kills."""
    kills: list[Kill] = []
    chance = random.Random(f"{args.seed}-{mode}")
    options = ["train", "--interval", str(interval), "--flush", str(flush)]
    lines: list[Record] = []
    for _ in range(args.kills):
        folder = tempfile.TemporaryDirectory(prefix="ftrain-loss-", dir=args.dir)
        with telling("lm-resiliency"), folder as name:
            own = [*options, *training(Path(name), args)]
            kill_peer(Path(name), mode, own, args, chance)
            lines = lines_of(Path(name))
            kills.append(outcome(lines, 1))
    return summary(kills, args.kills, lines, 0)


def kill_peer(
    folder: Path,
    mode: str,
    own: Sequence[str | Path],
    args: argparse.Namespace,
    chance: random.Random,
) -> None:
    """One launch, its kill, and new processes that load."""
    with peers(folder, NODES, *own) as ranks:
        lines = reach(folder, 0, args.steps.draw(chance), chance, ranks.running)
        rank, pids = chance.randrange(NODES), pids_of(lines, 0)
        shoot(list(pids.values()) if mode == "all" else [pids[rank]])
        ranks.stop()
    if mode == "node":
        shutil.rmtree(folder / "disks" / f"node{rank}", ignore_errors=True)
    hand_over(folder / "disks")
    with peers(folder, NODES, *own, "--epoch", "1", "--steps", "0") as ranks:
        ranks.finish()


def summary(kills: Sequence[Kill], wanted: int, lines: Sequence[Record], memory: int) -> Record:
    """Of one arm and mode."""
    lost = [kill.lost for kill in kills] or [float("nan")]
    state = sum({line["rank"]: line["bytes"] for line in lines if line["kind"] == "done"}.values())
    return {
        "kills": [asdict(kill) for kill in kills],
        "lost_median": median(lost),
        "lost_max": max(lost),
        "exact": sum(kill.exact is True for kill in kills),
        "wrong": sum(kill.exact is False for kill in kills),
        "nothing": sum(kill.exact is None for kill in kills),
        "never_back": wanted - len(kills),
        "step_s": step_s(lines, 0),
        "state_bytes": state,
        "memory_multiple": memory / state if memory and state else None,
    }


def our_rate(mib: int, nodes: int, rounds: int, args: argparse.Namespace) -> Record:
    """From the begin of a capture until every node's parity is there."""
    folder = tempfile.TemporaryDirectory(prefix="ftrain-loss-", dir=args.dir)
    with folder as name, grouped(Path(name), nodes, 1, mib * MIB) as group:
        for step in range(1, _WARM + 1):
            group.protect(step)
        done = [group.protect(_WARM + 1 + number) for number in range(rounds)]
        memory = group.memory_bytes()
    return {
        "seconds": [each.capture_s + each.protect_s for each in done],
        "memory_multiple": memory / (nodes * mib * MIB),
    }


def their_rate(mib: int, nodes: int, rounds: int, args: argparse.Namespace) -> Record:
    """From the begin of a save until the slowest rank has said that its exchange is done."""
    options = ("rate", "--mib", str(mib), "--rounds", str(rounds))
    with tempfile.TemporaryDirectory(prefix="ftrain-loss-", dir=args.dir) as name:
        with peers(Path(name), nodes, *options) as ranks:
            ranks.finish()
        found = [json.loads(path.read_text()) for path in Path(name).glob("rate*.json")]
    each = zip(*([row["replicate_s"] for row in one["rows"]] for one in found), strict=True)
    resident = sum(one["resident_bytes"] for one in found)
    return {
        "seconds": [max(times) for times in each],
        "memory_multiple": resident / (nodes * mib * MIB),
    }


def rates(args: argparse.Namespace, present: bool) -> list[Record]:
    """Both, in turn."""
    arms = {"ftrain": our_rate} | ({"lm-resiliency": their_rate} if present else {})
    records = []
    for mib in args.rate_mib:
        for nodes in args.rate_ranks:
            runs: dict[str, list[Record]] = {arm: [] for arm in arms}
            for _ in range(args.rate_turns):
                for arm, measure in arms.items():
                    runs[arm].append(measure(mib, nodes, args.rate_rounds, args))
            for arm, found in runs.items():
                seconds = [each for run in found for each in run["seconds"]]
                records.append(
                    {
                        "arm": arm,
                        "mib_per_rank": mib,
                        "ranks": nodes,
                        "gb_per_s": median(nodes * mib * MIB / 1e9 / each for each in seconds),
                        "memory_multiple": median(run["memory_multiple"] for run in found),
                        "seconds": seconds,
                    }
                )
    return records


@dataclass(frozen=True)
class Steps:
    """How far a start gets before it is killed: at least ``first``, and then at random."""

    first: int
    span: int

    def draw(self, chance: random.Random) -> int:
        """For one kill."""
        return self.first + chance.randrange(self.span)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=5, help="of each arm and mode")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--width", type=int, default=1600, help="of the model")
    parser.add_argument("--pace-s", type=float, default=0.05, help="a step takes at least")
    # The default reaches over one whole interval between two writes to the peer's disk.
    parser.add_argument("--first", type=int, default=110, help="steps before a kill, at least")
    parser.add_argument("--span", type=int, default=100, help="and fewer than so many more")
    parser.add_argument("--tuned-flush", type=int, default=3, help="steps from disk to disk")
    parser.add_argument("--rate-mib", type=int, nargs="*", default=[30, 120], help="of each rank")
    parser.add_argument("--rate-ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rate-rounds", type=int, default=5)
    parser.add_argument("--rate-turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", help="where the folders are made; default: the temporary folder")
    parser.add_argument("--no-results", action="store_true")
    args = parser.parse_args(arguments)
    args.steps = Steps(args.first, args.span)
    return args


def measure(arm: str, mode: str, args: argparse.Namespace) -> Record:
    """All kills of one kind."""
    if arm == "ftrain":
        return ours(mode, args)
    settings = (10, 100) if arm == "lm-resiliency" else (1, args.tuned_flush)
    return theirs(mode, *settings, args)


def show_losses(found: dict[str, dict[str, Record]]) -> None:
    """A line for each arm and mode."""
    rows = []
    for mode, arms in found.items():
        for arm, each in arms.items():
            kills = len(each["kills"]) + each["never_back"]
            ends = [f"{each['exact']} of {kills}"]
            ends += [each[name] for name in ("wrong", "nothing", "never_back")]
            step = f"{each['step_s'] * 1e3:.0f} ms"
            rows.append([MODES[mode], arm, each["lost_median"], each["lost_max"], *ends, step])
    states = {each["state_bytes"] for arms in found.values() for each in arms.values()}
    sizes = ", ".join(f"{size / 1e6:.0f} MB" for size in sorted(states))
    title = f"steps lost; {sizes} of state over {NODES} nodes, {os.cpu_count()} cores"
    loads = ("loaded as it was", "otherwise", "nothing left", "never back")
    head = ("killed", "", "median", "most", *loads, "step")
    print_table(title, head, rows)


def main(arguments: Sequence[str] | None = None) -> Record:
    """Measure, print, write."""
    args = parse_arguments(arguments)
    present = importlib.util.find_spec("lm_resiliency") is not None
    if not present:
        print("lm-resiliency is not installed: ours only")
    arms = [arm for arm in args.arms if present or arm == "ftrain"]
    losses: dict[str, dict[str, Record]] = {}
    for mode in args.modes:
        losses[mode] = {}
        for arm in arms:
            losses[mode][arm] = measure(arm, mode, args)
        show_losses({mode: losses[mode]})
    multiples = [
        each["memory_multiple"]
        for arms_of in losses.values()
        for each in arms_of.values()
        if each["memory_multiple"]
    ]
    if multiples:
        print(f"\nour snapshots' memory while training: {max(multiples):.2f} x state")
    records = rates(args, present)
    if records:
        table = [
            [f"{r['mib_per_rank']} MiB", r["ranks"], r["arm"], r["gb_per_s"], r["memory_multiple"]]
            for r in records
        ]
        head = ("of each rank", "ranks", "", "GB/s", "memory, x state")
        print_table(f"save to protected, {os.cpu_count()} cores", head, table)
    result: Record = {"nodes": NODES, "present": present, "losses": losses, "rates": records}
    result["tuned_flush"] = args.tuned_flush
    if not args.no_results:
        write_results("memory_loss", result)
    return result


if __name__ == "__main__":
    main()
