"""Coordinator stores of each kind, in this process and in others."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftrain.comms.store.base import CoordinatorStore, Leader, Term
from ftrain.comms.store.etcd import EtcdOptions, open_etcd
from ftrain.comms.store.files import FileStore

if TYPE_CHECKING:  # the other processes do not need it
    from etcd_server import EtcdCluster

LEASE_S = 2
# Until a lease is found to be over etcd takes up to half a second, and this machine is busy.
TAKE_OVER_S_MAX = LEASE_S + 4.0


@dataclass
class Backend:
    """One place for one job's store, which can be opened several times."""

    folder: Path | None = None
    cluster: EtcdCluster | None = None
    prefix: str = ""
    opened: list[CoordinatorStore] = field(default_factory=list)

    @property
    def is_files(self) -> bool:
        """Whether it is a directory."""
        return self.folder is not None

    @property
    def where(self) -> dict[str, Any]:
        """What another process opens it by."""
        if self.cluster is not None:
            return {"endpoints": self.cluster.endpoints, "prefix": self.prefix}
        return {"folder": str(self.folder)}

    def open(self) -> CoordinatorStore:
        """Open it once more; :meth:`close` closes it."""
        store = open_store(self.where)
        self.opened.append(store)
        return store

    def put_leader_aside(self) -> None:
        """What an administrator does who thinks that the leader is gone."""
        if self.folder is not None:
            (self.folder / "lock").unlink()
        else:
            assert self.cluster is not None
            self.cluster.delete(f"{self.prefix}/leader".encode())

    def close(self) -> None:
        """Close all that were opened."""
        for store in self.opened:
            store.close()
        self.opened.clear()


def open_store(where: dict[str, Any], call_timeout_s: float = 5.0) -> CoordinatorStore:
    """A store by what :attr:`Backend.where` says."""
    if "folder" in where:
        return FileStore(Path(where["folder"]))
    return open_etcd(
        EtcdOptions(
            endpoints=tuple(where["endpoints"]),
            prefix=where["prefix"],
            lease_s=LEASE_S,
            call_timeout_s=call_timeout_s,
        )
    )


def won(store: CoordinatorStore, address: str, timeout_s: float = 10.0) -> Term:
    """The term of a candidate that has to win."""
    term = store.campaign(address, timeout_s)
    assert term is not None, f"{address} did not come to lead within {timeout_s} s"
    return term


class Heard:
    """What a watch told, to be waited for."""

    def __init__(self) -> None:
        self.leaders: list[Leader | None] = []
        self._changed = threading.Condition()

    def __call__(self, leader: Leader | None) -> None:
        with self._changed:
            self.leaders.append(leader)
            self._changed.notify_all()

    def wait_for(self, leader: Leader | None, timeout_s: float = 10.0) -> float:
        """Seconds until that is the newest."""
        began = time.monotonic()
        with self._changed:
            assert self._changed.wait_for(lambda: self.leaders[-1:] == [leader], timeout_s), (
                f"waited for {leader}, heard {self.leaders}"
            )
        return time.monotonic() - began


def eventually(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Return once it holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it does not come to hold"
        time.sleep(0.01)


class Candidate:
    """A process that campaigns, and then saves what it is told to."""

    def __init__(self, where: dict[str, Any], address: str) -> None:
        command = [sys.executable, __file__, json.dumps(where), address]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        """The next thing that it says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self, state: str) -> None:
        """Have it save that."""
        assert self.process.stdin is not None
        self.process.stdin.write(state + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """SIGKILL it."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


def main(where: str, address: str) -> None:
    """The process of a :class:`Candidate`."""
    store = open_store(json.loads(where))
    term = won(store, address, 30)
    print("leads", term.number, flush=True)
    for line in sys.stdin:
        try:
            term.save(line.strip().encode())
        except Exception as error:
            print(type(error).__name__, term.lost.is_set(), term.assured_s() > 0, flush=True)
        else:
            print("saved", flush=True)
    store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
