"""One peer of a fleet in a process of its own, which makes its state equal to the others'.

``shared_state_process.py ADDRESS PEER INCARNATION``
Takes lines of JSON, each a function below with its arguments, and answers each with one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import xxhash

from ftrain.comms.channel_blocking import BlockingChannel
from ftrain.comms.errors import FtrainError
from ftrain.comms.fleet.fleet import Fleet
from ftrain.comms.fleet.shared_state import Role, Serving, fetch, serve, synchronise


class Process:
    """What the peer has."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.tensors: dict[str, torch.Tensor] = {}
        self.serving: Serving | None = None

    def fill(self, mib: int, seed: int) -> dict[str, Any]:
        """So many MiB of random tensors, a large one and small ones of all kinds."""
        random = torch.Generator().manual_seed(seed)
        elements = mib * 262144
        self.tensors = {
            "large": torch.rand(elements - 2 * (elements // 4), generator=random),
            "half": torch.rand(elements // 2, generator=random).bfloat16(),
            "small": torch.rand(elements // 2, generator=random).half().view(2, -1),
            "empty": torch.empty(0),
            "steps": torch.tensor(seed),
        }
        return self.digest()

    def flip(self, key: str, at: int) -> dict[str, Any]:
        """One bit of a tensor."""
        view = self.tensors[key].view(-1).view(torch.uint8)
        view[at] ^= 1
        return self.digest()

    def digest(self) -> dict[str, Any]:
        """Of everything that is here."""
        hasher = xxhash.xxh3_128()
        for key, tensor in sorted(self.tensors.items()):
            hasher.update(f"{key} {tensor.dtype}".encode())
            hasher.update(tensor.view(-1).view(torch.uint8).numpy())
        return {"digest": hasher.hexdigest()}

    def halt_sending(self, blocks: int, how: str = "SIGKILL") -> dict[str, Any]:
        """Be killed or stopped in the middle of sending, after so many blocks."""
        send, left = BlockingChannel.send_data, blocks

        def halting(channel: BlockingChannel, data: bytes | bytearray | memoryview) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                view = memoryview(data)
                send(channel, view[: view.nbytes // 2])
                os.kill(os.getpid(), signal.Signals[how])
                data = view[view.nbytes // 2 :]
            send(channel, data)

        BlockingChannel.send_data = halting  # type: ignore[method-assign]
        return {}

    def sync(self, revision: int, role: str = "enforce_popular", **options: Any) -> dict[str, Any]:
        """With the others."""
        began_s = time.monotonic()
        result = synchronise(self.fleet, self.tensors, revision, role=Role(role), **options)
        seconds = time.monotonic() - began_s
        return {**asdict(result), **self.digest(), "seconds": seconds}

    def serve(self, revision: int, name: str) -> dict[str, Any]:
        """Offer what is here to who joins."""
        self.serving = serve(self.fleet.access, self.tensors, revision, name=name)
        return {"address": self.serving.address}

    def fetch(self, addresses: Sequence[str], name: str) -> dict[str, Any]:
        """Get what others offer."""
        began_s = time.monotonic()
        result = fetch(self.fleet.access, addresses, self.tensors, name=name)
        seconds = time.monotonic() - began_s
        return {**asdict(result), **self.digest(), "seconds": seconds}


def main() -> None:
    address, peer, incarnation = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    fleet = Fleet(address, "run", bytes(32), peer, incarnation)
    try:
        fleet.wait_for_view(60)
        process = Process(fleet)
        print(json.dumps({"members": fleet.members}), flush=True)
        for line in sys.stdin:
            name, options = json.loads(line)
            try:
                answer = getattr(process, name)(**options)
            except FtrainError as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
        if process.serving is not None:
            process.serving.close()
    finally:
        fleet.close()


if __name__ == "__main__":
    main()
