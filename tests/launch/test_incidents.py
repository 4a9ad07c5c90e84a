from __future__ import annotations

import time
from pathlib import Path

import pytest

from ftrain.comms.events import EventLog
from ftrain.comms.protocol.effects import Incident
from ftrain.comms.protocol.messages import (
    Formation,
    NodePlace,
    Phases,
    RankFailure,
    RestorePlan,
    VersionId,
)
from ftrain.launch.incidents import Account, Tracebacks, make_record

SECOND = 1_000_000_000


def incident(restore: RestorePlan, *, step: int = 412, recomputed: int = 0) -> Incident:
    place = NodePlace(0, 1, 0, 2, "127.0.0.1", "127.0.0.1:1")
    return Incident(
        epoch=3,
        step=step,
        cause="rank 1 (node 0) died: SIGKILL",
        failures=(RankFailure(1, "signal", "SIGKILL", 10 * SECOND),),
        nodes=(),
        phases=(
            (0, Phases(10 * SECOND, 10_030_000_000, 10_050_000_000, 0, 0, 0, 10_310_000_000)),
            (1, Phases(0, 10_040_000_000, 10_045_000_000, 0, 0, 0, 10_300_000_000)),
        ),
        formation=Formation(4, (place,), "127.0.0.1", 2, restore, 1),
        steps_recomputed=recomputed,
    )


MEMORY = RestorePlan("memory", VersionId(3, 412))


def test_line_of_an_incident() -> None:
    record = make_record(
        incident(MEMORY), heard_ns=11 * SECOND, closed_ns=12 * SECOND, one_host=True
    )
    assert record.line == (
        "step 412: rank 1 (node 0) died: SIGKILL. Restarted from memory in 0.31 s; "
        "0 steps recomputed, 0 samples lost."
    )
    assert record.phases_s == pytest.approx({"stopped": 0.04, "forked": 0.05, "stepped": 0.31})


@pytest.mark.parametrize(
    ("restore", "words"),
    [
        (RestorePlan("fresh"), "Restarted from the beginning in"),
        (
            RestorePlan("durable", VersionId(2, 400), fence=2, path="x"),
            "Restarted from the durable version of step 400 in",
        ),
    ],
)
def test_line_names_the_source(restore: RestorePlan, words: str) -> None:
    record = make_record(incident(restore, recomputed=1), heard_ns=1, closed_ns=2, one_host=True)
    assert words in record.line
    assert "1 step recomputed," in record.line


def test_clocks_of_other_hosts_are_not_believed() -> None:
    record = make_record(
        incident(MEMORY), heard_ns=100 * SECOND, closed_ns=102 * SECOND, one_host=False
    )
    assert record.restart_s == 2.0
    assert record.phases_s == {}


def raised(rank: int, text: str, at: int, cause: str = "ValueError: bad") -> RankFailure:
    return RankFailure(rank, "exception", cause, at, text)


def test_equal_tracebacks_are_shown_once_with_all_ranks() -> None:
    tracebacks = Tracebacks()
    assert tracebacks.add(1, [raised(0, "T", 5)])
    assert tracebacks.add(1, [raised(0, "T", 5), raised(1, "T", 6)])
    assert not tracebacks.add(1, [raised(1, "T", 6)])
    assert tracebacks.take(1, {0: 0, 1: 3}) == ["rank 0 (node 0), rank 1 (node 3) raised:\nT"]
    assert tracebacks.take(1, {}) == []
    tracebacks.add(2, [raised(1, "T", 9)])
    assert tracebacks.take(2, {}) == []


def test_consequences_are_not_shown() -> None:
    gloo = "RuntimeError: [gloo/transport/tcp/pair.cc:598] Connection closed by peer"
    tracebacks = Tracebacks()
    killed = RankFailure(0, "signal", "SIGKILL", 1)
    tracebacks.add(1, [raised(1, "G", 2, gloo), killed])
    assert tracebacks.take(1, {}) == []
    tracebacks.add(2, [raised(1, "G", 2, gloo), raised(0, "V", 3)])
    assert tracebacks.take(2, {0: 0}) == ["rank 0 (node 0) raised:\nV"]
    tracebacks.add(3, [raised(1, "G", 2, gloo)])
    assert tracebacks.take(3, {}) == ["rank 1 raised:\nG"]


def test_account_survives_the_coordinator(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, 1 << 20)
    log.write("launch", launch="before")
    log.write("incident", launch="before", restart_s=9.0, steps_recomputed=9)
    log.write("launch", launch="now")
    log.write("running", launch="now", first_step=100)
    log.write("failed_start", launch="now", text="the restart failed: SIGKILL")
    log.write("incident", launch="now", restart_s=0.5, steps_recomputed=2)
    log.write("incident", launch="now", restart_s=0.25, steps_recomputed=1)
    log.close()
    account = Account.read(path, "now", time.time())
    assert (account.incidents, account.restart_s, account.steps_recomputed) == (2, 0.75, 3)
    assert account.first_step == 100
    account.began_s, account.running_s, account.step, account.step_s = 1000.0, 1004.0, 350, 0.1
    rows = account.rows(1010.0, 2)
    assert rows["steps"] == "350 (250 in this launch)"
    assert rows["goodput"] == "49.5 %"
    assert rows["restarts"] == "2 (1 of the starts failed)"
    assert rows["time lost"] == "5.05 s: start 4.00, restarts 0.75, recomputing 0.30"


def test_a_first_start_that_failed_is_counted_once() -> None:
    account = Account(1000.0)
    account.count(3.0, 0)
    account.ran(1005.0, 0)
    assert account.rows(1010.0, 1)["time lost"].startswith("5.00 s: start 2.00, restarts 3.00")


def test_account_of_a_new_launch_is_empty(tmp_path: Path) -> None:
    account = Account.read(tmp_path / "none.jsonl", "now", 5.0)
    assert account == Account(5.0)
    assert account.rows(5.0, 0)["incidents"] == 0
