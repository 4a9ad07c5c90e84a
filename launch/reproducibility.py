"""What keeps a script from resuming bit for bit, found in its source as far as it can be seen."""

from __future__ import annotations

import ast
from collections.abc import Iterator

NEVER_EXACT = (
    "draws random numbers from a generator of its own that the Session was not given",
    "seeds from the clock or from the operating system",
    "reads an IterableDataset that has no state_dict (its position is found by reading again)",
    "passes find_unused_parameters=True, or a communication hook with state, to DDP with 3 or more"
    " ranks",
    "uses GPU kernels that are not deterministic (torch.use_deterministic_algorithms tells), or"
    " lets cuDNN or max-autotune choose kernels by timing",
    "lets threads, wall-clock limits or the number of restarts decide what is computed",
)

_OWN_GENERATORS = {
    "random.Random": "a random.Random",
    "random.SystemRandom": "a random.SystemRandom",
    "np.random.default_rng": "a NumPy generator",
    "numpy.random.default_rng": "a NumPy generator",
    "np.random.RandomState": "a NumPy generator",
    "numpy.random.RandomState": "a NumPy generator",
}
_UNSEEDED = {
    "torch.seed": "torch.seed() seeds from the operating system",
    "os.urandom": "os.urandom gives other bytes after a restart",
    "secrets.token_bytes": "secrets gives other bytes after a restart",
}
_SEEDERS = ("random.seed", "torch.manual_seed", "np.random.seed", "numpy.random.seed")
_CLOCKS = ("time.time", "time.time_ns", "time.monotonic", "time.perf_counter", "datetime.now")


def find_obstacles(source: bytes) -> list[tuple[int, str]]:
    """``(line, sentence)`` for each place in ``source`` that can make a resumption inexact.

    Raises SyntaxError for what is not Python.
    """
    found = {(node_line, words) for node_line, words in _walk(ast.parse(source))}
    return sorted(found)


def _walk(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for words in _call(node):
                yield node.lineno, words
        elif isinstance(node, ast.ClassDef):
            yield from _class(node)
        elif isinstance(node, ast.Assign):
            target = _dotted(node.targets[0])
            if target.endswith("cudnn.benchmark") and _is_true(node.value):
                yield node.lineno, "cudnn.benchmark chooses kernels by timing them"


def _class(node: ast.ClassDef) -> Iterator[tuple[int, str]]:
    bases = {_dotted(base).rpartition(".")[2] for base in node.bases}
    methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
    if "IterableDataset" in bases and "state_dict" not in methods:
        yield (
            node.lineno,
            f"{node.name} is an IterableDataset without state_dict: its position is found by"
            " reading again",
        )


def _call(node: ast.Call) -> Iterator[str]:
    name = _dotted(node.func)
    keywords = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in _OWN_GENERATORS:
        yield f"{_OWN_GENERATORS[name]} of its own: its state must be given to the Session"
    if name in _UNSEEDED:
        yield _UNSEEDED[name]
    if name in _SEEDERS:
        if not node.args and not keywords:
            yield f"{name}() without a number seeds from the operating system"
        elif any(_reads_clock(part) for part in node.args):
            yield f"{name} is seeded from the clock"
    if _is_true(keywords.get("find_unused_parameters")):
        yield "find_unused_parameters=True: DDP's summation order may differ after a restart"
    if name.endswith("register_comm_hook"):
        yield "a DDP communication hook: state that it keeps is not part of a version"
    mode = keywords.get("mode")
    value = mode.value if isinstance(mode, ast.Constant) else None
    if name.endswith("compile") and isinstance(value, str) and value.startswith("max-autotune"):
        yield f"torch.compile(mode='{value}') chooses kernels by timing them"


def _reads_clock(node: ast.AST) -> bool:
    calls = (part for part in ast.walk(node) if isinstance(part, ast.Call))
    return any(_dotted(call.func).endswith(_CLOCKS) for call in calls)


def _is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _dotted(node: ast.AST) -> str:
    """``a.b.c`` for a chain of names, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = _dotted(node.value)
        return f"{head}.{node.attr}" if head else node.attr
    return ""
