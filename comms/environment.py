"""The only reader of the process environment.

A rank learns its place from torchrun's variables, which ``ftrain launch`` and torchrun both set,
and everything else from one JSON value in ``FTRAIN_CONTEXT``, which only ``ftrain launch`` sets.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ftrain.comms.errors import ConfigError
from ftrain.comms.protocol.messages import Formation
from ftrain.configs.schema import FtrainConfig

CONTEXT_VARIABLE = "FTRAIN_CONTEXT"
SECRET_VARIABLE = "FTRAIN_SECRET"
SECRET_CHARACTERS_MIN = 8
RACK_VARIABLE = "FTRAIN_RACK"

# A child that is no rank of an outer launcher must not believe that it is one.
_RANK_VARIABLES = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_WORLD_SIZE",
        "ROLE_NAME",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
)
_OWN_PREFIXES = ("TORCHELASTIC_", "FTRAIN_")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """What ``ftrain launch`` tells each of its ranks."""

    job_id: str
    epoch: int
    incarnation: int  # of the agent
    node: int
    formation: Formation
    config: FtrainConfig
    run_dir: str  # absolute
    smp_socket: str  # path; "" without in-memory snapshots
    telemetry_fd: int  # -1: none
    secret: str  # hex
    start_ns: int  # CLOCK_MONOTONIC: the rank was forked


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnvironment:
    """A rank's place; the defaults are those of a plain ``python train.py``."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node: int = 0
    run_id: str = ""
    restart_count: int = 0
    context: RankContext | None = None  # None: not started by ``ftrain launch``


def rank_environment(environment: Mapping[str, str] | None = None) -> RankEnvironment:
    """This process's place, from ``environment`` (default: the process's own).

    Raises :class:`ConfigError` naming the variable that is wrong.
    """
    variables = os.environ if environment is None else environment
    world_size = _number(variables, "WORLD_SIZE", 1, least=1)
    local_world_size = _number(variables, "LOCAL_WORLD_SIZE", 1, least=1)
    return RankEnvironment(
        rank=_number(variables, "RANK", 0, below=world_size, limit="WORLD_SIZE"),
        local_rank=_number(
            variables, "LOCAL_RANK", 0, below=local_world_size, limit="LOCAL_WORLD_SIZE"
        ),
        world_size=world_size,
        local_world_size=local_world_size,
        node=_number(variables, "GROUP_RANK", 0),
        run_id=variables.get("TORCHELASTIC_RUN_ID", ""),
        restart_count=_number(variables, "TORCHELASTIC_RESTART_COUNT", 0),
        context=_context(variables),
    )


def encode_context(context: RankContext) -> str:
    """The value of ``FTRAIN_CONTEXT`` for a rank."""
    return msgspec.json.encode(context).decode()


def inherited_environment() -> dict[str, str]:
    """The environment that children start from: this process's, without any rank's place and
    without ftrain's own variables (the secret among them)."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _RANK_VARIABLES and not name.startswith(_OWN_PREFIXES)
    }


def replace_environment(environment: Mapping[str, str]) -> None:
    """Make ``environment`` this process's own, for a rank that was forked and not executed."""
    os.environ.clear()
    os.environ.update(environment)


def secret_from_environment() -> str | None:
    """The job secret in ``FTRAIN_SECRET`` as hex (``bytes.fromhex`` gives the key), or None.

    Raises :class:`ConfigError` when it is too short to keep anybody out.
    """
    text = os.environ.get(SECRET_VARIABLE)
    if text is None:
        return None
    if len(text) < SECRET_CHARACTERS_MIN:
        raise ConfigError(
            f"{SECRET_VARIABLE} has {len(text)} characters: give at least {SECRET_CHARACTERS_MIN},"
            " for example from `openssl rand -hex 16`"
        )
    return text.encode(errors="surrogateescape").hex()


def rack_from_environment() -> str:
    """What fails together with this node, by ``FTRAIN_RACK``; "" when that is not said."""
    return os.environ.get(RACK_VARIABLE, "")


def default_run_dir(name: str) -> str:
    """Where a script's run lives unless told otherwise: ``./ftrain-runs/<name>``, where the name is
    that of the script without ``.py``, or of the module."""
    return str(Path.cwd() / "ftrain-runs" / (name or "python"))


def running_script() -> str:
    """The name of the script or package that this process runs."""
    path = Path(sys.argv[0])
    if path.name == "__main__.py":
        return path.parent.name
    return path.stem if path.suffix == ".py" else path.name


@contextmanager
def quiet_grpc() -> Iterator[None]:
    """While grpc is imported: it then writes nothing to the terminal, unless the user has set
    GRPC_VERBOSITY."""
    if "GRPC_VERBOSITY" in os.environ:
        yield
        return
    os.environ["GRPC_VERBOSITY"] = "NONE"
    try:
        yield
    finally:
        del os.environ["GRPC_VERBOSITY"]  # children may be the user's, who may want its words


def _context(variables: Mapping[str, str]) -> RankContext | None:
    text = variables.get(CONTEXT_VARIABLE)
    if text is None:
        return None
    try:
        return msgspec.json.decode(text.encode(), type=RankContext)
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(
            f"{CONTEXT_VARIABLE} is not what `ftrain launch` sets for its ranks ({error}):"
            " unset it to run without the launcher"
        ) from None


def _number(
    variables: Mapping[str, str],
    name: str,
    default: int,
    *,
    least: int = 0,
    below: int | None = None,
    limit: str = "",
) -> int:
    text = variables.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, not {text!r}")
    if below is not None and int(text) >= below:
        raise ConfigError(f"{name}={text} does not fit {limit}={below}: ranks count from 0")
    return int(text)
