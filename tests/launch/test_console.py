"""What the user sees: on a terminal, and in a file."""

from __future__ import annotations

import io
import os

import pytest

from ftrain.comms.protocol.messages import Notice
from ftrain.launch.console import Console, progress_text, summary_text

PROGRESS = {
    "step": 120,
    "total_steps": 200,
    "steps_per_s": 34.123,
    "loss": 2.31,
    "snapshot_step": 119,
    "incidents": 1,
}
SHOWN = "step 120/200 · 34.1 steps/s · loss 2.31 · snapshot 119 · 1 incident"


def notice(kind: str, text: str = "", data: dict[str, object] | None = None) -> Notice:
    """News from the coordinator."""
    return Notice(kind, text, data or {})


def terminal(shown: str, width: int = 400) -> list[str]:
    """What stands on the lines of a terminal that was sent ``shown`` (colours left out)."""
    lines = [""]
    for part in shown.replace("\x1b[33m", "").replace("\x1b[31m", "").split("\x1b[0m"):
        for index, line in enumerate(part.split("\n")):
            if index:
                lines.append("")
            lines[-1] += line
    return [line.rpartition("\r\x1b[K")[2][:width] for line in lines]


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (PROGRESS, SHOWN),
        ({"step": 3}, "step 3"),
        ({"step": 3, "total_steps": 0, "incidents": 2}, "step 3 · 2 incidents"),
        ({"step": 0, "steps_per_s": 0.0, "snapshot_step": -1}, "step 0"),
        ({}, "starting"),
    ],
)
def test_progress_line(data: dict[str, object], shown: str) -> None:
    assert progress_text("starting", data) == shown


def test_summary_is_two_columns() -> None:
    shown = summary_text("done", {"rows": {"steps": 200, "goodput": "97.1 %"}})
    assert shown == "done\n  steps    200\n  goodput  97.1 %"
    assert summary_text("done", {}) == "done"


def test_into_a_file_progress_is_a_line_now_and_then() -> None:
    stream = io.StringIO()
    console = Console(progress_piped_every_s=3600.0, stream=stream)
    for _ in range(5):
        console.notice(notice("progress", data=PROGRESS))
    console.notice(notice("incident", "step 412: rank 1 (node 0) died: SIGKILL."))
    console.close()
    assert stream.getvalue() == f"{SHOWN}\nstep 412: rank 1 (node 0) died: SIGKILL.\n"


def test_on_a_terminal_progress_stays_below() -> None:
    stream = io.StringIO()
    console = Console(progress_piped_every_s=1.0, stream=stream, in_place=True)
    console.notice(notice("progress", data={"step": 1}))
    console.notice(notice("incident", "rank 1 died"))
    console.notice(notice("progress", data={"step": 2}))
    assert terminal(stream.getvalue()) == ["rank 1 died", "step 2"]
    console.close()
    assert terminal(stream.getvalue()) == ["rank 1 died", ""]


def test_after_the_summary_there_is_no_progress() -> None:
    stream = io.StringIO()
    console = Console(progress_piped_every_s=1.0, stream=stream, in_place=True)
    console.notice(notice("progress", data={"step": 1}))
    console.notice(notice("summary", "summary"))
    console.line("a fault never struck")
    console.notice(notice("progress", data={"step": 2}))
    assert terminal(stream.getvalue()) == ["summary", "a fault never struck", ""]


def test_ranks_output_goes_above_the_progress_line() -> None:
    stream = io.StringIO()
    console = Console(progress_piped_every_s=1.0, stream=stream, in_place=True)
    console.notice(notice("progress", data={"step": 1}))
    reading, writing = os.pipe()
    for piece in (b"loss ", b"2.0", b"\n"):
        console.output(piece, writing)
        console.notice(notice("progress", data={"step": 2}))
    os.close(writing)
    with os.fdopen(reading, "rb") as output:
        assert output.read() == b"loss 2.0\n"  # untouched
    # While a line is incomplete the progress line stays away from it.
    assert stream.getvalue().count("step") == 3
    assert terminal(stream.getvalue())[-1] == "step 2"


def test_a_lost_reader_is_no_error() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        console = Console(progress_piped_every_s=1.0, stream=stream)
        console.line("heard")
        os.close(reading)
        console.line("unheard")
        console.notice(notice("progress", data=PROGRESS))
        console.close()
