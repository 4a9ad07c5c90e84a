"""The catalogue of faults, and those that a rank commits on itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ftrain.comms.errors import ConfigError
from ftrain.comms.telemetry import Phase, TelemetryPage, Word
from ftrain.configs.schema import FaultConfig, FaultsConfig
from ftrain.recovery.faults import (
    CATALOGUE,
    FaultKind,
    InjectedFault,
    arm,
    check_fault,
    check_schedule,
    fire_in_rank,
    parse_fault,
    poll_fault,
)


@pytest.fixture
def page() -> Iterator[TelemetryPage]:
    fd = TelemetryPage.create()
    page = TelemetryPage(fd)
    page.clear()
    yield page
    page.close()
    os.close(fd)


@pytest.mark.parametrize("kind", CATALOGUE)
def test_every_kind_of_fault_can_be_asked_for(kind: str) -> None:
    assert check_fault(FaultConfig(kind=kind, at_step=3), nodes=2, world_size=4).name == kind


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("kind=sigkil at_step=1", "kind='sigkil' is none of sigkill, sigstop"),
        ("kind=sigkill", "set exactly one of at_step, at_s and mtbf_s, not 0"),
        ("kind=sigkill at_step=1 at_s=2", "set exactly one of at_step, at_s and mtbf_s, not 2"),
        ("kind=sigkill at_step=1 phase=backward", "phase='backward' is none of any, forward_"),
        ("kind=sigkill at_step=1 rank=4", "rank=4, but the job has ranks 0 to 3"),
        ("kind=node at_step=1 node=2", "node=2, but the job has nodes 0 to 1"),
        ("kind=exit at_step=1 node=1 rank=3", "set rank or node, not both"),
        ("kind=coordinator at_step=1 rank=1", "there is one coordinator"),
        ("kind=sigkill mtbf_s=1 count_max=0", "count_max must be 1 or more"),
        ("kind=sigkill at_step=1 resume_s=1", "resume_s belongs to sigstop"),
        ("kind=sigkill at_step=1 down_s=1", "down_s belongs to coordinator"),
        ("kind=skip_collective at_step=1 phase=boundary", "it happens in forward_backward"),
    ],
)
def test_bad_fault_is_one_sentence(words: str, complaint: str) -> None:
    fault = parse_fault(words.split())
    with pytest.raises(ConfigError) as caught:
        check_schedule(FaultsConfig(schedule=(fault,)), nodes=2, world_size=4)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fault_now_needs_no_time() -> None:
    fault = parse_fault(["sigstop", "rank=1", "resume_s=0.5"])
    assert fault == FaultConfig(kind="sigstop", rank=1, resume_s=0.5)
    check_fault(fault, nodes=1, world_size=2, now=True)
    with pytest.raises(ConfigError, match="at most one"):
        check_fault(FaultConfig(kind="exit", at_step=1, at_s=1), nodes=1, world_size=1, now=True)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [("rank=1", "needs kind="), ("kind=exit rnk=1", "'rnk' is no key"), ("exit rank=x", "rank")],
)
def test_unreadable_fault_is_one_sentence(words: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_fault(words.split())


def test_armed_fault_waits_for_step_and_phase_and_fires_once(page: TelemetryPage) -> None:
    assert poll_fault(page, 5, Phase.STEP) is None
    arm(page, FaultKind.EXCEPTION, 5, Phase.OPTIMIZER)
    assert poll_fault(page, 4, Phase.OPTIMIZER) is None
    assert poll_fault(page, 5, Phase.STEP) is None
    with pytest.raises(InjectedFault, match="asked for"):
        poll_fault(page, 6, Phase.OPTIMIZER)
    assert poll_fault(page, 6, Phase.OPTIMIZER) is None
    assert page[Word.FAULT_FIRED_NS] > 0
    page.clear()  # the agent makes room for the next process before the injector has looked
    assert page[Word.FAULT_FIRED_NS] > 0
    assert (page[Word.FAULT_FIRED_STEP], page[Word.FAULT_FIRED_PHASE]) == (6, Phase.OPTIMIZER)


def test_armed_fault_is_forgotten_with_its_process(page: TelemetryPage) -> None:
    arm(page, FaultKind.EXIT)
    page.clear()
    assert poll_fault(page, 0, Phase.STEP) is None


def test_collective_is_skipped_in_the_step_only(page: TelemetryPage) -> None:
    arm(page, FaultKind.SKIP_COLLECTIVE)
    assert poll_fault(page, 1, Phase.BOUNDARY) is None
    assert poll_fault(page, 1, Phase.STEP) is FaultKind.SKIP_COLLECTIVE
    assert poll_fault(page, 1, Phase.STEP) is None


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (FaultKind.SEGFAULT, -signal.SIGSEGV),
        (FaultKind.EXIT, 3),
        (FaultKind.SIGKILL, -signal.SIGKILL),
        (FaultKind.EXCEPTION, 1),
    ],
)
def test_process_ends_as_the_fault_says(kind: FaultKind, code: int) -> None:
    script = "import sys; from ftrain.recovery.faults import *\n"
    script += "fire_in_rank(FaultKind(int(sys.argv[1])))"
    command = [sys.executable, "-c", script, str(int(kind))]
    assert subprocess.run(command, capture_output=True, timeout=30).returncode == code


def test_fault_from_outside_is_refused_inside() -> None:
    with pytest.raises(ConfigError, match="node is not a fault that a rank commits"):
        fire_in_rank(FaultKind.NODE)


def test_asking_costs_next_to_nothing(page: TelemetryPage) -> None:
    """A few hundred ns, against steps of milliseconds; the bound is loose for busy machines."""
    import timeit

    best_s = min(timeit.repeat(lambda: poll_fault(page, 1, Phase.STEP), number=2000, repeat=5))
    assert best_s / 2000 < 20e-6
