"""examples/llama/train.py: its model, its data, and whole runs, alone and under torchrun."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "llama" / "train.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("llama_train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["llama_train"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One corpus for all tests here."""
    return tmp_path_factory.mktemp("corpus")


def run(command: list[str], tmp_path: Path) -> str:
    """Run the script with warnings as errors; its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=-2
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def validation_losses(output: str) -> dict[int, float]:
    """Step -> loss, as printed."""
    found = re.findall(r"^step (\d+): validation loss ([\d.]+)$", output, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}


@pytest.mark.parametrize(("preset", "millions"), [("0.5m", 0.47), ("10m", 10.1), ("124m", 124.1)])
def test_presets_have_the_size_they_are_named_for(
    example: ModuleType, preset: str, millions: float
) -> None:
    """Counted without drawing a weight."""
    with torch.device("meta"):
        model = example.Llama(example.PRESETS[preset])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_fresh_model_knows_nothing(example: ModuleType) -> None:
    """Its loss is that of a uniform guess, and construction depends on the seed alone."""
    torch.manual_seed(0)
    model = example.Llama(example.PRESETS["0.5m"])
    loss = model(torch.randint(0, 256, (4, 65)))
    assert loss.item() == pytest.approx(5.545, abs=0.1)
    torch.manual_seed(0)
    again = example.Llama(example.PRESETS["0.5m"])
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_attention_is_causal(example: ModuleType) -> None:
    """A later position changes nothing before it."""
    attention = example.Attention(example.PRESETS["0.5m"])
    x = torch.randn(1, 16, 128)
    changed = x.clone()
    changed[:, 10:] += 1.0
    before, after = attention(x), attention(changed)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-3)


def test_rotary_positions_are_relative(example: ModuleType) -> None:
    """The product of a query and a key depends on their distance only."""
    query, key = torch.randn(2, 32).double()
    queries = example.rotate(query.expand(1, 1, 20, 32))[0, 0]
    keys = example.rotate(key.expand(1, 1, 20, 32))[0, 0]
    products = queries @ keys.T
    for distance in (0, 1, 7):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert not torch.allclose(products.diagonal(1)[0], products.diagonal(7)[0], atol=1e-4)


def test_corpus_is_the_same_whoever_makes_it(
    example: ModuleType, cache: Path, tmp_path: Path
) -> None:
    """Two processes that race for a new cache, and one that made it alone."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import train; train.read_corpus('validation', Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, SCRIPT.parent, tmp_path]
    racers = [subprocess.Popen(command) for _ in range(2)]
    assert [racer.wait(60) for racer in racers] == [0, 0]
    alone = example.read_corpus("validation", cache)
    raced = example.read_corpus("validation", tmp_path)
    assert torch.equal(alone, raced)
    assert len(list(tmp_path.iterdir())) == 1
    training = example.read_corpus("training", cache)
    assert len(training) > 4 * len(alone) > 1_000_000


def test_windows_cover_the_corpus(example: ModuleType) -> None:
    """Targets overlap with the next window's inputs by one byte; no byte is left out."""
    windows = example.Windows(torch.arange(101).to(torch.uint8), 10)
    assert len(windows) == 10
    assert windows[9].tolist() == list(range(90, 101))
    assert all(windows[i][-1] == windows[i + 1][0] for i in range(9))


def test_plain_script_learns(cache: Path, tmp_path: Path) -> None:
    """``python train.py``, warnings being errors."""
    options = ["--steps", "30", "--batch-size", "4", "--seq", "64", "--cache", str(cache)]
    losses = validation_losses(
        run([sys.executable, "-W", "error", str(SCRIPT), *options], tmp_path)
    )
    assert set(losses) == {0, 30}
    assert losses[30] < losses[0] - 1.0


@pytest.mark.soak
def test_torchrun_learns(cache: Path, tmp_path: Path) -> None:
    """Two ranks under plain torchrun, with a loader process each."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    options = ["--steps", "30", "--eval-every", "10", "--workers", "1", "--cache", str(cache)]
    losses = validation_losses(run([*torchrun, str(SCRIPT), *options], tmp_path))
    assert list(losses) == [0, 10, 20, 30]
    assert losses[30] < losses[0] - 1.0
