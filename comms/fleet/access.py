"""What a peer needs to talk to another one directly."""

from __future__ import annotations

from dataclasses import dataclass, field

from ftrain.comms.addresses import format_address
from ftrain.comms.protocol.handshake import Identity


@dataclass(frozen=True, slots=True)
class Access:
    """Of one peer.

    Args:
        bind: host to listen on.
        host: under which others reach it; "": as ``bind`` says.
    """

    identity: Identity
    secret: bytes = field(repr=False)
    bind: str = "127.0.0.1"
    host: str = ""

    def address(self, port: int) -> str:
        """Where others reach a listener of this peer."""
        return format_address(self.host or self.bind, port)
