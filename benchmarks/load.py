"""How fast a saved state is back in live parameters: ours verified, the others not.

::

    python benchmarks/load.py [--sizes 0.3 1.3] [--rounds 7]

All loaders fill the same live tensors from files of the same state, in random order; but for the
row with new moments, which is how a Session of a new process loads.  The page cache is dropped
before a cold one.  What was loaded is compared afterwards, outside of the time.  Ours reads as the
product does: the newest version of a survey, every chunk compared with its digest.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import states
import torch
from common import Record, print_table, write_results

from ftrain.checkpoint.durable import DurableStore
from ftrain.checkpoint.manifest import open_files
from ftrain.runtime.restore import Restoration, file_readers, restore

State = dict[str, dict[str, torch.Tensor]]
OURS, UNVERIFIED, FRESH = "ours, verified", "ours, not verified", "ours, verified, new moments"


@contextmanager
def alone() -> Iterator[None]:
    """DCP warns when there is no group of ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class Loads:
    """One state, saved in every format, and the live tensors that are filled from it."""

    def __init__(self, size: str, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from safetensors.torch import save_file

        self.folder = folder
        self.model, self.optimizer = states.build(size)
        states.add_moments(self.model, self.optimizer)
        self.state = states.tensors_of(self.model, self.optimizer)
        self.flat = states.flat(self.state)
        self.training = states.state_of(self.model, self.optimizer)
        self.saved = {name: tensor.clone() for name, tensor in self.flat.items()}
        self.nbytes = states.state_bytes(self.state)
        torch.save(self.state, folder / "state.pt")
        save_file(self.flat, folder / "state.safetensors")
        with alone():
            dcp.save(self.state, checkpoint_id=folder / "dcp", no_dist=True)
        states.write_version(folder / "ours", self.training)
        os.sync()

    @property
    def loaders(self) -> dict[str, Callable[[], None]]:
        """By name; each fills every live tensor."""
        return {
            OURS: lambda: self.ours("always"),
            UNVERIFIED: lambda: self.ours("off"),
            FRESH: lambda: self.ours("always", fresh=True),
            "torch.load": lambda: self.torch_load(mmap=False),
            "torch.load, mmap": lambda: self.torch_load(mmap=True),
            "torch.load, taken over": self.torch_take_over,
            "DCP": self.dcp,
            "safetensors": self.safetensors,
        }

    def ours(self, verify: str, *, fresh: bool = False) -> None:
        """The newest version that is published, into the tensors that the peers fill; ``fresh``:
        as a Session does it in a new process, which has no moments yet and makes them."""
        version = DurableStore(self.folder / "ours").survey().versions[0]
        with open_files(version) as files:
            restoration = Restoration(files, verify=verify, readers=file_readers(1))
            if fresh:
                restore(self.training, restoration, 0, self.training.topology())
            else:
                restoration.small(0)
                restoration.fill(self.training.layout().tensors, self.training.topology())

    def torch_load(self, *, mmap: bool) -> None:
        """torch.load, then copies."""
        found = torch.load(self.folder / "state.pt", mmap=mmap, weights_only=True)
        self._copy(states.flat(found))

    def torch_take_over(self) -> None:
        """torch.load, whose tensors become the live ones, as with ``assign=True``: no copy."""
        found = torch.load(self.folder / "state.pt", weights_only=True)
        for name, parameter in self.model.named_parameters():
            parameter.data = found["model"][name]
            for key in self.optimizer.state[parameter]:
                self.optimizer.state[parameter][key] = found["optimizer"][f"{name}/{key}"]

    def dcp(self) -> None:
        """DCP reads into the tensors it is given."""
        import torch.distributed.checkpoint as dcp

        with alone():
            dcp.load(self.state, checkpoint_id=self.folder / "dcp", no_dist=True)

    def safetensors(self) -> None:
        """Tensor by tensor out of the mapped file."""
        from safetensors import safe_open

        with torch.no_grad(), safe_open(self.folder / "state.safetensors", "pt") as file:
            for name, tensor in self.flat.items():
                tensor.copy_(file.get_tensor(name))

    def _copy(self, found: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.flat.items():
                tensor.copy_(found[name])

    def timed(self, name: str, *, cold: bool) -> float:
        """GB/s of one load; RuntimeError if the tensors are not what was saved."""
        homes = {parameter: parameter.data for parameter in self.model.parameters()}
        moments = {parameter: dict(v) for parameter, v in self.optimizer.state.items()}
        for tensor in self.flat.values():
            tensor.zero_()
        prepare(self.folder, cold=cold)
        began = time.monotonic()
        self.loaders[name]()
        seconds = time.monotonic() - began
        found = states.flat(states.tensors_of(self.model, self.optimizer))
        wrong = [key for key, saved in self.saved.items() if not torch.equal(found[key], saved)]
        if wrong:
            raise RuntimeError(f"{name} loaded {wrong[0]} wrongly")
        self.optimizer.state.update(moments)  # the next one fills the same tensors again
        for parameter, home in homes.items():
            parameter.data = home
        return self.nbytes / seconds / 1e9


def prepare(folder: Path, *, cold: bool) -> None:
    """Have every file in the page cache, or none of it."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            if cold:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while os.read(fd, 1 << 24):
                    pass
            os.close(fd)
    if cold and os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1")


def measure(size: str, args: argparse.Namespace) -> Record:
    """GB/s by cache and loader."""
    found: dict[str, dict[str, list[float]]] = {"cold": {}, "warm": {}}
    with tempfile.TemporaryDirectory(prefix="ftrain-load-", dir=args.dir) as folder:
        loads = Loads(size, Path(folder))
        for number in range(args.rounds + 1):
            for cache in random.sample(list(found), len(found)):
                for name in random.sample(list(loads.loaders), len(loads.loaders)):
                    rate = loads.timed(name, cold=cache == "cold")
                    if number:  # in the first round imports and allocations are made
                        found[cache].setdefault(name, []).append(rate)
        gb = loads.nbytes / 1e9
    rates = {cache: {n: median(v) for n, v in by.items()} for cache, by in found.items()}
    return {"state_gb": gb, "gb_per_s": rates, "all": found}


def compare(rates: dict[str, float]) -> tuple[str, float]:
    """The fastest peer, and our verified rate over its."""
    peers = {name: rate for name, rate in rates.items() if not name.startswith("ours")}
    fastest = max(peers, key=lambda name: peers[name])
    return fastest, rates[OURS] / peers[fastest]


def show(found: Record) -> None:
    """The table of one size."""
    rates = found["gb_per_s"]
    rows: list[tuple[object, ...]] = [
        (name, *(rates[cache][name] for cache in ("cold", "warm"))) for name in rates["cold"]
    ]
    ratios = [compare(rates[cache]) for cache in ("cold", "warm")]
    rows.append(("ours / fastest peer", *(f"{ratio:.2f} ({name})" for name, ratio in ratios)))
    title = f"load, {found['state_gb']:.2f} GB into live tensors, {os.cpu_count()} cores: GB/s"
    print_table(title, ("loader", "cold", "warm"), rows)


def main() -> None:
    """Each size, then the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=states.SIZES, default=["0.3", "1.3"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", help="where states are saved; default: the temporary folder")
    args = parser.parse_args()
    everything: Record = {}
    for size in args.sizes:
        found = everything[size] = measure(size, args)
        show(found)
        found["ours_to_fastest"] = {c: compare(found["gb_per_s"][c])[1] for c in ("cold", "warm")}
    write_results("load", {"states": everything})


if __name__ == "__main__":
    main()
