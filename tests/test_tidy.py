"""The rules of the code base, as functions over source text, each shown to catch a violation.

A rule takes one :class:`Source` and yields ``(line, complaint)``.  To let a place off, name it with
the reason in :data:`LET_OFF`; an exemption that is no longer needed fails too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Each package may import itself, those to its right, and configs, which imports nothing.
PACKAGES = ("launch", "runtime", "recovery", "snapshot", "checkpoint", "comms", "configs")
FOLDERS = (*PACKAGES, "tests", "examples", "benchmarks")

FUNCTION_LINES_MAX = 70
FILE_LINES_MAX = 600

# What protocol modules may use of the standard library: values and arithmetic, nothing that can
# differ between two runs with the same inputs.
PURE_MODULES = frozenset(
    re.findall(
        r"\w+",
        """__future__ abc base64 binascii bisect collections contextlib copy dataclasses enum
        fractions functools hashlib heapq hmac itertools json math operator re statistics string
        struct textwrap types typing zlib""",
    )
)
PURE_FTRAIN_MODULES = frozenset({"ftrain.comms.errors", "ftrain.configs.schema"})
IMPURE_CALLS = frozenset({"open", "input", "print", "exec", "eval", "__import__"})

UNPICKLERS = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"})
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|\bNotImplementedError\b")

# (rule, path) -> why it is let off.
LET_OFF: dict[tuple[str, str], str] = {
    ("unfinished_marks", "tests/test_tidy.py"): "names the marks it looks for",
    (
        "unpickling",
        "runtime/interop/dcp_directory.py",
    ): "torch keeps DCP's list of contents as a pickle; an import reads it with these classes only",
}


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the repository's root, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed text."""
        return ast.parse(self.text)

    @property
    def folder(self) -> str:
        """The top-level folder."""
        return PurePosixPath(self.path).parts[0]

    @property
    def is_package_code(self) -> bool:
        """Whether it is installed with the package."""
        return self.folder in PACKAGES

    @property
    def is_protocol(self) -> bool:
        """Whether it is a pure protocol module."""
        return self.is_package_code and "protocol" in PurePosixPath(self.path).parent.parts

    def imports(self) -> Iterator[tuple[int, str]]:
        """Line and absolute name of every import, also inside functions."""
        package = ("ftrain", *PurePosixPath(self.path).parent.parts)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node.lineno, alias.name
            elif isinstance(node, ast.ImportFrom):
                start = package[: len(package) - node.level + 1] if node.level else ()
                base = ".".join((*start, *(node.module or "").split("."))).strip(".")
                for alias in node.names:
                    yield node.lineno, f"{base}.{alias.name}"

    def calls(self) -> Iterator[tuple[ast.Call, str]]:
        """Every call with the called name as written, such as ``time.sleep``."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                yield node, ast.unparse(node.func)

    def has_comment_beside(self, line: int) -> bool:
        """Whether a comment stands on the line, or on the one before or after it."""
        return any("#" in text for text in self.text.splitlines()[max(0, line - 2) : line + 1])

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


Complaints = Iterator[tuple[int, str]]


def import_direction(source: Source) -> Complaints:
    """A package imports itself, those to its right, and configs."""
    if not source.is_package_code:
        return
    allowed = set(PACKAGES[PACKAGES.index(source.folder) :])
    for line, name in source.imports():
        parts = name.split(".")
        if parts[0] in PACKAGES:
            yield line, f"imports {name}: write ftrain.{name}"
        elif parts[0] == "ftrain" and len(parts) > 1 and parts[1] in set(PACKAGES) - allowed:
            yield line, f"{source.folder} must not import {name}"


def protocol_purity(source: Source) -> Complaints:
    """Protocol modules use values and arithmetic only: no clock, randomness, I/O or torch."""
    if not source.is_protocol:
        return
    for line, name in source.imports():
        if name.split(".")[0] == "ftrain":
            pure = "protocol" in name.split(".")
            pure = pure or any(
                f"{name}.".startswith(f"{module}.") for module in PURE_FTRAIN_MODULES
            )
        else:
            pure = name.split(".")[0] in PURE_MODULES
        if not pure:
            yield line, f"a protocol module must not import {name}"
    for call, name in source.calls():
        if name in IMPURE_CALLS:
            yield call.lineno, f"a protocol module must not call {name}"


def environment_reads(source: Source) -> Complaints:
    """Only comms/environment.py knows the process environment."""
    if not source.is_package_code or source.path == "comms/environment.py":
        return
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            if ast.unparse(node.value) == "os":
                yield node.lineno, f"uses os.{node.attr}: ask comms/environment.py"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in names:
                    yield node.lineno, f"imports os.{alias.name}: ask comms/environment.py"


def function_length(source: Source) -> Complaints:
    """A function fits on a screen."""
    for function in source.functions():
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if lines > FUNCTION_LINES_MAX:
            yield function.lineno, f"{function.name} has {lines} lines, max {FUNCTION_LINES_MAX}"


def file_length(source: Source) -> Complaints:
    """A file has one subject."""
    lines = source.text.count("\n")
    if lines > FILE_LINES_MAX:
        yield lines, f"has {lines} lines, max {FILE_LINES_MAX}"


def exception_handlers(source: Source) -> Complaints:
    """No bare except; a broad one in package code says why, in a comment beside it."""
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if node.type is None:
            yield node.lineno, "bare except"
            continue
        types = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        broad = {"Exception", "BaseException"} & {ast.unparse(kind) for kind in types}
        if broad and source.is_package_code and not source.has_comment_beside(node.lineno):
            yield node.lineno, f"except {broad.pop()} without a comment that says why"


def printing(source: Source) -> Complaints:
    """Only the launcher talks to the terminal."""
    if source.is_package_code and source.folder != "launch":
        for call, name in source.calls():
            if name == "print":
                yield call.lineno, "print outside launch"


def unpickling(source: Source) -> Complaints:
    """Nothing is unpickled, directly or through torch or numpy."""
    for line, name in source.imports():
        if name.split(".")[0] in UNPICKLERS:
            yield line, f"imports {name.split('.')[0]}"
    for call, name in source.calls():
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield call.lineno, "torch.load without weights_only=True"
        if keywords.get("allow_pickle") == "True":
            yield call.lineno, f"{name} with allow_pickle=True"


def docstrings(source: Source) -> Complaints:
    """Whatever is public says what it is for; an interface does so as a whole."""
    if not source.is_package_code:
        return
    if not ast.get_docstring(source.tree):
        yield 1, "module without docstring"
    yield from _undocumented(source.tree)


def _undocumented(scope: ast.Module | ast.ClassDef) -> Complaints:
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        documented_elsewhere = {f"{node.name}.setter", "overload", "typing.overload", "override"}
        if node.name.startswith("_") or decorators & documented_elsewhere:
            continue
        if not ast.get_docstring(node):
            yield node.lineno, f"{node.name} without docstring"
        is_interface = isinstance(node, ast.ClassDef) and "Protocol" in map(_base, node.bases)
        if isinstance(node, ast.ClassDef) and not is_interface:
            yield from _undocumented(node)


def _base(node: ast.expr) -> str:
    return ast.unparse(node).partition("[")[0].rpartition(".")[2]


def annotations_future(source: Source) -> Complaints:
    """Annotations are never evaluated at import."""
    defines = any(isinstance(node, ast.ClassDef | ast.arguments) for node in ast.walk(source.tree))
    if defines and "__future__.annotations" not in {name for _, name in source.imports()}:
        yield 1, "without `from __future__ import annotations`"


def unfinished_marks(source: Source) -> Complaints:
    """What is not done is not in the tree."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if found := UNFINISHED.search(line):
            yield number, f"unfinished: {found.group()}"


def sleeping(source: Source) -> Complaints:
    """No sleep stands for work; where there is nothing to wait for, a comment beside it says so."""
    if source.is_package_code:
        for call, name in source.calls():
            if name in {"time.sleep", "sleep"} and not source.has_comment_beside(call.lineno):
                yield call.lineno, "sleeps without a comment that says why nothing can be awaited"


RULES: tuple[Callable[[Source], Complaints], ...] = (
    import_direction,
    protocol_purity,
    environment_reads,
    function_length,
    file_length,
    exception_handlers,
    printing,
    unpickling,
    docstrings,
    annotations_future,
    unfinished_marks,
    sleeping,
)


@cache
def sources() -> list[Source]:
    """Every Python file of the repository, parsed once."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    paths.append(ROOT / "ftrain" / "__init__.py")
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text()) for path in sorted(paths)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_keeps_the_rule(rule: Callable[[Source], Complaints]) -> None:
    """The whole tree, less what is let off by name."""
    complaints, needed = [], set()
    for source in sources():
        for line, complaint in rule(source):
            if (rule.__name__, source.path) in LET_OFF:
                needed.add(source.path)
            else:
                complaints.append(f"{source.path}:{line}: {complaint}")
    stale = {path for name, path in LET_OFF if name == rule.__name__} - needed
    assert not complaints, f"{rule.__doc__}\n" + "\n".join(complaints)
    assert not stale, f"no longer needed in LET_OFF: {stale}"


HEAD = '"""Doc."""\nfrom __future__ import annotations\n'
PROTOCOL = "comms/protocol/x.py"
VIOLATIONS: list[tuple[Callable[[Source], Complaints], str, str]] = [
    (import_direction, "comms/x.py", "from ftrain.checkpoint import codec"),
    (import_direction, "comms/x.py", "def f():\n    import ftrain.launch.job"),
    (import_direction, "snapshot/x.py", "from ..recovery import faults"),
    (import_direction, "snapshot/x.py", "from ftrain import runtime"),
    (import_direction, "configs/x.py", "from ftrain.comms import errors"),
    (import_direction, "launch/x.py", "from comms import errors"),
    (protocol_purity, PROTOCOL, "import time"),
    (protocol_purity, PROTOCOL, "from torch import Tensor"),
    (protocol_purity, PROTOCOL, "def f():\n    from random import random"),
    (protocol_purity, PROTOCOL, "from ftrain.comms import channel"),
    (protocol_purity, "snapshot/protocol/deep/x.py", "import os"),
    (protocol_purity, PROTOCOL, "def f():\n    return open('x')"),
    (environment_reads, "launch/x.py", "import os\nvalue = os.environ['X']"),
    (environment_reads, "comms/x.py", "import os\nvalue = os.getenv('X')"),
    (environment_reads, "comms/x.py", "from os import environ"),
    (function_length, "comms/x.py", "def f():\n" + "    pass\n" * 70),
    (function_length, "tests/x.py", "class A:\n  async def f(self):\n" + "    pass\n" * 70),
    (file_length, "comms/x.py", "x = 1\n" * 601),
    (exception_handlers, "tests/x.py", "try:\n    f()\nexcept:\n    pass"),
    (exception_handlers, "comms/x.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (exception_handlers, "comms/x.py", "try:\n    f()\nexcept (OSError, BaseException):\n    pass"),
    (printing, "comms/x.py", "print('x')"),
    (unpickling, "comms/x.py", "import pickle"),
    (unpickling, "comms/x.py", "from marshal import loads"),
    (unpickling, "examples/x.py", "import torch\ntorch.load('x')"),
    (unpickling, "examples/x.py", "import torch\ntorch.load('x', weights_only=False)"),
    (unpickling, "comms/x.py", "import numpy\nnumpy.load('x', allow_pickle=True)"),
    (docstrings, "comms/x.py", "def f(): ..."),
    (docstrings, "comms/x.py", "class A:\n    '''Doc.'''\n    def f(self): ..."),
    (annotations_future, "comms/x.py", "def f(x: int) -> int: ..."),
    (unfinished_marks, "tests/x.py", "# TODO: later"),
    (unfinished_marks, "comms/x.py", "def f():\n    raise NotImplementedError"),
    (sleeping, "comms/x.py", "import time\ntime.sleep(1)"),
]
ALLOWED: list[tuple[Callable[[Source], Complaints], str, str]] = [
    (
        import_direction,
        "snapshot/x.py",
        "from ftrain.checkpoint import codec\nimport ftrain.configs",
    ),
    (import_direction, "launch/x.py", "from ftrain.comms.errors import FtrainError\nimport torch"),
    (protocol_purity, PROTOCOL, "import hmac\nfrom collections.abc import Iterator"),
    (protocol_purity, PROTOCOL, "from ftrain.comms.protocol import messages"),
    (protocol_purity, PROTOCOL, "from ftrain.comms.errors import ProtocolError"),
    (protocol_purity, "comms/x.py", "import time"),
    (environment_reads, "comms/environment.py", "import os\nvalue = os.environ['X']"),
    (environment_reads, "examples/x.py", "import os\nvalue = os.environ['X']"),
    (function_length, "comms/x.py", "def f():\n" + "    pass\n" * 69),
    (exception_handlers, "comms/x.py", "try:\n    f()\nexcept OSError:\n    pass"),
    (
        exception_handlers,
        "comms/x.py",
        "try:\n    f()\nexcept Exception:  # the thread's root\n    g()",
    ),
    (printing, "launch/x.py", "print('x')"),
    (unpickling, "examples/x.py", "import torch\ntorch.load('x', weights_only=True)"),
    (docstrings, "comms/x.py", "def _f(): ...\nclass _A:\n    def f(self): ..."),
    (docstrings, "tests/x.py", "def f(): ..."),
    (docstrings, "comms/x.py", "class A(Protocol[T]):\n    '''Doc.'''\n    def f(self): ..."),
    (sleeping, "tests/x.py", "import time\ntime.sleep(1)"),
    (sleeping, "comms/x.py", "import time\ntime.sleep(1)  # a word in shared memory has no event"),
]


@pytest.mark.parametrize(("rule", "path", "text"), VIOLATIONS)
def test_rule_catches(rule: Callable[[Source], Complaints], path: str, text: str) -> None:
    """A planted violation."""
    head = "" if rule is annotations_future else HEAD
    assert list(rule(Source(path, head + text)))


@pytest.mark.parametrize(("rule", "path", "text"), ALLOWED)
def test_rule_lets_pass(rule: Callable[[Source], Complaints], path: str, text: str) -> None:
    """Its innocent neighbour."""
    assert not list(rule(Source(path, HEAD + text)))


def test_every_rule_has_a_violation() -> None:
    """A rule that nothing shows to work is no rule."""
    assert {rule for rule, _, _ in VIOLATIONS} == set(RULES)


def test_import_root_links_to_the_folders() -> None:
    """``ftrain/`` holds a relative link to each package, which is one."""
    for package in PACKAGES:
        link = ROOT / "ftrain" / package
        assert link.readlink() == Path("..") / package
        assert (link / "__init__.py").is_file()
