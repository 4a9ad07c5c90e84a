"""``torchrun --rdzv-backend=ftrain``: restarts that come back, under plain torchrun.

torchrun's own backends let all restarts of a job share one store, so that new ranks read what dead
ones left there.  Here every round has a store of its own on a port of its own, hosted by the agent
of group rank 0; agents meet in a second one at ``--rdzv-endpoint`` (which may be left out for one
node).  Both listen on one address only.  As with torchrun itself, nothing here is authenticated.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from ftrain.comms.addresses import is_loopback, loopback_behind, parse_address
from ftrain.comms.errors import UsageError
from ftrain.launch.stores import make_store

_LOOPBACK = "127.0.0.1"
_CONNECT_S = 60.0
_JOIN_S = 600.0  # until all nodes are there
_POLL_S = 0.02


class FtrainRendezvous(RendezvousHandler):
    """One node's side of the meetings of ``nodes`` nodes.

    Round ``r`` is complete when its ``nodes``-th member joins; members are ranked as they come.
    """

    def __init__(
        self, meeting: Store, run_id: str, nodes: int, host: str, join_timeout_s: float
    ) -> None:
        self._meeting = PrefixStore(f"ftrain/{run_id}", meeting)
        self._run_id = run_id
        self._nodes = nodes
        self._host = host
        self._join_timeout_s = join_timeout_s
        self._round = 0
        self._group_store: TCPStore | None = None

    def get_backend(self) -> str:
        """The name to choose it by."""
        return "ftrain"

    @property
    def use_agent_store(self) -> bool:
        """Ranks use the round's store, as clients."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for all nodes; raises RendezvousClosedError, RendezvousTimeoutError."""
        if self.is_closed():
            raise RendezvousClosedError(f"run {self._run_id} is over")
        self._round = self._meeting.add("rounds", 0) + 1
        place = PrefixStore(f"round{self._round}", self._meeting)
        rank = place.add("joined", 1) - 1
        if rank >= self._nodes:
            raise RendezvousClosedError(
                f"run {self._run_id} has its {self._nodes} nodes already: is one started twice?"
            )
        if rank == 0:
            # kept until the next round: the ranks of this one are its clients
            self._group_store = make_store(self._host)
            place.set("store", f"{self._host} {self._group_store.port}")
        if rank == self._nodes - 1:
            self._meeting.add("rounds", 1)
        self._wait_for(lambda: self._meeting.add("rounds", 0) >= self._round, place)
        host, port = place.get("store").decode().split()
        return RendezvousInfo(place, rank, self._nodes, RendezvousStoreInfo(host, int(port)))

    def _wait_for(self, complete: Callable[[], bool], place: Store) -> None:
        deadline = time.monotonic() + self._join_timeout_s
        while not complete():
            if self.is_closed():
                raise RendezvousClosedError(f"run {self._run_id} is over")
            if time.monotonic() > deadline:
                raise RendezvousTimeoutError(
                    f"{place.add('joined', 0)} of {self._nodes} nodes came within "
                    f"{self._join_timeout_s:g} s: start the others, or raise "
                    "--rdzv-conf join_timeout=SECONDS"
                )
            time.sleep(_POLL_S)  # a store can't wait for a number to reach a value

    def is_closed(self) -> bool:
        """Whether some node has ended the run."""
        return bool(self._meeting.check(["closed"]))

    def set_closed(self) -> None:
        """End the run for all nodes."""
        self._meeting.set("closed", "1")

    def num_nodes_waiting(self) -> int:
        """Nodes that have gone on to the next round, because of a failure there."""
        following = f"round{self._round + 1}/joined"
        if not self._round or not self._meeting.check([following]):
            return 0
        return int(self._meeting.add(following, 0))

    def get_run_id(self) -> str:
        """As given by ``--rdzv-id``."""
        return self._run_id

    def shutdown(self) -> bool:
        """End the run; False when the meeting place is gone already."""
        try:
            self.set_closed()
        except (RuntimeError, ConnectionError):
            return False
        return True


def create_handler(parameters: RendezvousParameters) -> FtrainRendezvous:
    """The handler for one torchrun. Raises ValueError for options that make no sense together."""
    nodes = parameters.max_nodes
    if parameters.min_nodes != nodes:
        raise ValueError(
            f"--nnodes {parameters.min_nodes}:{nodes}: --rdzv-backend=ftrain needs a fixed number"
        )
    if parameters.endpoint:
        host, port = parse_address(parameters.endpoint)
    elif nodes == 1:
        host, port = _LOOPBACK, 0
    else:
        raise ValueError(f"--nnodes {nodes} needs --rdzv-endpoint HOST:PORT, equal on every node")
    address = loopback_behind(host)
    if nodes > 1 and address and not is_loopback(host):
        raise ValueError(
            f"--rdzv-endpoint {parameters.endpoint}: on this host that is the loopback address"
            f" {address}, at which other hosts can't reach it: give its address in the network"
        )
    meeting = _meet(host, port, is_host=parameters.get_as_bool("is_host"))
    own = _LOOPBACK if nodes == 1 else parameters.local_addr or _own_address(host, port)
    timeout_s = float(parameters.get("join_timeout", _JOIN_S))
    return FtrainRendezvous(meeting, parameters.run_id, nodes, own, timeout_s)


def _meet(host: str, port: int, *, is_host: bool | None) -> TCPStore:
    """The store at the endpoint: hosted here if the address is this machine's and free."""
    if is_host or is_host is None:
        try:
            return make_store(host, port)
        except UsageError:
            if is_host:
                raise
    try:
        return TCPStore(host, port, timeout=timedelta(seconds=_CONNECT_S))
    except RuntimeError as error:
        raise RendezvousConnectionError(
            f"nobody answers at --rdzv-endpoint {host}:{port}: start torchrun on that host first, "
            "or correct the address"
        ) from error


def _own_address(host: str, port: int) -> str:
    """This host's address on the way to the endpoint; no packet is sent."""
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
