from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from serving import Rank, Serving, adopted, gone, until

from ftrain.launch import rank_main
from ftrain.launch.children import children_of
from ftrain.launch.worker_messages import ForkRequest, RankSpec, ScriptEdited

pytestmark = pytest.mark.may_leak("a server has a copy of itself ready, a new one after each fork")

FACTS = """
    import atexit, json, os, sys, threading, __main__
    def facts():
        return {
            "argv": sys.argv, "path0": sys.path[0], "name": __name__, "file": __file__,
            "main": __main__.__dict__ is globals(), "doc": __doc__, "package": __package__,
            "spec": getattr(__spec__, "name", None), "cwd": os.getcwd(), "extra": sys.path[1:],
            "keys": sorted(k for k in globals() if k.startswith("__")),
            "executable": sys.executable, "threads": threading.active_count(),
            "hash": hash("seeded by the environment") == hash("seeded by the environment"),
        }
    atexit.register(lambda: print("exit hook"))
    def late():
        threading.Event().wait(0.1)
        print("thread ended")
    threading.Thread(target=late).start()
    if __name__ == "__main__":
        print(json.dumps(facts()))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Serving]:
    """A server whose script each test writes anew."""
    (place / "train.py").write_text("")
    serving = Serving(["train.py", "--lr", "0.1", ""], cwd=place)
    assert [text for text in serving.ready.problems if "ftrain.runtime" not in text] == []
    yield serving
    serving.close()
    assert children_of(os.getpid()) == []


def run(server: Serving, place: Path, script: str, count: int = 1) -> list[Rank]:
    (place / "train.py").write_text(textwrap.dedent(script))
    return server.fork(place, count)


def test_script_runs_as_python_would_run_it(server: Serving, place: Path) -> None:
    (rank,) = run(server, place, FACTS)
    assert rank.wait() == 0
    command = [sys.executable, "train.py", "--lr", "0.1", ""]
    plain = subprocess.run(command, cwd=place, capture_output=True, text=True, check=True)
    ours, theirs = rank.out.splitlines(), plain.stdout.splitlines()
    assert json.loads(ours[0]) == json.loads(theirs[0])
    assert ours[1:] == theirs[1:] == ["thread ended", "exit hook"]


@pytest.mark.slow
def test_more_ranks_than_one_packet_has_descriptors_for(server: Serving, place: Path) -> None:
    ranks = run(server, place, "import os; print(os.environ['RANK'])", 100)
    assert [rank.wait() for rank in ranks] == [0] * 100
    assert [rank.out for rank in ranks] == [f"{rank}\n" for rank in range(100)]


@pytest.mark.slow
def test_module_runs_as_python_would_run_it(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(textwrap.dedent(FACTS))
    serving = Serving(["pack.train", "-x"], module=True, cwd=tmp_path)
    (rank,) = serving.fork(tmp_path / "out")
    assert rank.wait() == 0
    serving.close()
    command = [sys.executable, "-m", "pack.train", "-x"]
    plain = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    ours, theirs = rank.out.splitlines(), plain.stdout.splitlines()
    assert json.loads(ours[0]) == json.loads(theirs[0])
    assert ours[1:] == theirs[1:]


@pytest.mark.parametrize(
    ("script", "code", "err"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no such data')", 1, "no such data\n"),
        ("raise SystemExit", 0, ""),
        ("import os; os._exit(7)", 7, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("import sys; sys.exit(256 + 4)", 4, ""),
    ],
)
def test_exit_codes(server: Serving, place: Path, script: str, code: int, err: str) -> None:
    (rank,) = run(server, place, script)
    assert rank.wait() == code
    assert rank.err == err
    assert not os.path.exists(rank.error_file)


def test_uncaught_exception_is_described_in_the_error_file_only(
    server: Serving, place: Path
) -> None:
    script = """
        def inner():
            raise ValueError("bad shape")
        print("before", end="")
        inner()
    """
    (rank,) = run(server, place, script)
    assert rank.wait() == 1
    error = rank_main.read_error_file(rank.error_file)
    assert (error.line, error.kind) == ("ValueError: bad shape", "exception")
    assert (
        error.traceback.splitlines()[1].strip() == f'File "{place}/train.py", line 5, in <module>'
    )
    assert "rank_main" not in error.traceback
    assert rank.err == ""
    assert rank.out == "before"
    os.unlink(rank.error_file)


def test_syntax_error_is_the_ranks_own(server: Serving, place: Path) -> None:
    (rank,) = run(server, place, "x = = 1\n")
    assert rank.wait() == 1
    error = rank_main.read_error_file(rank.error_file)
    assert error.line == "SyntaxError: invalid syntax"
    assert "train.py" in error.traceback
    os.unlink(rank.error_file)


def test_edited_script_is_noticed_and_used(server: Serving, place: Path) -> None:
    (rank,) = run(server, place, "print('one')")
    rank.wait()
    (rank,) = server.fork(place)
    rank.wait()
    assert (rank.news, rank.out) == ([], "one\n")
    (rank,) = run(server, place, "print('second')")
    rank.wait()
    assert (rank.news, rank.out) == ([ScriptEdited("train.py")], "second\n")


def test_ranks_are_children_of_the_agent_in_groups_of_their_own(
    server: Serving, place: Path
) -> None:
    script = """
        import os, random, numpy, torch
        print(os.getppid(), os.getpgid(0) == os.getsid(0) == os.getpid(), os.environ["RANK"],
              random.random(), numpy.random.rand(), torch.rand(1).item(), torch.get_num_threads())
    """
    ranks = run(server, place, script, 2)
    assert [rank.wait() for rank in ranks] == [0, 0]
    first, second = (rank.out.split() for rank in ranks)
    assert first[:3] == [str(os.getpid()), "True", "0"]
    assert second[:3] == [str(os.getpid()), "True", "1"]
    assert first[3] != second[3]
    assert first[4] != second[4]
    assert first[5] != second[5]
    assert first[6] == second[6] == "1"


def test_first_ddp_step_imports_nothing(server: Serving, place: Path) -> None:
    script = """
        import sys, time; began = time.monotonic(); before = set(sys.modules)
        import torch, torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        model = DistributedDataParallel(torch.nn.Linear(4, 4))
        optimizer = torch.optim.AdamW(model.parameters())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        data = TensorDataset(torch.randn(8, 4))
        for (x,) in DataLoader(data, sampler=DistributedSampler(data), batch_size=4):
            torch.nn.functional.mse_loss(model(x), x).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(); optimizer.zero_grad(); scheduler.step()
        print(time.monotonic() - began, sorted(set(sys.modules) - before))
        dist.destroy_process_group()
    """
    (rank,) = run(server, place, script)
    assert rank.wait() == 0, rank.err
    seconds, _, modules = rank.out.partition(" ")
    assert modules == "[]\n"
    assert float(seconds) < 1.0  # 1.8 s of imports otherwise


def test_stop_signals_are_for_the_agent_and_helpers_obey_them(server: Serving, place: Path) -> None:
    script = """
        import multiprocessing, os, signal, subprocess, sys, time
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start(); child.terminate(); child.join(10)
        program = subprocess.Popen(["sleep", "60"]); program.terminate()
        print(child.exitcode, program.wait(10))
    """
    (rank,) = run(server, place, script)
    assert rank.wait() == 0, rank.err
    assert rank.out == "-15 -15\n"


def test_stack_is_written_on_request(server: Serving, place: Path) -> None:
    script = """
        import time
        def busy_somewhere():
            print("in", flush=True)
            time.sleep(60)
        busy_somewhere()
    """
    (rank,) = run(server, place, script)
    until(lambda: rank.out == "in\n")
    os.kill(rank.pid, signal.SIGRTMIN + 1)
    until(lambda: "busy_somewhere" in rank.err)
    os.kill(rank.pid, signal.SIGKILL)
    assert rank.wait() == -9


def test_fork_is_fast(server: Serving, place: Path) -> None:
    (place / "train.py").write_text("import time; print(time.monotonic())")
    server.fork(place)[0].wait()
    times = []
    for _ in range(5):
        began = time.monotonic()
        ranks = server.fork(place, 2)
        for rank in ranks:
            rank.wait()
        times.append(max(float(rank.out) for rank in ranks) - began)
    assert min(times) < 0.15, times


@pytest.mark.slow
def test_preloaded_module_that_starts_a_thread_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    (tmp_path / "threaded.py").write_text(
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
    )
    (tmp_path / "leaving.py").write_text("import sys; sys.exit(3)")
    modules = ["threaded", "leaving", "not_there", "zlib"]
    serving = Serving(["train.py"], modules=modules, cwd=tmp_path)
    assert serving.ready.problems[-2] == "module leaving can't be preloaded: SystemExit: 3"
    assert "not_there can't be preloaded" in serving.ready.problems[-1]
    with pytest.raises(AssertionError, match=r"2 threads.*launch.preload"):
        serving.fork(tmp_path / "out")
    assert "2 threads" in serving.store().problem
    serving.close()


def test_what_ends_a_rank_before_its_script_is_described(server: Serving, place: Path) -> None:
    server.epoch += 1
    spec = RankSpec(0, {}, str(place / "error0.json"))
    with open(os.devnull, "w") as null:  # and no telemetry page
        server.socket.send(ForkRequest(server.epoch, (spec,), {}), [null.fileno()] * 3)
    rank = Rank(0, server.receive().pid, place)
    assert rank.wait() == 1
    error = rank_main.read_error_file(rank.error_file)
    assert error.line.startswith("ValueError: telemetry page is shorter than ")
    assert "_mark_started" in error.traceback
    os.unlink(rank.error_file)


def test_what_ends_a_copy_is_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.py").write_text("")
    serving = Serving(["train.py"], cwd=tmp_path)
    os.write(serving.socket.fileno(), b"garbage")
    failed = serving.receive()
    assert failed.cause == "forking ended with exit code 1"
    serving.close()
    assert "ftrain.comms.errors.RemoteProtocolError: " in capfd.readouterr().err


def test_stores_are_served_by_processes_of_their_own(server: Serving, place: Path) -> None:
    first, second = server.store(), server.store()
    assert (first.problem, second.problem) == ("", "")
    assert first.port != second.port
    script = f"""
        from torch.distributed import TCPStore
        store = TCPStore("127.0.0.1", {first.port}, is_master=False)
        store.set("x", "1")
        print(store.get("x"), TCPStore("127.0.0.1", {second.port}, is_master=False).check(["x"]))
    """
    (rank,) = run(server, place, script)
    assert rank.wait() == 0, rank.err
    assert rank.out == "b'1' False\n"
    assert "can't listen" in server.store("192.0.2.1").problem
    for pid in (first.pid, second.pid):
        until(partial(adopted, pid))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_ranks_outlive_the_server(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import time; time.sleep(60)")
    serving = Serving(["train.py"], cwd=tmp_path)
    (rank,) = serving.fork(tmp_path / "out")
    serving.process.kill()
    assert serving.process.wait() == -9
    assert not gone(rank.pid, 0.2)
    os.kill(rank.pid, signal.SIGKILL)
    assert rank.wait() == -9
    serving.socket.close()


AGENT = """
    import sys, pathlib, time
    sys.path.insert(0, sys.argv[1])
    from serving import Serving
    serving = Serving(["train.py"], cwd=pathlib.Path.cwd())
    print(serving.process.pid, serving.fork(pathlib.Path("out"))[0].pid, flush=True)
    time.sleep(60)
"""
WITH_HELPER = """
    import multiprocessing, time
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start(); print(child.pid, flush=True); time.sleep(60)
"""


@pytest.mark.slow
def test_nothing_outlives_the_agent(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(WITH_HELPER))
    (tmp_path / "agent.py").write_text(textwrap.dedent(AGENT))
    command = [sys.executable, "agent.py", os.path.dirname(__file__)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        pids = [int(word) for word in agent.stdout.readline().split()]
        out = tmp_path / "out" / "out0"
        until(lambda: out.exists() and out.read_text().endswith("\n"))
        pids.append(int(out.read_text()))
        agent.kill()
        assert [gone(pid) for pid in pids] == [True, True, True]
