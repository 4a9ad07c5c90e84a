"""Replica groups that train together: one dies anywhere in a step, and comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("replicas_job.py")


class Fleet:
    """One ``ftrain launch --replica-groups``."""

    def __init__(
        self, folder: Path, groups: int, *script: str, options: tuple[str, ...] = ()
    ) -> None:
        self.folder, self.groups = folder, groups
        self.out = folder / "out"
        command = [sys.executable, "-m", "ftrain.launch.cli", "launch"]
        command += ["--replica-groups", str(groups), "--run-dir", str(folder / "run"), *options]
        self.process = subprocess.Popen(
            [*command, str(SCRIPT), "--out", str(self.out), *script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.shown = ""

    def rows(self, group: int) -> list[dict[str, Any]]:
        path = Path(f"{self.out}-{group}.jsonl")
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for_step(self, group: int, step: int, timeout_s: float = 60) -> dict[str, Any]:
        end = time.monotonic() + timeout_s
        while True:
            for row in self.rows(group):
                if row["step"] >= step:
                    return row
            assert self.process.poll() is None, self.finish()
            assert time.monotonic() < end, f"group {group} never came to step {step}"
            time.sleep(0.02)

    def finish(self, timeout_s: float = 100) -> str:
        try:
            self.shown, _ = self.process.communicate(timeout=timeout_s)
        finally:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
                self.process.send_signal(signal.SIGINT)
                self.shown, _ = self.process.communicate(timeout=20)
        return self.shown

    def require_agreement(self, steps: int) -> None:
        """All groups have the same after every step, and made each of the last ones."""
        found: dict[int, tuple[Any, ...]] = {}
        for group in range(self.groups):
            rows = self.rows(group)
            assert rows, self.shown
            assert rows[-1]["step"] == steps - 1, self.shown
            for row in rows:
                state = (row["weights"], row["moments"], row["rate"])
                assert found.setdefault(row["step"], state) == state, (group, row["step"])
        assert sorted(found) == list(range(steps))

    def averaged(self) -> Counter[int]:
        """How often each sample's gradient was in an average."""
        drawn: dict[tuple[int, int], list[int]] = {}
        members: dict[int, list[int]] = {}
        for group in range(self.groups):
            for row in self.rows(group):
                drawn[row["step"], group] = row["samples"]
                members[row["step"]] = row["members"]
        taken = Counter[int]()
        for step, groups in members.items():
            for group in groups:
                taken.update(drawn.get((step, group), []))
        return taken


def test_one_dies_in_each_phase_and_nothing_is_lost(tmp_path: Path) -> None:
    deaths = ["1:12:forward", "2:22:grad0", "1:32:grad1", "2:42:boundary", "0:52:optimizer"]
    arguments = [word for death in deaths for word in ("--die", death)]
    fleet = Fleet(tmp_path, 3, "--steps", "70", "--pause", "0.02", *arguments)
    shown = fleet.finish()
    assert fleet.process.returncode == 0, shown
    fleet.require_agreement(70)
    for death in deaths:
        group, step, _ = death.split(":")
        rest = [number for number in range(3) if number != int(group)]
        rows = [row for number in rest for row in fleet.rows(number)]
        assert any(int(group) not in row["members"] for row in rows if row["step"] >= int(step))
    assert sorted(fleet.rows(1)[-1]["members"]) == [0, 1, 2]
    assert "Traceback" not in shown
    # Who died after its part was in an average did not write what it drew: that may be missing.
    taken = fleet.averaged()
    assert max(taken.values()) == 1, "a sample was averaged twice"


def test_every_sample_of_an_epoch_is_averaged_once(tmp_path: Path) -> None:
    """Two are lost, and what they had drawn is dealt out again."""
    deaths = ["--die", "1:12:forward", "--die", "2:30:grad0"]
    fleet = Fleet(
        tmp_path, 3, "--small", "--steps", "80", "--samples", "600", "--pause", "0.02", *deaths
    )
    shown = fleet.finish()
    assert fleet.process.returncode == 0, shown
    fleet.require_agreement(80)
    rows = fleet.rows(0)
    taken: Counter[int] = Counter()
    drawn = {
        (row["step"], group): row["samples"] for group in range(3) for row in fleet.rows(group)
    }
    for row in rows:  # until the epoch's samples are all there
        for group in row["members"]:
            taken.update(drawn[row["step"], group])
        if len(taken) == 600:
            break
    assert len(taken) == 600
    assert sum(taken.values()) <= 600 + 3 * 4  # the last batches are made to divide
    assert sum(count > 1 for count in taken.values()) <= 3 * 4


@pytest.mark.soak
def test_the_others_go_on_at_once_when_one_is_killed(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 3, "--small", "--steps", "300", "--pause", "0.02")
    row = fleet.wait_for_step(1, 20)
    os.kill(row["pid"], signal.SIGKILL)
    killed_s = time.monotonic()
    shown = fleet.finish()
    assert fleet.process.returncode == 0, shown
    fleet.require_agreement(300)
    for group in (0, 2):
        later = [r["at_s"] for r in fleet.rows(group) if r["at_s"] > killed_s]
        assert later[0] - killed_s < 5  # the benchmark says how long it really takes
    healed = next(r for r in fleet.rows(1) if r["at_s"] > killed_s)
    assert len(healed["members"]) == 3


def test_a_coordinator_that_dies_stops_nobody(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, 2, "--small", "--steps", "200", "--pause", "0.02")
    row = fleet.wait_for_step(0, 20)
    found = subprocess.run(
        ["pgrep", "-f", f"fleet_coordinator --job {tmp_path}"], capture_output=True, text=True
    )
    os.kill(int(found.stdout.split()[0]), signal.SIGKILL)
    fleet.wait_for_step(0, row["step"] + 10)
    os.kill(row["pid"], signal.SIGKILL)
    shown = fleet.finish()
    assert fleet.process.returncode == 0, shown
    fleet.require_agreement(200)
    assert len({r["pid"] for r in fleet.rows(0)}) == 2


def test_a_group_of_another_launch_joins_and_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTRAIN_SECRET", "a secret of both launches")
    script = ["--small", "--steps", "400", "--pause", "0.02"]
    fleet = Fleet(tmp_path, 2, *script)
    fleet.wait_for_step(0, 5)
    job = json.loads((tmp_path / "run" / "fleet" / "job.json").read_text())
    command = [sys.executable, "-m", "ftrain.launch.cli", "launch", "--run-dir"]
    command += [str(tmp_path / "third"), "fleet.group=7", f"fleet.run_id={job['run_id']}"]
    group = json.loads((tmp_path / "run" / "group-0" / "job.json").read_text())
    address = group["config"]["fleet"]["coordinator"]
    third = subprocess.Popen(
        [*command, "--join", address, str(SCRIPT), "--out", str(fleet.out), *script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    fleet.wait_for_step(7, 10)
    third.send_signal(signal.SIGTERM)  # it saves, and goes in order
    said, _ = third.communicate(timeout=60)
    assert third.returncode in (0, 75), said
    shown = fleet.finish()
    assert fleet.process.returncode == 0, shown
    fleet.require_agreement(400)
    rows = {row["step"]: row for row in fleet.rows(0)}
    for row in fleet.rows(7):
        assert row["weights"] == rows[row["step"]]["weights"]
        assert sorted(row["members"]) == [0, 1, 7]
    assert sorted(rows[399]["members"]) == [0, 1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--replica-groups", "0"], "must be a whole number of at least 1"),
        (["--replica-groups", "2", "--join", "127.0.0.1:1"], "leave one out"),
        (["--join", "127.0.0.1:1"], "needs fleet.group=K"),
        (["--replica-groups", "2", "fleet.groups_min=3"], "training would never begin"),
        (["--replica-groups", "2", "fleet.bind=0.0.0.0"], "needs fleet.host=ADDRESS"),
        (["--replica-groups", "2", "--nproc-per-node", "2"], "has one rank in this version"),
        (["--replica-groups", "256"], "ask for fewer"),
    ],
)
def test_what_can_not_be_is_said_in_a_sentence(
    tmp_path: Path, options: list[str], sentence: str
) -> None:
    command = [sys.executable, "-m", "ftrain.launch.cli", "launch", "--run-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, *options, str(SCRIPT), "--out", "x"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
