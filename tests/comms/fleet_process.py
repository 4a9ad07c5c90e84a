"""One peer of a fleet in a process of its own: sums until its input ends, or it is out.

``fleet_process.py ADDRESS PEER INCARNATION [ELEMENTS [memory|tcp [inplace|apart]]]``
Says a line of JSON for each sum: its number, view, members, value, and when it returned.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import torch

from ftrain.comms.collectives.meeting import RingSettings
from ftrain.comms.errors import FtrainError
from ftrain.comms.fleet.collectives import all_reduce
from ftrain.comms.fleet.fleet import Fleet
from ftrain.comms.fleet.settings import FleetSettings


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def main() -> None:
    address, peer, incarnation = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    options = [*sys.argv[4:], *["300000", "memory", "inplace"][len(sys.argv) - 4 :]]
    count, shares, in_place = int(options[0]), options[1] == "memory", options[2] == "inplace"
    torch.set_num_threads(1)
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    settings = FleetSettings(ring=RingSettings(share_memory=shares))
    fleet = Fleet(address, "run", bytes(32), peer, incarnation, settings=settings)
    try:
        fleet.wait_for_view(60)
        source = torch.full((count,), float(1 << peer))
        tensor, out = source.clone(), torch.empty_like(source)
        while not over.is_set():
            if in_place:
                tensor.copy_(source)
            began_s = time.monotonic()
            handle = all_reduce(fleet, tensor, out=None if in_place else out)
            handle.wait(60)
            ended_s = time.monotonic()
            result = tensor if in_place else out
            value = result[0].item()
            right = bool((result == value).all()) and value == sum(1 << m for m in handle.members)
            say(
                op=handle.op.number,
                view=handle.view,
                members=handle.members,
                value=value,
                right=right,
                began_s=began_s,
                ended_s=ended_s,
            )
        fleet.leave()
        say(left=True)
    except FtrainError as error:
        say(error=f"{type(error).__name__}: {error}")
        fleet.close()


if __name__ == "__main__":
    main()
