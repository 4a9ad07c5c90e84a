"""The event log: one line per event, torn writes, the budget, a full disk."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from ftrain.comms.events import EventLog, read_events
from ftrain.comms.protocol.messages import VersionId

MEBIBYTE = 1024 * 1024


class FixedClock:
    """A clock that a test sets."""

    def monotonic_ns(self) -> int:
        return 5

    def wall_s(self) -> float:
        return 1.5


@dataclass(frozen=True)
class Incident:
    rank: int
    version: VersionId


def test_events_are_lines_with_both_clocks(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, MEBIBYTE, FixedClock())
    log.write("incident", detail=Incident(1, VersionId(2, 3)), path=tmp_path, loss=float("nan"))
    log.write("note", wall_s="not to be forged", text="two\nlines")
    log.close()
    lines = path.read_text().splitlines()
    assert [list(json.loads(text))[:3] for text in lines] == [
        ["wall_s", "monotonic_ns", "kind"],
        ["wall_s", "monotonic_ns", "kind"],
    ]
    first, second = read_events(path)
    assert first == {
        "wall_s": 1.5,
        "monotonic_ns": 5,
        "kind": "incident",
        "detail": {"rank": 1, "version": {"epoch": 2, "step": 3}},
        "path": str(tmp_path),
        "loss": None,
    }
    assert second["wall_s"] == 1.5
    assert second["text"] == "two\nlines"


def test_a_missing_file_has_no_events(tmp_path: Path) -> None:
    assert list(read_events(tmp_path / "none")) == []


def test_a_torn_last_line_costs_that_event_only(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, MEBIBYTE)
    for number in range(3):
        log.write("n", number=number)
    log.close()
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        kept = 3 if cut == 1 else 2  # without its line end the event is still whole
        assert [event["number"] for event in read_events(path)] == list(range(kept))
        log = EventLog(path, MEBIBYTE)
        log.write("n", number=9)
        log.close()
        assert [event["number"] for event in read_events(path)] == [*range(kept), 9]


def test_lines_that_are_no_events_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'\n5\n"x"\n{}\n\xff\xfe\n[1]\n{"kind": "good"}\n' + b"\0" * 100)
    assert list(read_events(path)) == [{"kind": "good"}]


def test_a_killed_writer_tears_at_most_one_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    code = (
        "import sys\n"
        "from ftrain.comms.events import EventLog\n"
        "log = EventLog(sys.argv[1], 1 << 20)\n"
        "number = 0\n"
        "while True:\n"
        "    log.write('n', number=number, text='x' * (number % 300))\n"
        "    number += 1\n"
        "    if number == 500: print(flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    events = list(read_events(path))
    dropped = events.pop(0)["events"] if events[0]["kind"] == "dropped" else 0
    assert [event["number"] for event in events] == list(range(dropped, dropped + len(events)))
    assert dropped + len(events) >= 499


def test_the_oldest_half_goes_when_the_budget_is_reached(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, 30_000)
    written = 0
    for number in range(3000):
        log.write("n", number=number)
        written += 1
        assert path.stat().st_size <= 20_000
        if number % 100 == 99:
            events = list(read_events(path))
            dropped = 0
            if events[0]["kind"] == "dropped":
                dropped = events.pop(0)["events"]
            assert [event["number"] for event in events] == list(range(dropped, written))
            assert dropped + len(events) == written
    assert dropped > 2000
    assert log.lost == 0
    log.close()
    assert os.listdir(tmp_path) == ["events.jsonl"]
    again = EventLog(path, 30_000)
    again.write("n", number=written)
    again.close()
    assert list(read_events(path))[-1]["number"] == written


def test_an_event_over_the_whole_budget_is_lost_and_counted(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", 3000)
    log.write("n", number=1)
    log.write("large", text="x" * 5000)
    log.write("n", number=2)
    log.close()
    assert log.lost == 1
    kinds = [event["kind"] for event in read_events(tmp_path / "events.jsonl")]
    assert kinds[-1] == "n"
    assert "large" not in kinds


def test_a_full_disk_loses_events_and_nothing_else(tmp_path: Path) -> None:
    """A file size limit stands for the full disk: writes come back short, then fail."""
    path = tmp_path / "events.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log = EventLog(path, MEBIBYTE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        for number in range(50):
            log.write("n", number=number)
        assert path.stat().st_size == 1000
        assert 0 < log.lost < 50
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    log.write("n", number=50)
    log.close()
    numbers = [event["number"] for event in read_events(path)]
    assert numbers == [*range(50 - log.lost), 50]


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, 20 * MEBIBYTE)

    def body(name: str) -> None:
        for number in range(300):
            log.write(name, number=number, text=name * 100)

    threads = [threading.Thread(target=body, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    events = list(read_events(path))
    for name in "abcd":
        numbers = [event["number"] for event in events if event["kind"] == name]
        assert numbers == list(range(300))


def test_a_place_that_can_not_be_written_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        EventLog(tmp_path / "missing" / "events.jsonl", MEBIBYTE)


def test_events_after_close_are_counted_as_lost(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", MEBIBYTE)
    log.close()
    log.close()
    log.write("n")
    assert log.lost == 1
