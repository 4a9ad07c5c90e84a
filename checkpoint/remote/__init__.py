"""Durable copies in an object store (level L4): the layout of the directory, under a URI.

pyarrow is imported only when a place is opened.  It has threads of its own, so a process that forks
must not have it, and it may hang, so nobody whose answer is waited for should: a run has a process,
worker.py, do it, and a command ends at Ctrl-C whatever it waits for (launch/interrupting.py).
"""

from __future__ import annotations

from ftrain.checkpoint.remote.protocol import messages
from ftrain.comms import wire

wire.register(*messages.MESSAGES)
