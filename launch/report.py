"""``ftrain report``: what happened in a run, told from its event log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftrain.comms.events import read_events
from ftrain.launch.console import summary_text
from ftrain.launch.run_directory import read_run_record

_PHASES = ("stopped", "forked", "script", "formed", "restored", "stepped")
_TOLD = ("warning", "error", "failed_start")


@dataclass(slots=True)
class LaunchStory:
    """What one launch went through."""

    began_s: float
    coordinators: int = 0  # processes, so restarts plus one
    incidents: list[Mapping[str, Any]] = field(default_factory=list)
    published: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    rows: Mapping[str, Any] = field(default_factory=dict)
    exit_code: int | None = None  # None: it runs, or was killed


def tell(events: Iterable[Mapping[str, Any]]) -> tuple[list[LaunchStory], int]:
    """The launches of a run, oldest first, and how many events were dropped before them."""
    stories: dict[str, LaunchStory] = {}
    story = LaunchStory(0.0)
    dropped = 0
    for event in events:
        kind = event["kind"]
        if kind == "dropped":
            dropped += int(event["events"])
            continue
        launch = event.get("launch")
        if launch is not None:
            story = stories.setdefault(launch, LaunchStory(float(event["wall_s"])))
        if kind == "launch":
            story.coordinators += 1
        elif kind == "incident":
            story.incidents.append(event)
        elif kind == "published":
            story.published.append(str(event["version"]["step"]))
        elif kind in _TOLD:
            story.told.append(str(event["text"]))
        elif kind == "summary":
            story.rows = event["data"]["rows"]
        elif kind == "end":
            story.exit_code = int(event["data"]["exit_code"])
    return list(stories.values()), dropped


def show_report(run_dir: str) -> int:
    """Print the story of a run; returns the exit code.

    Raises :class:`RunDirectoryError` when the directory holds no run.
    """
    path = Path(run_dir)
    record = read_run_record(path)
    stories, dropped = tell(read_events(path / "events.jsonl"))
    faults = sum(event["kind"] == "fault_begin" for event in read_events(path / "faults.jsonl"))
    print(f"run {record.run_id}: {record.world_size} ranks of {record.script}")
    print(f"{_count(len(stories), 'launch', 'es')}, {_count(faults, 'injected fault')}")
    if dropped:
        print(f"({_count(dropped, 'older event')} were dropped to stay within events.bytes_max)")
    for number, story in enumerate(stories, start=1):
        print()
        _show_launch(number, story)
    return 0


def _show_launch(number: int, story: LaunchStory) -> None:
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(story.began_s))
    code = story.exit_code
    end = "no end recorded" if code is None else f"exit code {code}"
    restarts = max(0, story.coordinators - 1)
    extra = f", {_count(restarts, 'coordinator restart')}" if restarts else ""
    print(f"launch {number}, {began}: {end}{extra}")
    for text in story.told:
        print(f"  {text}")
    if story.published:
        print(f"  durable versions published: steps {', '.join(story.published)}")
    if story.rows:
        print(summary_text("", {"rows": story.rows}))
    for incident in story.incidents:
        print(f"  {incident['text']}")
    if story.incidents:
        _show_phases(story.incidents)


def _show_phases(incidents: list[Mapping[str, Any]]) -> None:
    """Seconds after the fault was noticed at which each phase was over, everywhere."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "step", "source", *_PHASES, "recomputed", title="seconds after the fault was noticed"
    )
    for incident in incidents:
        ends = incident["phases_s"]
        cells = [f"{ends[phase]:.3f}" if phase in ends else "" for phase in _PHASES]
        recomputed = str(incident["steps_recomputed"])
        table.add_row(str(incident["step"]), incident["restore"]["level"], *cells, recomputed)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{ending}"
