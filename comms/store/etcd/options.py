"""Where etcd is, and how to get in."""

from __future__ import annotations

from dataclasses import dataclass, field

from ftrain.comms.addresses import parse_address
from ftrain.comms.errors import ConfigError

LEASE_S_MIN = 2  # with etcd's default election timeout it grants no shorter one


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdOptions:
    """What an etcd store is opened with; :class:`ConfigError` for what can't be.

    ``endpoints``: ``host:port`` of some or, better, all nodes of one cluster.
    ``prefix``: what the keys of this job begin with; another job's must be another.
    ``lease_s``: how long others wait for a leader that says nothing, before one takes its place.
    ``call_timeout_s``: how long ``save`` and ``load`` go on trying.
    ``ca``, ``certificate``, ``key``: PEM files. With ``ca`` all connections use TLS; the other two
    go together, for a cluster that asks for clients' certificates.
    ``user``, ``password``: for a cluster with authentication. Without TLS they can be read on the
    way.
    """

    endpoints: tuple[str, ...]
    prefix: str
    lease_s: int = 5
    call_timeout_s: float = 5.0
    ca: str = ""
    certificate: str = ""
    key: str = ""
    user: str = ""
    password: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ConfigError("no address of etcd is given: give host:port of its nodes")
        for endpoint in self.endpoints:
            parse_address(endpoint)
        if not self.prefix:
            raise ConfigError("etcd's keys need a prefix: give one that no other job uses")
        if self.lease_s < LEASE_S_MIN:
            raise ConfigError(f"etcd grants no lease of {self.lease_s} s: give {LEASE_S_MIN} s")
        if self.call_timeout_s <= 0:
            raise ConfigError(f"a call can't take {self.call_timeout_s:g} s: give more than 0 s")
        if bool(self.certificate) != bool(self.key) or (self.certificate and not self.ca):
            raise ConfigError("for etcd's TLS give ca, or all of ca, certificate and key")
        if bool(self.user) != bool(self.password):
            raise ConfigError("for etcd's authentication give both user and password")

    @property
    def leader_key(self) -> bytes:
        """Under the leader's lease, holds its address; was created at the number of its term."""
        return f"{self.prefix}/leader".encode()

    @property
    def state_key(self) -> bytes:
        """Holds what was saved."""
        return f"{self.prefix}/state".encode()

    @property
    def place(self) -> str:
        """What to call it in a sentence."""
        return f"etcd at {', '.join(self.endpoints)}"
