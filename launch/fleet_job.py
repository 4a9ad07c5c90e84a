"""What the processes of a fleet's launch have to know: ``<run_dir>/fleet/job.json``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ftrain.comms.errors import RunDirectoryError
from ftrain.comms.wire import BAD_INPUT
from ftrain.configs.schema import FleetConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetJob:
    """One fleet."""

    run_id: str
    secret: str  # text, as in FTRAIN_SECRET
    directory: str
    width: int  # ranks of a replica group
    config: FleetConfig

    def write(self) -> Path:
        """Write it, readable by its owner only; raises RunDirectoryError."""
        path = Path(self.directory, "job.json")
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(msgspec.json.encode(self))
        except OSError as error:
            raise RunDirectoryError(
                f"{path} can't be written ({error.strerror}): make room, or choose another "
                "directory with --run-dir"
            ) from None
        return path


def read_fleet_job(path: str) -> FleetJob:
    """Read it; raises RunDirectoryError."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=FleetJob)
    except (OSError, *BAD_INPUT) as error:
        raise RunDirectoryError(f"{path} can't be read as a fleet's job file: {error}") from None
