"""The process that coordinates a fleet: ``python -m ftrain.launch.fleet_coordinator``.

The front that started it starts it again when it dies, with the same listening socket; what it must
not forget is in the fleet's directory.  News go to the event log, and a line each to the front.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from ftrain.comms.addresses import bound_address
from ftrain.comms.errors import FtrainError, RunDirectoryError
from ftrain.comms.events import EventLog
from ftrain.comms.fleet.protocol.coordinator import FleetCoordinator
from ftrain.comms.fleet.protocol.peers import Limits
from ftrain.comms.fleet.server import TICK_S, FleetServer, decode_hard
from ftrain.comms.process import die_with_parent, ignore_stop_signals
from ftrain.comms.protocol.messages import Notice
from ftrain.comms.store.files import FileStore
from ftrain.launch.fleet_job import FleetJob, read_fleet_job

_LEAD_S = 10.0  # for the coordinator before to be gone
_EVENTS_BYTES_MAX = 64 * 1024 * 1024


def machine_of(job: FleetJob, state: bytes | None) -> FleetCoordinator:
    """The coordinator's machine as configured."""
    config = job.config
    limits = Limits(
        silence_ticks=max(1, round(config.silence_s / TICK_S)),
        patient_ticks=max(1, round(config.patience_s / TICK_S)),
    )
    return FleetCoordinator(
        hard=decode_hard(state),
        width=job.width,
        members_min=config.groups_min,
        members_expected=config.groups,
        gather_ticks=round(config.gather_s / TICK_S),
        limits=limits,
    )


async def coordinate(job: FleetJob, listener: socket.socket) -> None:
    """Serve until cancelled."""
    store = FileStore(Path(job.directory))
    events = EventLog(Path(job.directory, "events.jsonl"), _EVENTS_BYTES_MAX)
    try:
        term = await asyncio.to_thread(store.campaign, bound_address(listener), _LEAD_S)
        if term is None:
            raise RunDirectoryError(
                f"another process coordinates the fleet in {job.directory}: stop that launch, or "
                "use another --run-dir"
            )

        def announce(notice: Notice) -> None:
            events.write(notice.kind, text=notice.text, **notice.data)
            with contextlib.suppress(OSError):  # nobody reads it any more
                print(notice.text, flush=True)

        server = FleetServer(
            machine_of(job, term.load()),
            job.run_id,
            job.secret.encode(),
            save=term.save,
            announce=announce,
        )
        await server.run(listener)
    finally:
        store.close()
        events.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one coordinator."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", required=True)
    parser.add_argument("--listen-fd", type=int, required=True)
    options = parser.parse_args(argv)
    die_with_parent(os.getppid())
    ignore_stop_signals()
    try:
        job = read_fleet_job(options.job)
        with socket.socket(fileno=options.listen_fd) as listener:
            asyncio.run(coordinate(job, listener))
    except FtrainError as error:
        print(f"ftrain: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
