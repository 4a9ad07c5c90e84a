"""``ftrain doctor``: findings about this machine, and about scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftrain.launch.cli import main
from ftrain.launch.reproducibility import find_obstacles


def test_this_machine_has_what_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text("import random\nrng = random.Random(3)\n")
    assert main(["doctor", str(script)]) == 0
    shown = capsys.readouterr().out
    assert "missing" not in shown
    for word in ("memfd", "pidfd", "DDP internals", "memory", "train.py:2"):
        assert word in shown


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("rng = np.random.default_rng(3)", "NumPy generator"),
        ("torch.seed()", "operating system"),
        ("torch.manual_seed(int(time.time()))", "seeded from the clock"),
        ("random.seed()", "without a number"),
        ("ddp = DDP(model, find_unused_parameters=True)", "find_unused_parameters"),
        ("model.register_comm_hook(state, hook)", "communication hook"),
        ("torch.backends.cudnn.benchmark = True", "cudnn.benchmark"),
        ("torch.compile(model, mode='max-autotune-no-cudagraphs')", "chooses kernels"),
        ("class Stream(torch.utils.data.IterableDataset): pass", "without state_dict"),
    ],
)
def test_obstacles_are_found(line: str, word: str) -> None:
    found = find_obstacles(f"x = 1\n{line}\n".encode())
    assert [number for number, _ in found] == [2]
    assert word in found[0][1]


@pytest.mark.parametrize(
    "line",
    [
        "torch.manual_seed(3)",
        "random.seed(args.seed)",
        "began = time.time()",
        "ddp = DDP(model, find_unused_parameters=False)",
        "torch.backends.cudnn.benchmark = False",
        "model = torch.compile(model, mode='reduce-overhead')",
        "class Stream(IterableDataset):\n    def state_dict(self): pass",
        "(lambda: 1)()()",
    ],
)
def test_ordinary_lines_are_not(line: str) -> None:
    assert find_obstacles(line.encode()) == []


def test_the_example_is_clean() -> None:
    script = Path(__file__).parents[2] / "examples" / "llama" / "train.py"
    assert find_obstacles(script.read_bytes()) == []
