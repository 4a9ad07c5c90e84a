from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ftrain.comms.errors import UsageError
from ftrain.launch.output import OutputPump, parse_std, prune_attempts


@pytest.fixture
def troubles() -> list[str]:
    return []


@pytest.fixture
def pump(troubles: list[str]) -> Iterator[OutputPump]:
    pump = OutputPump(troubles.append)
    yield pump
    pump.close(5.0)


def send(fd: int, *chunks: bytes) -> None:
    for chunk in chunks:
        os.write(fd, chunk)
    os.close(fd)


@pytest.mark.parametrize(
    ("text", "local_rank", "std"),
    [("3", 0, 3), ("0", 5, 0), ("0:1,1:3", 0, 1), ("0:1,1:3", 1, 3), ("0:1,1:3", 2, 0)],
)
def test_std_is_torchruns(text: str, local_rank: int, std: int) -> None:
    assert parse_std(text, local_rank) == std


@pytest.mark.parametrize("text", ["", "4", "-1", "x", "0:x", "0:1:2", "0:7"])
def test_bad_std_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="which output goes where"):
        parse_std(text, 0)


def test_lines_go_to_log_and_console(
    pump: OutputPump, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = pump.open("stdout", tmp_path / "0", "[node0 rank0] ")
    err = pump.open("stderr", tmp_path / "0", "[node0 rank0] ")
    send(out, b"one\ntw", b"o\n50%\r100%\r\n", b"no newline")
    send(err, b"bad\n")
    pump.close(5.0)
    assert (tmp_path / "0" / "stdout.log").read_bytes() == b"one\ntwo\n50%\r100%\r\nno newline"
    assert (tmp_path / "0" / "stderr.log").read_text() == "bad\n"
    shown = capfd.readouterr()
    prefix = "[node0 rank0] "
    lines = ("one", "two", "50%", "100%", "no newline")
    assert shown.out == "".join(f"{prefix}{line}\n" for line in lines)
    assert shown.err == f"{prefix}bad\n"


def test_redirect_and_console_only(
    pump: OutputPump, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    send(pump.open("stdout", tmp_path / "a", "a ", redirects=1, tee=0), b"to the file\n")
    send(pump.open("stdout", tmp_path / "b", "b ", redirects=0, tee=0), b"to the console\n")
    pump.close(5.0)
    assert (tmp_path / "a" / "stdout.log").read_text() == "to the file\n"
    assert not (tmp_path / "b").exists()
    assert capfd.readouterr().out == "b to the console\n"


def test_much_output_with_no_newline_is_not_hoarded(
    pump: OutputPump, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    send(pump.open("stdout", tmp_path, ""), b"x" * 300_000)
    pump.close(5.0)
    assert (tmp_path / "stdout.log").stat().st_size == 300_000
    assert capfd.readouterr().out.count("x") == 300_000


def test_close_does_not_wait_for_who_keeps_the_pipe(pump: OutputPump, tmp_path: Path) -> None:
    kept = pump.open("stdout", tmp_path, "")
    os.write(kept, b"before\n")
    began = time.monotonic()
    pump.close(5.0)
    assert time.monotonic() - began < 2.0
    assert (tmp_path / "stdout.log").read_text() == "before\n"
    os.close(kept)


@pytest.mark.parametrize("std", [{"tee": 3}, {"tee": 0, "redirects": 3}])
def test_a_full_disk_costs_the_log_and_is_told_once(
    pump: OutputPump,
    troubles: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    std: dict[str, int],
) -> None:
    (tmp_path / "stdout.log").symlink_to("/dev/full")
    out = pump.open("stdout", tmp_path, "a ", **std)
    err = pump.open("stderr", tmp_path, "a ", **std)
    os.write(out, b"one\n")
    os.write(err, b"kept\n")
    while not (tmp_path / "stderr.log").read_bytes() or not troubles:
        time.sleep(0.001)
    send(out, b"two\n")
    os.close(err)
    pump.close(5.0)
    assert capfd.readouterr().out == "a one\na two\n"
    assert (tmp_path / "stderr.log").read_text() == "kept\n"
    (told,) = troubles
    assert f"not kept in {tmp_path}: No space left on device" in told


def test_a_log_directory_that_can_not_be_made_costs_the_log(
    pump: OutputPump, troubles: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for kind in ("stdout", "stderr"):
        send(pump.open(kind, tmp_path / "file" / "0", "", redirects=3, tee=0), b"shown\n")
    pump.close(5.0)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("shown\n", "shown\n")
    assert len(troubles) == 1


def test_logs_of_old_attempts_go_and_everything_else_stays(tmp_path: Path) -> None:
    for attempt in range(1, 41):
        (tmp_path / f"attempt_{attempt}" / "0").mkdir(parents=True)
        (tmp_path / f"attempt_{attempt}" / "0" / "stdout.log").touch()
    (tmp_path / "attempt_x").mkdir()
    (tmp_path / "attempt_7.txt").touch()
    prune_attempts(tmp_path, 5)
    numbers = [1, 2, 3, *range(36, 41)]
    kept = {f"attempt_{number}" for number in numbers}
    assert set(os.listdir(tmp_path)) == kept | {"attempt_x", "attempt_7.txt"}
    prune_attempts(tmp_path, 5)
    prune_attempts(tmp_path / "missing", 5)
    assert kept < set(os.listdir(tmp_path))
    assert (tmp_path / "attempt_40" / "0" / "stdout.log").exists()
