"""How many single corruptions of a saved state are noticed, by ftrain and by what else there is.

Every trial damages one file of the newest of several saved versions (a bit, a byte, a hole of
zeros, a cut, or an exchange with a file of another rank or version), loads as a job that starts
would, and compares what was loaded bit by bit with what was saved.  The trials are the same for
everybody: the same kinds, at the same places relative to the file's size, one in five of them in
what is not tensors (manifest and fence record, DCP's metadata).

    python benchmarks/corruption.py [--trials 10000] [--peer-trials 1000]
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from common import FTRAIN, launched, print_table, write_results
from corruption_job import objects
from safetensors.torch import load_file, save_file

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import open_files
from ftrain.comms.errors import CorruptionError, FtrainError, RestoreError
from ftrain.runtime.restore import Restoration, restore
from ftrain.runtime.state import TrainingState

JOB = Path(__file__).with_name("corruption_job.py")
KINDS = ("bit", "byte", "hole", "cut", "swap")
STEPS = (4, 8)  # of the two launches, so that there are two fences
HOLE_BYTES_MAX = 64 * 1024
RECORDS_SHARE = 0.2  # of the trials damage what is not tensors

Digests = tuple[str, ...]


class Format(Protocol):
    """One way to save, with several versions saved."""

    name: str
    data: list[Path]  # files of the newest version that hold tensors
    records: list[Path]  # what else belongs to it
    partners: dict[Path, list[Path]]  # what a file may be exchanged with

    def load(self) -> tuple[bool, Digests | None]:
        """Whether something was said to be wrong, and what was loaded (None: nothing)."""

    def expected(self) -> tuple[Digests, list[Digests]]:
        """What the newest version is, and those that may be loaded in its place."""

    def verify(self) -> bool | None:
        """Whether a check without loading finds something; None: there is no such check."""


# ---------------------------------------------------------------- damage


@dataclass(frozen=True)
class Damage:
    """One corruption, drawn: everything relative, so that it fits any file."""

    kind: str
    of_records: bool
    which: float
    where: float
    size: float
    value: int

    @staticmethod
    def draw(chance: random.Random) -> Damage:
        """The next one."""
        kind = chance.choice(KINDS)
        in_records = chance.random() < RECORDS_SHARE
        rest = (chance.random(), chance.random(), chance.random(), chance.randrange(1, 256))
        return Damage(kind, in_records, *rest)

    def changes(self, format_: Format) -> dict[Path, bytes] | None:
        """New contents by path; None: they would be the old ones."""
        files = format_.records if self.of_records and format_.records else format_.data
        path = files[int(self.which * len(files))]
        old = path.read_bytes()
        at = int(self.where * len(old))
        if self.kind == "swap":
            partners = format_.partners[path]
            other = partners[int(self.where * len(partners))]
            found = {path: other.read_bytes(), other: old}
            return found if found[path] != old else None
        if self.kind == "cut":
            return {path: old[:at]}
        new = bytearray(old)
        if self.kind == "bit":
            new[at] ^= 1 << self.value % 8
        elif self.kind == "byte":
            new[at] ^= self.value
        else:
            stop = min(len(old), at + 1 + int(self.size * HOLE_BYTES_MAX))
            new[at:stop] = bytes(stop - at)
        return {path: bytes(new)} if new != old else None


@contextmanager
def damaged(changes: dict[Path, bytes]) -> Iterator[None]:
    """The files with other contents, for a while."""
    before = {path: path.read_bytes() for path in changes}
    try:
        for path, content in changes.items():
            path.write_bytes(content)
        yield
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def run_trials(format_: Format, trials: int, seed: int = 0) -> dict[str, Any]:
    """Damage, load, compare, again and again; how often which end was met."""
    newest, others = format_.expected()
    chance = random.Random(seed)
    ends: Counter[str] = Counter()
    by_kind: Counter[str] = Counter()
    examples: list[str] = []
    began = time.perf_counter()
    done = 0
    while done < trials:
        drawn = Damage.draw(chance)
        changes = drawn.changes(format_)
        if changes is None:
            continue
        done += 1
        with damaged(changes):
            said, loaded = format_.load()
            if loaded is None:
                end = "refused"
            elif loaded != newest and loaded not in others:
                end = "loaded wrong"
            elif said:
                end = "noticed, loaded right"
            elif loaded != newest:
                end = "older, unnoticed"
            else:
                end = "harmless to the load"
            if not said and format_.verify() is False:
                ends["not even found by verify"] += 1
                examples.append(str(drawn))
        ends[end] += 1
        by_kind[f"{drawn.kind}: {end}"] += 1
        if end in ("loaded wrong", "older, unnoticed"):
            examples.append(str(drawn))
    return {
        "trials": trials,
        "ends": dict(ends),
        "by_kind": dict(sorted(by_kind.items())),
        "examples": examples[:5],
        "seconds": round(time.perf_counter() - began, 1),
    }


def digest(tensors: Sequence[torch.Tensor], *more: object) -> str:
    """Of the bytes of tensors, and of plain values."""
    found = xxhash.xxh3_128()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    found.update(repr(more).encode())
    return found.hexdigest()


# ---------------------------------------------------------------- ftrain


class Ours:
    """Versions that two ranks under ``ftrain launch`` wrote, loaded as a run does that starts."""

    name = "ftrain"

    def __init__(self, folder: Path) -> None:
        run_dir = folder / "run"
        reference = folder / "reference.pt"
        for steps in STEPS:
            command = [*FTRAIN, "launch", "--run-dir", run_dir, "--nproc-per-node", "2"]
            command += ["snapshot.chunk_bytes=262144", "checkpoint.keep_last=4", JOB]
            with launched(
                [*command, "--steps", str(steps), "--reference", reference], folder
            ) as job:
                job.finish(120)
        self._store = DurableStore(run_dir / "checkpoints")
        versions = self._store.versions()
        newest = versions[0]
        assert newest.step == STEPS[-1]
        fences = sorted(self._store.directory.glob("*/fence.json"))
        assert len(fences) == len(STEPS), "a fence of each launch"
        self.data = [newest.file(rank) for rank in range(2)]
        self.records = [newest.path, *fences]
        self.partners = {
            path: [*(set(self.data) - {path}), *(v.file(rank) for v in versions[1:])]
            for rank, path in enumerate(self.data)
        }
        self.partners[newest.path] = [version.path for version in versions[1:]]
        self.partners |= {path: [f for f in self.records if f != path] for path in fences}
        model, optimizer = objects()
        self._model = model
        self._state = TrainingState({"model": model}, {"optimizer": optimizer}, {}, 0, 2)
        self._versions = versions
        self.nbytes = newest.nbytes
        self._check_reference(reference)

    def load(self) -> tuple[bool, Digests | None]:
        """As runtime/alone.py and the ranks of a launch do it: the newest that verifies."""
        try:
            survey = self._store.survey()
        except FtrainError:
            return True, None
        said = bool(survey.problems)
        for version in survey.versions:
            with open_files(version) as files:
                restoration = Restoration(files)
                try:
                    small = restore(self._state, restoration, 0)
                    other = restoration.small(1)
                except (CorruptionError, RestoreError):
                    said = True
                    continue
            said = said or bool(restoration.damage)
            return said, self._digests(small, other)
        return True, None

    def expected(self) -> tuple[Digests, list[Digests]]:
        """Each version as it is while nothing is damaged."""
        found = []
        for version in self._versions:
            with open_files(version) as files:
                restoration = Restoration(files)
                small = restore(self._state, restoration, 0)
                found.append(self._digests(small, restoration.small(1)))
        assert len(set(found)) == len(found)
        return found[0], found[1:]

    def verify(self) -> bool:
        """Every byte of every version, as ``ftrain checkpoints verify`` looks at it."""
        for version in self._versions:
            with open_files(version) as files:
                for reader in files:
                    if isinstance(reader, CorruptionError):
                        return True
                    try:
                        reader.verify()
                        _ = reader.small
                    except CorruptionError:
                        return True
        return False

    def _digests(self, *small: object) -> Digests:
        return digest([tensor.tensor for tensor in self._state.layout().tensors]), repr(small)

    def _check_reference(self, reference: Path) -> None:
        """The newest version is what the job had at its end."""
        self.load()
        kept = torch.load(reference, weights_only=True)
        assert digest(list(self._model.parameters())) == digest(kept)


# ---------------------------------------------------------------- what else there is


def plain_state(seed: int) -> dict[str, torch.Tensor]:
    """The same tensors by name, with other values for each version."""
    model, optimizer = objects()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    found = {name: value.detach().clone() for name, value in model.named_parameters()}
    for number, values in enumerate(optimizer.state.values()):
        found |= {f"{number}.{key}": value for key, value in values.items()}
    return found


class Peer:
    """Two versions of the state, saved by somebody else's code, loaded by it."""

    def __init__(
        self,
        name: str,
        folder: Path,
        save: Callable[[dict[str, torch.Tensor], Path], object],
        load: Callable[[Path], dict[str, torch.Tensor]],
    ) -> None:
        self.name = name
        self._load = load
        self._folder = folder
        self._state = plain_state(1)
        for seed in (1, 2):
            place = folder / str(seed)
            place.mkdir(parents=True)
            save(plain_state(seed), place)
        files = sorted((folder / "1").iterdir())
        self.records = [path for path in files if path.name == ".metadata"]
        self.data = [path for path in files if path not in self.records]
        self.partners = {path: [folder / "2" / path.name] for path in files}

    def load(self) -> tuple[bool, Digests | None]:
        """Into tensors, as the format's own load does it."""
        try:
            return False, self._digests(self._load(self._folder / "1"))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # DCP's is none of Exception's
            return True, None

    def expected(self) -> tuple[Digests, list[Digests]]:
        """There is no other version that a load would fall back to."""
        return self._digests(self._state), []

    def verify(self) -> None:
        """None of them has such a check."""
        return

    def _digests(self, state: dict[str, torch.Tensor]) -> Digests:
        return (digest([state[name] for name in self._state]),)


def load_dcp(folder: Path) -> dict[str, torch.Tensor]:
    """Into tensors that are there already, as DCP wants it."""
    state = {name: torch.zeros_like(value) for name, value in plain_state(1).items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def peers(folder: Path) -> list[Peer]:
    """All of them."""
    return [
        Peer(
            "torch.save",
            folder / "torch",
            lambda state, place: torch.save(state, place / "state.pt"),
            lambda place: torch.load(place / "state.pt", weights_only=True),
        ),
        Peer(
            "DCP",
            folder / "dcp",
            lambda state, place: dcp.save(state, checkpoint_id=place, no_dist=True),
            load_dcp,
        ),
        Peer(
            "safetensors",
            folder / "safetensors",
            lambda state, place: save_file(state, place / "state.safetensors"),
            lambda place: load_file(place / "state.safetensors"),
        ),
    ]


COLUMNS = (
    "refused",
    "noticed, loaded right",
    "harmless to the load",
    "older, unnoticed",
    "loaded wrong",
)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--peer-trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-results", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="ftrain-corruption-"))
    try:
        ours = Ours(folder)
        results = {ours.name: run_trials(ours, args.trials, args.seed)}
        logging.disable()  # DCP tells each failure in many lines
        for peer in peers(folder):
            results[peer.name] = run_trials(peer, args.peer_trials, args.seed)
    finally:
        shutil.rmtree(folder)
    logging.disable(logging.NOTSET)
    print_table(
        f"single corruptions of a saved state of {ours.nbytes / 1e6:.1f} MB",
        ("", "trials", *COLUMNS, "not found by verify"),
        [
            (
                name,
                found["trials"],
                *(found["ends"].get(column, 0) for column in COLUMNS),
                found["ends"].get("not even found by verify", 0) if name == "ftrain" else "-",
            )
            for name, found in results.items()
        ],
    )
    for name, found in results.items():
        for example in found["examples"] if name == "ftrain" else ():
            print(f"{name}: {example}")
    if not args.no_results:
        write_results("corruption", {"state_bytes": ours.nbytes, "formats": results})
    return results


if __name__ == "__main__":
    ours_found = main()["ftrain"]["ends"]
    sys.exit(any(ours_found.get(bad) for bad in (*COLUMNS[3:], "not even found by verify")))
