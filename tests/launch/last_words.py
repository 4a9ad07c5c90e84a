"""A helper process that hands over descriptors and is gone, with its own mail unread."""

from __future__ import annotations

import os
import sys
import time

from ftrain.comms import local
from ftrain.snapshot.protocol.messages import Hold

COUNT = 20

if __name__ == "__main__":
    sock = local.from_descriptor(int(sys.argv[sys.argv.index("--fd") + 1]))
    for slot in range(COUNT):
        sock.send(Hold(0, slot, 1), [os.memfd_create(f"slot{slot}")])
    time.sleep(0.05)  # what it is sent arrives meanwhile
    os._exit(1)
