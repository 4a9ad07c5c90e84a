"""Several hosts, each with its own ``ftrain launch``: who may join, and who is left alone."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from launching import Launch, wait_for

from ftrain.comms.environment import SECRET_VARIABLE
from ftrain.comms.events import read_events
from ftrain.comms.job import JobSpec
from ftrain.configs.schema import FtrainConfig, LaunchConfig, SnapshotConfig
from ftrain.launch.joining import difference, join_request
from ftrain.recovery.node_file import node_file_path, read_node_file

WAITS = """
import os, time
print("rank", os.environ["RANK"], "began", flush=True)
while not os.path.exists("../go-on"):
    time.sleep(0.02)
"""


class Hosts:
    """Launches that meet at one address; each has a folder (a host's disk) of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.launches: list[Launch] = []
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.endpoint = f"127.0.0.1:{probe.getsockname()[1]}"

    def launch(self, node: int, *tokens: str, source: str = WAITS, shared: bool = True) -> Launch:
        folder = self.place / f"host{node}"
        folder.mkdir(exist_ok=True)
        (folder / "train.py").write_text(source)
        line = ["--nnodes=2", f"--node-rank={node}", f"--rdzv-endpoint={self.endpoint}"]
        durable = [f"checkpoint.dir={self.place}/durable"] if shared else []
        self.launches.append(Launch(folder, *line, "--run-id=pair", *durable, *tokens))
        return self.launches[-1]

    def go_on(self) -> None:
        (self.place / "go-on").touch()


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    monkeypatch.setenv(SECRET_VARIABLE, "correct horse battery staple")
    found = Hosts(tmp_path)
    yield found
    for launch in found.launches:
        launch.popen.kill()
        launch.popen.wait()
    assert all(launch.gone_after(2.0) for launch in found.launches)


def began(launch: Launch) -> int:
    return launch.shown.count(" began")


def refusal(launch: Launch) -> str:
    """What a launch said that must not have started anything."""
    assert launch.wait(30) == 2, launch.shown
    assert launch.gone_after(0)
    assert not (launch.run_dir / "nodes").exists()
    (sentence,) = [line for line in launch.shown.splitlines() if line.startswith("ftrain: node")]
    return sentence


@pytest.mark.slow
def test_a_checkpoint_directory_of_ones_own_is_refused(hosts: Hosts) -> None:
    first = hosts.launch(0, shared=False)
    sentence = refusal(hosts.launch(1, shared=False))
    folder = hosts.place / "host1" / "run" / "checkpoints"
    assert f"node 1 does not see the checkpoint directory of the other hosts in {folder}" in (
        sentence
    )
    assert "checkpoint=off" in sentence
    assert first.popen.poll() is None


@pytest.mark.slow
def test_without_durable_versions_nothing_has_to_be_shared(hosts: Hosts) -> None:
    launches = [hosts.launch(node, "checkpoint=off", shared=False) for node in (0, 1)]
    hosts.go_on()
    assert [launch.wait() for launch in launches] == [0, 0], launches[1].shown


@pytest.mark.soak
def test_what_differs_between_hosts_is_named(hosts: Hosts) -> None:
    first = hosts.launch(0)
    assert "the digest of the script is " in refusal(hosts.launch(1, source=f"{WAITS}\nx = 1\n"))
    wrong = refusal(hosts.launch(1, "snapshot.every_steps=3", "launch.max_restarts=7"))
    assert "launch.max_restarts is 7 here and 3 there; snapshot.every_steps is 3 here and 1" in (
        wrong
    )
    # what is a host's own affair may differ
    second = hosts.launch(1, "launch.tee=0", "launch.threads_per_rank=1")
    wait_for(lambda: began(first))
    hosts.go_on()
    assert (first.wait(), second.wait()) == (0, 0), second.shown


def test_every_setting_is_compared_unless_it_is_a_hosts_own() -> None:
    config = FtrainConfig(launch=LaunchConfig(nnodes=2, nproc_per_node=2))
    job = JobSpec(
        run_id="r",
        secret="00",
        run_dir="/a",
        config=config,
        argv=("train.py",),
        module=False,
        script_digest="0" * 32,
        coordinator="h:1",
        front_pid=1,
    )
    ours = join_request(job)
    own = LaunchConfig(nnodes=2, nproc_per_node=2, node_rank=1, host="h1", run_dir="/b", tee="0")
    joining = join_request(replace(job, config=replace(config, launch=own)))
    assert joining.node == 1
    assert difference(joining, ours) == ""
    other = replace(config, snapshot=SnapshotConfig(slots=4), seed=1)
    assert "seed is 1 here and 0 there; snapshot.slots is 4 here and 3 there: make it" in (
        difference(join_request(replace(job, config=other)), ours)
    )
    older = replace(ours, facts=tuple(f for f in ours.facts if f[0] != "torch"))
    assert "torch is not known here and " in difference(older, ours)


@pytest.mark.soak
def test_a_host_that_lost_its_directory_comes_back(hosts: Hosts) -> None:
    """Its new agent is not taken for the old one, though nothing on its disk knows of that."""
    first, second = hosts.launch(0), hosts.launch(1)
    wait_for(lambda: began(first) and began(second))
    before = read_node_file(node_file_path(second.run_dir, 1))
    second.popen.kill()
    second.popen.wait()
    assert second.gone_after(2.0)
    shutil.rmtree(second.run_dir)
    third = hosts.launch(1)
    wait_for(lambda: began(first) == 2 and began(third))
    after = read_node_file(node_file_path(third.run_dir, 1))
    assert before is not None
    assert after is not None
    assert after.incarnation > before.incarnation
    hosts.go_on()
    assert (first.wait(), third.wait()) == (0, 0), third.shown
    incidents = [e for e in read_events(first.run_dir / "events.jsonl") if e["kind"] == "incident"]
    assert "node 1 was lost" in incidents[0]["text"]


@pytest.mark.soak
def test_the_others_do_not_wait_for_ever_for_a_dead_launch(hosts: Hosts) -> None:
    first, second = hosts.launch(0), hosts.launch(1, "launch.rejoin_timeout_s=1")
    wait_for(lambda: began(first) and began(second))
    first.popen.kill()
    killed_s = time.monotonic()
    assert second.wait(20) == 1, second.shown
    assert 1 <= time.monotonic() - killed_s < 10
    assert f"ftrain: the coordinator at {hosts.endpoint} was not there for 1 s" in second.shown
    assert second.gone_after(0)


def test_nobody_to_join(hosts: Hosts) -> None:
    alone = hosts.launch(1, "launch.join_timeout_s=0.5")
    assert alone.wait(20) == 1
    assert "was not there for 0.5 s: see whether node 0's launch runs there" in alone.shown
    assert alone.gone_after(0)


@pytest.mark.slow
def test_an_address_that_is_not_the_hosts_own_is_wrong_usage(hosts: Hosts) -> None:
    first = hosts.launch(0)
    second = hosts.launch(1, "--local-addr", "192.0.2.1")
    assert second.wait(30) == 2, second.shown
    assert second.gone_after(0)
    assert second.shown.count("ftrain: node 1: can't listen on 192.0.2.1:0: ") == 1, second.shown
    assert "Traceback" not in second.shown
    assert first.popen.poll() is None


@pytest.mark.slow
def test_a_spare_host_takes_the_place_of_one_that_is_lost(hosts: Hosts) -> None:
    first, lost = (hosts.launch(node, "--spares=1") for node in (0, 1))
    wait_for(lambda: began(first) == began(lost) == 1)
    spare = hosts.launch(2, "--spares=1")
    wait_for(lambda: read_node_file(node_file_path(spare.run_dir, 2)))
    lost.popen.kill()  # nobody is left to say so
    wait_for(lambda: "rank 1 began" in spare.shown and began(first) == 2, 40)
    hosts.go_on()
    assert (first.wait(), spare.wait()) == (0, 0)
    assert "node 2 takes the place of node 1" in first.shown
