"""Look at the user's script before anything is started for it."""

from __future__ import annotations

import hashlib
import importlib.machinery
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from ftrain.comms.errors import UsageError


@dataclass(frozen=True, slots=True)
class Script:
    """A script or module that can be run."""

    name: str  # as given on the command line
    path: str  # absolute path of its source
    digest: str  # hex of the source

    @property
    def stem(self) -> str:
        """A short name for directories."""
        return Path(self.name).stem if self.name.endswith(".py") else self.name.rpartition(".")[2]


def check_script(name: str, *, module: bool) -> Script:
    """Find and compile the script (or module); nothing of it is executed.

    Raises :class:`UsageError` in one sentence: missing, not readable, not Python, syntax error.
    """
    path = _module_path(name) if module else _script_path(name)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the script {name} can't be read: {error.strerror}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the ranks will show them
            compile(source, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        if path.suffix == ".py" and error.lineno is not None:
            raise UsageError(f"syntax error in {path}, line {error.lineno}: {error.msg}") from None
        raise UsageError(f"the script {name} is not a Python script: {error.msg}") from None
    except ValueError as error:  # null bytes
        raise UsageError(f"the script {name} is not a Python script: {error}") from None
    digest = hashlib.blake2b(source, digest_size=16).hexdigest()
    return Script(name, str(path), digest)


def _script_path(name: str) -> Path:
    path = Path(name)
    if path.is_dir():
        raise UsageError(f"{name} is a directory: name the Python script in it")
    if not path.exists():
        hint = " (a module is run with -m)" if "/" not in name and not path.suffix else ""
        raise UsageError(f"there is no script {name} in {Path.cwd()}{hint}")
    return path.resolve()


def _module_path(name: str) -> Path:
    """Where ``python -m name`` would find its code, without importing the packages around it."""
    search: list[str] | None = [str(Path.cwd()), *sys.path]
    spec: importlib.machinery.ModuleSpec | None = None
    for part in [*name.split("."), "__main__"]:
        plain = spec is not None and spec.submodule_search_locations is None
        if plain and part == "__main__":
            break
        found = None if plain else importlib.machinery.PathFinder.find_spec(part, search)
        if found is None:
            what = "is a package without __main__" if part == "__main__" else "can't be found"
            raise UsageError(f"-m {name}: the module {what} from {Path.cwd()}")
        spec = found
        search = list(found.submodule_search_locations or ())
    assert spec is not None
    if spec.origin is None or not spec.origin.endswith(".py"):
        raise UsageError(f"-m {name}: {spec.origin or 'it'} is not Python source")
    return Path(spec.origin)
