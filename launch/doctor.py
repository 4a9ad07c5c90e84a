"""``ftrain doctor``: whether this machine, and a script, have what ftrain needs."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import ftrain
from ftrain.checkpoint.files import takes_direct_io
from ftrain.comms.errors import StateError
from ftrain.comms.process import available_memory_bytes, become_subreaper
from ftrain.launch.reproducibility import NEVER_EXACT, find_obstacles
from ftrain.launch.script import check_script
from ftrain.snapshot.erasure.engines import engine

_PACKAGES = ("torch", "numpy", "msgspec", "xxhash", "hydra-core", "rich", "zstandard")
_FILES_MIN = 1024
_SHM_BYTES_MIN = 64 << 20
_GIB = 1 << 30
_TORCH_QUESTIONS = """
import torch, torch.distributed as dist
from ftrain.runtime.ddp import supported
print(dist.is_available() and dist.is_gloo_available())
print(torch.cuda.device_count())
print(supported())
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    state: str  # ok | note | missing
    subject: str
    words: str


def show_doctor(script: str | None = None) -> int:
    """Print every finding; returns 0 when nothing that ftrain needs is missing, else 1.

    Raises :class:`UsageError` for a script that can't be compiled.
    """
    findings = [finding for check in _CHECKS for finding in check()]
    if script is not None:
        source = check_script(script, module=False)
        findings += _script_findings(source.path)
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{finding.state:<8}{finding.subject:<{width}}  {finding.words}")
    print("\nResumption is bit-exact, except where a script")
    for reason in NEVER_EXACT:
        print(f"  - {reason}")
    if script is None:
        print("`ftrain doctor train.py` looks for these in a script.")
    missing = [finding.subject for finding in findings if finding.state == "missing"]
    if missing:
        print(f"\nmissing: {', '.join(missing)}")
    return 1 if missing else 0


def _versions() -> Iterator[Finding]:
    old = sys.version_info < (3, 11)
    yield Finding("missing" if old else "ok", "python", platform.python_version())
    yield Finding("ok", "ftrain", ftrain.__version__)
    for package in _PACKAGES:
        try:
            yield Finding("ok", package, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding("missing", package, f"not installed: pip install {package}")


def _erasure_code() -> Iterator[Finding]:
    try:
        choice = engine()
    except StateError as error:
        yield Finding("missing", "erasure code", str(error))
        return
    words = choice.engine.name + ("".join(f"; not {why}" for why in choice.refused))
    yield Finding("note" if choice.slow else "ok", "erasure code", words)


def _torch() -> Iterator[Finding]:
    """Asks in another process: torch takes a second to import, and may crash."""
    answer = subprocess.run(
        [sys.executable, "-c", _TORCH_QUESTIONS], capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding("missing", "torch runs", f"it can't be imported: {last}")
        return
    gloo, gpus, names = answer.stdout.split()[-3:]  # what is imported may print as well
    yield (
        Finding("ok", "gloo", "available")
        if gloo == "True"
        else Finding("missing", "gloo", "this torch was built without it")
    )
    yield Finding("ok", "GPUs", gpus if gpus != "0" else "none; ranks run on the CPU with gloo")
    yield (
        Finding("ok", "DDP internals", "as ftrain knows them: bit-exact with any number of ranks")
        if names == "True"
        else Finding(
            "note",
            "DDP internals",
            "changed in this torch: with three or more ranks the first step after a restart may"
            " differ in its last bits",
        )
    )


def _kernel() -> Iterator[Finding]:
    yield _tried("memfd", "snapshots live in memory files", _make_memory_file)
    yield _tried("pidfd", "a rank's end is noticed at once", _open_pidfd)
    yield _tried("subreaper", "nothing is left behind", become_subreaper)


def _make_memory_file() -> None:
    os.close(os.memfd_create("ftrain-doctor"))


def _open_pidfd() -> None:
    os.close(os.pidfd_open(os.getpid()))


def _tried(subject: str, words: str, attempt: Callable[[], None]) -> Finding:
    try:
        attempt()
    except (OSError, AttributeError) as error:
        return Finding("missing", subject, f"the kernel refuses it: {error}")
    return Finding("ok", subject, words)


def _resources() -> Iterator[Finding]:
    memory = available_memory_bytes()
    yield Finding(
        "ok",
        "memory",
        f"{memory / _GIB:.1f} GiB available; snapshots take up to snapshot.slots x state, at most"
        " snapshot.memory_share_max of it",
    )
    yield Finding("ok", "cores", f"{len(os.sched_getaffinity(0))}")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = files < _FILES_MIN
    yield Finding("note" if low else "ok", "open files", f"{files}" + (" (few)" if low else ""))
    yield _shared_memory(Path("/dev/shm"))
    yield _direct_io(Path.cwd())


def _direct_io(path: Path) -> Finding:
    """Run directories are made below the present directory, unless --run-dir says otherwise."""
    if takes_direct_io(path):
        return Finding("ok", "direct I/O", f"files in {path} are written around the page cache")
    words = f"refused in {path}: durable versions go through the page cache, and take memory"
    return Finding("note", "direct I/O", words)


def _shared_memory(path: Path) -> Finding:
    """Snapshots don't need it, but DataLoader workers do."""
    if not path.is_dir():
        return Finding("note", str(path), "is missing: DataLoader workers need it")
    size = shutil.disk_usage(path).total
    if size < _SHM_BYTES_MIN:
        words = f"only {size >> 20} MiB: DataLoader workers may fail (docker: --shm-size)"
        return Finding("note", str(path), words)
    return Finding("ok", str(path), f"{size / _GIB:.1f} GiB for DataLoader workers")


def _script_findings(path: str) -> list[Finding]:
    source = Path(path).read_bytes()
    found = [
        Finding("note", f"{Path(path).name}:{line}", words)
        for line, words in find_obstacles(source)
    ]
    clean = Finding("ok", Path(path).name, "nothing seen that keeps a resumption from being exact")
    return found or [clean]


_CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _versions,
    _torch,
    _erasure_code,
    _kernel,
    _resources,
)
