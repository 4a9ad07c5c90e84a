"""The coordinator's phases and the only ways between them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from ftrain.comms.errors import LocalProtocolError


class Phase(StrEnum):
    """What the coordinator is busy with."""

    RECOVERING = "recovering"  # it is new and learns where the nodes stand
    GATHERING = "gathering"  # no rank is alive; waiting for all nodes
    FORMING = "forming"  # an epoch is granted; its store and restore plan are being made
    STARTING = "starting"  # ranks start and restore; no step is done everywhere
    RUNNING = "running"  # every rank has done a step
    STOPPING = "stopping"  # every rank is being ended
    PAUSING = "pausing"  # a graceful stop: ranks agree on a last boundary and end there
    SAVING = "saving"  # the last version goes to the durable level
    FINISHED = "finished"  # the job is over; nodes are told to finish


class Event(StrEnum):
    """What changes the phase."""

    ALL_RUN = "every node runs"
    SOME_RUN = "some nodes run, the others start"
    BROKEN = "the formation can't go on"
    ALL_STOPPED = "no rank is alive"
    COMPLETE = "all nodes are there"
    FORMED = "the formation is made"
    NOT_FORMED = "the formation can't be made"
    STOP_ASKED = "a graceful stop is asked for"
    GIVEN_UP = "no restart helps"
    ALL_ENDED = "every rank ended by itself"
    ENDED = "all ranks ended at the agreed boundary"
    REFUSED = "the last version can't be saved"
    OVER = "the job is over"


TRANSITIONS: Mapping[Phase, Mapping[Event, Phase]] = MappingProxyType(
    {
        Phase.RECOVERING: {
            Event.ALL_RUN: Phase.RUNNING,
            Event.SOME_RUN: Phase.STARTING,
            Event.BROKEN: Phase.STOPPING,
            Event.OVER: Phase.FINISHED,
        },
        Phase.GATHERING: {
            Event.COMPLETE: Phase.FORMING,
            Event.STOP_ASKED: Phase.SAVING,
            Event.GIVEN_UP: Phase.SAVING,
            Event.OVER: Phase.FINISHED,
        },
        Phase.FORMING: {
            Event.FORMED: Phase.STARTING,
            Event.NOT_FORMED: Phase.GATHERING,
            Event.BROKEN: Phase.STOPPING,
            Event.STOP_ASKED: Phase.STOPPING,
            Event.OVER: Phase.FINISHED,
        },
        Phase.STARTING: {
            Event.ALL_RUN: Phase.RUNNING,
            Event.BROKEN: Phase.STOPPING,
            Event.STOP_ASKED: Phase.STOPPING,
            Event.OVER: Phase.FINISHED,
        },
        Phase.RUNNING: {
            Event.BROKEN: Phase.STOPPING,
            Event.STOP_ASKED: Phase.PAUSING,
            Event.OVER: Phase.FINISHED,
        },
        Phase.STOPPING: {
            Event.ALL_STOPPED: Phase.GATHERING,
            Event.OVER: Phase.FINISHED,
        },
        Phase.PAUSING: {
            Event.BROKEN: Phase.STOPPING,
            Event.ALL_ENDED: Phase.RUNNING,
            Event.ENDED: Phase.SAVING,
            Event.OVER: Phase.FINISHED,
        },
        Phase.SAVING: {
            Event.REFUSED: Phase.STOPPING,
            Event.OVER: Phase.FINISHED,
        },
        Phase.FINISHED: {},
    }
)


def after(phase: Phase, event: Event) -> Phase:
    """The phase that ``event`` leads to."""
    try:
        return TRANSITIONS[phase][event]
    except KeyError:
        raise LocalProtocolError(
            f"membership: {event.value} can't happen while {phase.value}: a bug in ftrain"
        ) from None
