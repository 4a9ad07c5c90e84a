"""A stand-in for a node's agent: ``fake_node.py RUN_DIR NODE RANKS INCARNATION [FIRST EPOCH]``.

Keeps real pages and real children (ranks that train, a snapshot manager and a worker server that
sleep), writes the node's file, and starts all ranks again, in the next epoch, when one ends.  How
ranks ended goes to ``<run_dir>/ends<node>.jsonl``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from ftrain.comms.process import die_with_parent
from ftrain.comms.telemetry import TelemetryPage
from ftrain.recovery.faults import NodeFile, NodeRank, write_node_file

CHILD = str(Path(__file__).with_name("rank_child.py"))
SLEEPER = """
import signal, sys
from ftrain.comms.process import die_with_parent
die_with_parent(int(sys.argv[1]))
signal.pause()
"""


class FakeNode:
    def __init__(
        self, run_dir: str, node: int, ranks: int, incarnation: int, first: int = -1, epoch: int = 0
    ) -> None:
        self.run_dir = run_dir
        self.node = node
        self.incarnation = incarnation
        self.first = first if first >= 0 else node * ranks  # rank
        self.epoch = epoch  # before the next one
        self.fds = [TelemetryPage.create() for _ in range(ranks)]
        self.pages = [TelemetryPage(fd) for fd in self.fds]
        self.ranks: list[subprocess.Popen[bytes]] = []
        command = [sys.executable, "-c", SLEEPER, str(os.getpid())]
        self.helpers = [subprocess.Popen(command) for _ in range(2)]

    def form(self) -> None:
        """Start the ranks of the next epoch."""
        self.epoch += 1
        for process in self.ranks:
            process.kill()
            process.wait()
        for page in self.pages:
            page.clear()
        command = [sys.executable, CHILD, str(os.getpid()), "train"]
        self.ranks = [subprocess.Popen([*command, str(fd)], pass_fds=[fd]) for fd in self.fds]
        self.publish()

    def publish(self) -> None:
        """Write the node's file."""
        entries = [
            NodeRank(rank=self.first + index, pid=process.pid, telemetry_fd=self.fds[index])
            for index, process in enumerate(self.ranks)
        ]
        file = NodeFile(
            node=self.node,
            incarnation=self.incarnation,
            epoch=self.epoch,
            agent_pid=os.getpid(),
            smp_pid=self.helpers[0].pid,
            worker_server_pid=self.helpers[1].pid,
            ranks=tuple(entries),
        )
        write_node_file(self.run_dir, file)

    def run(self) -> None:
        """Until killed."""
        with open(Path(self.run_dir) / f"ends{self.node}.jsonl", "a") as ends:
            self.form()
            while True:
                pid, status = os.wait()
                for index, process in enumerate(self.ranks):
                    if process.pid == pid:
                        process.returncode = os.waitstatus_to_exitcode(status)
                        end = {"rank": self.first + index, "code": process.returncode}
                        ends.write(json.dumps(end) + "\n")
                        ends.flush()
                        self.form()
                        break


if __name__ == "__main__":
    die_with_parent(os.getppid())
    FakeNode(sys.argv[1], *(int(number) for number in sys.argv[2:])).run()
