"""In-memory copies owned by a process that outlives the ranks."""

from __future__ import annotations

from ftrain.comms import wire
from ftrain.snapshot.protocol import messages, protection

wire.register(*messages.MESSAGES, *protection.MESSAGES)
