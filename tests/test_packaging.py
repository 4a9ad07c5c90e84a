"""What a user installs: sdist and wheel in a clean environment, types, style, no CUDA packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("runtime", "checkpoint", "snapshot", "recovery", "comms", "configs", "launch")

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import ftrain
names = ["ftrain"]
for module in pkgutil.walk_packages(ftrain.__path__, "ftrain."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        names.append(module.name)
assert ftrain.Session
for name in names:
    assert sys.modules[name].__file__.startswith(sys.prefix), sys.modules[name].__file__
print("modules:", *names)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command; its output, or a failed test that shows it."""
    done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=-2)
    assert done.returncode == 0, f"{command}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from that, of a copy of this repository."""
    copy = tmp_path_factory.mktemp("source") / "ftrain"
    ignored = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "ftrain-runs", "results"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy, cwd=copy)
    return out


@pytest.fixture(scope="module")
def clean_python(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the wheel, and sees our dependencies."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home)
    # Paths that a .pth file adds are not searched for .pth files, so the editable ftrain stays out.
    (site_packages,) = home.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
def test_wheel_imports_everywhere(clean_python: Path, tmp_path: Path) -> None:
    """Every module imports from the installed wheel, from outside the repository, warning-free."""
    output = run(clean_python, "-W", "error", "-c", IMPORT_EVERYTHING, cwd=tmp_path)
    noise, _, names = output.rpartition("modules: ")
    assert not noise, "importing a module says something"
    expected = {"ftrain", *(f"ftrain.{package}" for package in PACKAGES)}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            expected.add(".".join(("ftrain", *parts)).removesuffix(".__init__"))
    assert set(names.split()) == {name for name in expected if not name.endswith("__main__")}


@pytest.mark.slow
def test_wheel_command_and_entry_point(clean_python: Path, tmp_path: Path) -> None:
    """``ftrain`` runs, with the configuration files of the wheel; torchrun finds its plug-in."""
    ftrain = clean_python.with_name("ftrain")
    assert "launch" in run(ftrain, "--help", cwd=tmp_path)
    (tmp_path / "empty.py").write_text("")
    assert "snapshot:" in run(ftrain, "launch", "--cfg", "job", "empty.py", cwd=tmp_path)
    code = (
        "from importlib.metadata import entry_points as find\n"
        "found = {e.name: e for e in find(group='torchrun.handlers')}\n"
        "assert callable(found['ftrain'].load())\n"
    )
    run(clean_python, "-c", code, cwd=tmp_path)


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_data_files(dist: Path) -> None:
    """YAML, etcd's messages, py.typed and the licence are inside; nothing is installed beside
    ``ftrain``."""
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {f"ftrain/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert wanted, "no YAML in configs/"
    wanted |= {f"ftrain/comms/store/etcd/{name}" for name in ("rpc.proto", "kv.proto")}
    wanted.add("ftrain/comms/store/etcd/etcd.protoset")
    assert wanted | {"ftrain/py.typed"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ftrain"}
    assert any(name.endswith("LICENSE") for name in names)
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted | {"ftrain/py.typed", "pyproject.toml", "README.md", "LICENSE"} <= members


def test_no_cuda_packages_without_an_accelerator() -> None:
    """The README's install brings the CPU build of torch where there is nothing to run CUDA on."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has an accelerator")
    names = [found.metadata["Name"].lower() for found in importlib.metadata.distributions()]
    cuda = [name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))]
    assert len(cuda) == 0, cuda


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mypy_strict() -> None:
    """Types hold (options in pyproject.toml)."""
    run(sys.executable, "-m", "mypy", "-p", "ftrain", cwd=ROOT)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_pyright() -> None:
    """Types hold for pyright too; its build from the registry needs no download of its own."""
    if importlib.util.find_spec("basedpyright") is None:
        pytest.skip("basedpyright is not installed")
    run(sys.executable, "-m", "basedpyright", "--level", "error", cwd=ROOT)


@pytest.mark.slow
def test_ruff() -> None:
    """Style holds (options in pyproject.toml)."""
    run(sys.executable, "-m", "ruff", "check", ".", cwd=ROOT)
    run(sys.executable, "-m", "ruff", "format", "--check", ".", cwd=ROOT)
