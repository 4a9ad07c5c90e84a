"""One rank of a ring in a process of its own: sums until it is told to end, or a sum ends badly.

Lines of JSON: says its place, is told everybody's; then says ``[n, value]`` for each sum, and in
the end the error.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import torch

from ftrain.comms.collectives.arithmetic import Arithmetic, Reduction
from ftrain.comms.collectives.meeting import Meeting, RingSettings
from ftrain.comms.collectives.work import Work
from ftrain.comms.errors import FtrainError
from ftrain.comms.protocol.handshake import Identity
from ftrain.comms.protocol.place import Place
from ftrain.comms.protocol.ring import Kind


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


def main() -> None:
    rank, count, shares = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "memory"
    meeting = Meeting(Identity("run", "rank", rank, 1), bytes(32))
    say(dataclasses.asdict(meeting.place))
    places = [Place(**place) for place in json.loads(sys.stdin.readline())]
    ring = meeting.join(1, places, RingSettings(share_memory=shares), timeout_s=20)
    source, target = torch.full((count,), float(rank + 1)), torch.zeros(count)
    views = [memoryview(t.view(torch.uint8).numpy()) for t in (source, target)]
    how = Arithmetic(Reduction.SUM, torch.float32)
    try:
        for number in range(1_000_000):
            ring.begin(Work(Kind.ALL_REDUCE, count, 4, *views, how)).wait(20)
            assert torch.equal(target, torch.full_like(target, target[0].item()))
            say([number, target[0].item()])
    except FtrainError as error:
        say(f"{type(error).__name__}: {error}")
    ring.close()
    meeting.close()


if __name__ == "__main__":
    main()
